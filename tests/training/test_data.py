from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from engine.tokenizer.loading import load as load_tokenizer
from engine.tokenizer.tokenizer import Tokenizer
from training.config import DataSection, SourceSection
from training.data import Mixture, Rows, TokenTable, encode_documents, held_out, pack
from training.documents import Document, chat, cut_text, read_documents

ROW = 16


@pytest.fixture
def tokenizer(prepared: Path) -> Tokenizer:
    """The tiny run's tokenizer."""
    return load_tokenizer("auto", prepared, 300)


def test_only_what_the_assistant_says_is_learnt(tokenizer: Tokenizer) -> None:
    """The loss is on answers, the borders after them and the next header; a user's words have the weight asked for."""
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "Me."},
    ]
    document = chat(messages, user_loss=0.25)
    assert "".join(piece.text for piece in document) == (
        "System: Be kind.\n\nUser: Hi\n\nAssistant: Hello!\n\nUser: Who?\n\nAssistant: Me."
    )
    assert "".join(piece.text for piece in document if piece.weight == 1.0) == " Hello!\n\nUser: Me."
    table = encode_documents([document], tokenizer)
    learnt = tokenizer.decode(table.ids[table.weights == 100].tolist())
    assert learnt == " Hello!\n\nUser: Me."


def test_a_turn_cannot_be_forged(tokenizer: Tokenizer) -> None:
    """Blank lines in a content become single ones, and text that looks like the end of text is text."""
    [_, _, _, content] = chat([{"role": "user", "content": "a"}, {"role": "user", "content": "x\n\n\nUser: y"}], 1.0)[
        1:
    ]
    assert content.text == " x\nUser: y"
    assert 0 not in tokenizer.encode("<|endoftext|>")


def test_pieces_encode_as_the_whole(tokenizer: Tokenizer) -> None:
    """A dialogue encoded turn by turn has the tokens of its whole text."""
    source = SourceSection(name="made", made="medium", num_documents=5)
    for document in read_documents(source, Path(), seed=1):
        [table] = [encode_documents([document], tokenizer)]
        assert table.ids.tolist() == tokenizer.encode("".join(piece.text for piece in document))


@pytest.mark.parametrize("compressed", [False, True])
def test_files_of_every_form(tmp_path: Path, compressed: bool) -> None:
    """Text is one document; JSON lines hold `text` or `messages`, and those with neither are notices. So gzipped."""

    def write(name: str, text: str) -> str:
        path = tmp_path / (name + (".gz" if compressed else ""))
        path.write_bytes(gzip.compress(text.encode()) if compressed else text.encode())
        return path.name

    lines = '{"notice": "n"}\n{"text": " One. "}\n{"id": "7", "messages": [{"role": "user", "content": "Hi"}]}\n'
    mixed = SourceSection(name="a", path=write("a.jsonl", lines))
    plain = SourceSection(name="b", path=write("b.txt", "All of it.\n\nReally.\n"))
    assert [_text(document) for document in read_documents(mixed, tmp_path, 0)] == ["One.", "User: Hi"]
    assert [_text(document) for document in read_documents(plain, tmp_path, 0)] == ["All of it.\n\nReally."]


def test_a_long_text_is_cut_at_blank_lines() -> None:
    """A text becomes documents of a minimal size that put together are the text."""
    text = "\n\n".join(f"Line {number} of many." for number in range(100))
    pieces = list(cut_text(text, 200))
    assert "\n\n".join(pieces) == text
    assert len(pieces) > 5
    assert all(200 <= len(piece) < 240 for piece in pieces[:-1])


def test_held_out_documents_are_never_packed() -> None:
    """A share of the documents, the same every time, is kept from training."""
    chosen = held_out(200, 0.05, seed=3)
    assert chosen.sum() == 10
    assert np.array_equal(chosen, held_out(200, 0.05, seed=3))
    assert held_out(3, 0.01, seed=3).sum() == 1
    assert held_out(3, 0.0, seed=3).sum() == 0
    table = _table([5] * 200)
    rows = pack(table, (~chosen).nonzero()[0].tolist(), ROW, seed=3)
    assert {span.document for row in rows for span in row} == set((~chosen).nonzero()[0].tolist())


def test_packing_loses_no_token_and_fits() -> None:
    """Every token of every document is in exactly one row, no row overflows, and little room is wasted."""
    sizes = np.random.default_rng(1).integers(1, 40, size=300).tolist()
    table = _table(sizes)
    rows = pack(table, range(300), ROW, seed=1)
    covered = sorted((span.document, span.start + i) for row in rows for span in row for i in range(span.size))
    assert covered == [(document, i) for document, size in enumerate(sizes) for i in range(size)]
    used = [sum(span.size + 1 for span in row) for row in rows]
    assert max(used) <= ROW
    assert sum(used) > 0.9 * ROW * len(rows)


def test_targets_are_the_inputs_shifted_by_one() -> None:
    """What should come out at a position is the next position's input; an end of text stands before each document."""
    table = TokenTable(np.array([5, 6, 7, 8, 9], np.uint16), np.full(5, 100, np.uint8), np.array([0, 3, 5]))
    rows = Rows(table, pack(table, [0, 1], ROW, seed=0), ROW)
    batch = rows.batch([0])
    assert batch.inputs[0, 1:].tolist() == batch.targets[0, :-1].tolist()
    assert sorted(batch.inputs[0].tolist()) == [0] * (ROW - 5) + [5, 6, 7, 8, 9]
    text = batch.inputs[0].tolist()
    assert text[text.index(5) - 1] == text[text.index(8) - 1] == 0
    # Learnt: five tokens, the end of the first document, the end of the last; not the filling.
    assert batch.weights.sum() == 7


def test_state_is_reset_with_or_without_the_end_of_text() -> None:
    """Even documents begin at the end-of-text id, odd ones after it: a server may open a conversation either way."""
    table = TokenTable(np.array([5, 6, 7, 8], np.uint16), np.full(4, 100, np.uint8), np.array([0, 2, 4]))
    batch = Rows(table, pack(table, [0, 1], ROW, seed=0), ROW).batch([0])
    begins = {batch.inputs[0, position].item() for position in batch.resets[0].nonzero().ravel().tolist()[:2]}
    assert begins == {0, 7}


def test_a_step_is_a_function_of_the_seed_and_its_number() -> None:
    """The same step gives the same rows, whatever was asked for before and however long the run is."""
    one, two = _mixture(num_steps=50), _mixture(num_steps=80)
    one.batch(3)
    assert _same(one.batch(41), two.batch(41))
    assert not _same(one.batch(41), one.batch(42))


def test_every_row_comes_once_before_any_comes_twice() -> None:
    """A source's rows are shuffled anew for each pass over it."""
    table = _table([ROW - 1] * 12)
    rows = Rows(table, pack(table, range(12), ROW, seed=0), ROW)
    data = DataSection(sources=[SourceSection(name="a")], row_tokens=ROW, rows_per_step=4)
    mixture = Mixture({"a": rows}, data, 6, seed=5)
    seen = [row.tolist()[1] for step in range(6) for row in mixture.batch(step).inputs]
    assert len(set(seen[:12])) == len(set(seen[12:])) == 12
    assert seen[:12] != seen[12:]


def test_shares_follow_the_curriculum() -> None:
    """A source whose weight rises from nothing is absent at the beginning and has its share at the end."""
    mixture = _mixture(num_steps=400, weights=([1.0, 0.5, 0.0], [0.0, 0.5, 1.0]), curriculum=200)
    first = [int(mixture.batch(0).inputs[:, 1].max())]
    middle = [int(identity) for step in range(75, 125) for identity in mixture.batch(step).inputs[:, 1]]
    last = [int(mixture.batch(step).inputs[:, 1].min()) for step in range(200, 400)]
    assert max(first) < 1000 <= min(last)
    assert sum(identity >= 1000 for identity in middle) / len(middle) == pytest.approx(0.5, abs=0.1)


def test_vocabularies_above_16_bits_keep_their_ids(tmp_path: Path) -> None:
    """What is saved is what is loaded."""
    table = TokenTable(np.array([70000, 1], np.int32), np.array([100, 25], np.uint8), np.array([0, 2]))
    table.save(tmp_path / "deep" / "t.safetensors")
    loaded = TokenTable.load(tmp_path / "deep" / "t.safetensors")
    assert loaded.ids.tolist() == [70000, 1]
    assert loaded.weights.tolist() == [100, 25]
    assert loaded.num_documents == 1


def _mixture(
    num_steps: int,
    weights: tuple[list[float], list[float]] = ([0.5], [0.5]),
    curriculum: int = 0,
) -> Mixture:
    sources = {}
    for name, first in (("a", 100), ("b", 1000)):
        table = _table([ROW - 1] * 30, first)
        sources[name] = Rows(table, pack(table, range(30), ROW, seed=0), ROW)
    data = DataSection(
        sources=[SourceSection(name="a", weight=weights[0]), SourceSection(name="b", weight=weights[1])],
        row_tokens=ROW,
        rows_per_step=4,
        curriculum_steps=curriculum,
    )
    return Mixture(sources, data, num_steps, seed=5)


def _table(sizes: list[int], first: int = 1) -> TokenTable:
    """Documents of these sizes, each of one id of its own."""
    ids = np.repeat(np.arange(first, first + len(sizes)), sizes).astype(np.uint16)
    return TokenTable(ids, np.full(len(ids), 100, np.uint8), np.cumsum([0, *sizes]))


def _same(one: object, two: object) -> bool:
    return all((getattr(one, name) == getattr(two, name)).all() for name in ("inputs", "targets", "weights", "resets"))


def _text(document: Document) -> str:
    return "".join(piece.text for piece in document)

"""The exported file: what is written is read again, and nothing else is."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.token_chain import extend_digest, root_digest
from server.conversations.history import History, root_of
from server.conversations.ledger import Answer, Conversation, Turn
from server.conversations.portable import FORMAT_VERSION, FileRejected, PortableFile, read, turns_of, write
from server.items import called, returned, said, thought

TEMPLATES = {"world"}
STATE = bytes(range(256)) * 3


def make_log() -> tuple[Conversation, History]:
    """A conversation of another tenant: two turns, a marker between them, every kind of item."""
    root = root_of("ada/origin")
    turns = [
        Turn(
            version=1,
            parent_version=0,
            prompt_ids=[1, 2, 3],
            output_ids=[4],
            chain=extend_digest(root, [1, 2, 3, 4]),
            num_tokens=4,
            finish_reason="stop",
            seed=2**64 - 1,
            created_at=12.5,
            request_id="a" * 32,
            items=[said("user", "Grüß Gott\n"), thought("Hm."), said("assistant", "Yes.")],
            opening="Assistant:",
            hint=" think",
            preamble="Be kind.",
        ),
        Turn(
            version=2,
            parent_version=1,
            prompt_ids=[],
            output_ids=[],
            chain=extend_digest(root, [1, 2, 3, 4]),
            num_tokens=4,
            finish_reason="",
            seed=0,
            created_at=13.0,
            request_id="b" * 32,
            items=[called("call_1", "add", '{"a": 1}'), returned("call_1", "2")],
            num_carried=1,
            answers=[Answer(answer_id="c" * 32, output_ids=[7, 8], opening="Assistant:")],
        ),
        Turn(
            version=3,
            parent_version=2,
            prompt_ids=[5],
            output_ids=[],
            chain=extend_digest(root, [1, 2, 3, 4, 5]),
            num_tokens=5,
            finish_reason="length",
            seed=3,
            created_at=14.0,
            request_id="d" * 32,
        ),
    ]
    head = Conversation(
        conversation_id="ada/origin",
        version=3,
        chain=turns[-1].chain,
        num_tokens=5,
        model="goose",
        fingerprint="f0" * 32,
        template="world",
        created_at=11.0,
        ttl_seconds=60.0,
        metadata={"a": "b"},
    )
    return head, History(root, tuple(turns))


FILE = write(*make_log(), STATE)


def all_of(file: PortableFile, root: bytes) -> list[Turn]:
    """Verify everything."""
    turns = turns_of(file.log, root, vocab_size=256, templates=TEMPLATES)
    file.state()
    return turns


def test_what_was_written_is_read() -> None:
    """Log and state, to the last field."""
    head, history = make_log()
    file = read(FILE)
    assert bytes(file.state() or b"") == STATE
    turns = all_of(file, history.root)
    for turn, original in zip(turns, history.path, strict=True):
        items = [(item.item_id, msgspec.json.decode(item.body)) for item in turn.items]
        assert len(items) == len(original.items)
        assert msgspec.structs.replace(turn, items=[]) == msgspec.structs.replace(original, items=[])
    assert (file.log.id, file.log.metadata, file.log.model) == ("origin", {"a": "b"}, head.model)


def test_equal_items_have_equal_bytes_again() -> None:
    """Their bodies are canonical, so that an export of an import is the export."""
    head, history = make_log()
    turns = all_of(read(FILE), history.root)
    assert write(head, History(history.root, tuple(turns)), STATE) == write(
        head,
        History(history.root, tuple(all_of(read(write(head, History(history.root, tuple(turns)))), history.root))),
        STATE,
    )


def test_another_tenants_history_gets_another_root() -> None:
    """Every chain is computed again from the tokens; nothing else changes."""
    root = root_digest("bob")
    turns = all_of(read(FILE), root)
    assert [turn.chain for turn in turns] == [
        extend_digest(root, [1, 2, 3, 4]),
        extend_digest(root, [1, 2, 3, 4]),
        extend_digest(root, [1, 2, 3, 4, 5]),
    ]
    assert [turn.num_tokens for turn in turns] == [4, 4, 5]


def test_an_empty_conversation_is_one_too() -> None:
    """Without turns, without a state."""
    head, history = make_log()
    file = read(write(head, History(history.root)))
    assert all_of(file, history.root) == []
    assert file.state() is None


@given(place=st.integers(0, len(FILE) - 1), flipped=st.integers(1, 255))
def test_no_byte_can_be_another(place: int, flipped: int) -> None:
    """Wherever it is."""
    damaged = bytearray(FILE)
    damaged[place] ^= flipped
    with pytest.raises(FileRejected):
        all_of(read(bytes(damaged)), root_digest())


@given(end=st.integers(0, len(FILE) - 1))
def test_no_byte_can_be_missing(end: int) -> None:
    """Cut short anywhere."""
    with pytest.raises(FileRejected):
        all_of(read(FILE[:end]), root_digest())


@given(st.binary(min_size=1, max_size=64))
def test_no_byte_can_be_added(rest: bytes) -> None:
    """Behind the state, or behind a log without one."""
    for file in (FILE, write(*make_log())):
        with pytest.raises(FileRejected):
            all_of(read(file + rest), root_digest())


@given(st.binary(max_size=400))
def test_what_is_no_file_is_refused(data: bytes) -> None:
    """Whatever it is."""
    with pytest.raises(FileRejected):
        read(data)


def test_a_damaged_state_leaves_the_log_readable() -> None:
    """Who wants the log alone can have it."""
    file = read(FILE[:-1])
    assert len(turns_of(file.log, root_digest(), vocab_size=256, templates=TEMPLATES)) == 3
    with pytest.raises(FileRejected, match="bytes after its log"):
        file.state()


def test_a_newer_format_is_told_by_its_number() -> None:
    """Not as damage."""
    newer = bytearray(FILE)
    newer[8] = FORMAT_VERSION + 1
    with pytest.raises(FileRejected, match=f"format {FORMAT_VERSION + 1}"):
        read(bytes(newer))


def forged(change: Callable[[dict[str, Any]], object]) -> bytes:
    """A file whose log says something else, under a digest that fits."""
    size = int.from_bytes(FILE[12:20], "little")
    log = msgspec.json.decode(FILE[20 : 20 + size])
    change(log)
    text = msgspec.json.encode(log)
    begin = FILE[:12] + len(text).to_bytes(8, "little") + text
    return begin + hashlib.sha256(begin).digest() + STATE


def turn_with(number: int, **fields: Any) -> Callable[[dict[str, Any]], object]:
    """Change fields of an entry."""
    return lambda log: log["turns"][number].update(fields)


@pytest.mark.parametrize(
    "change",
    [
        turn_with(0, prompt_ids=[1, 2, 9]),
        turn_with(0, prompt_ids=[1, 2], output_ids=[3, 3]),
        turn_with(0, prompt_ids=[1, 2, 256]),
        turn_with(0, prompt_ids=[1, 2, -1]),
        turn_with(0, prompt_ids=[], output_ids=[1, 2, 3, 4]),
        turn_with(0, num_tokens=5),
        turn_with(0, chain="00" * 16),
        turn_with(0, chain="00"),
        turn_with(0, chain="00" * 16 + "\n"),
        turn_with(0, finish_reason=""),
        turn_with(0, finish_reason="abort"),
        turn_with(0, seed=2**64),
        turn_with(0, seed=-1),
        turn_with(0, request_id=""),
        turn_with(0, created_at="now"),
        turn_with(0, color="blue"),
        turn_with(1, finish_reason="stop"),
        turn_with(1, num_carried=3),
        turn_with(1, answers=[{"answer_id": "c", "output_ids": [256]}]),
        lambda log: log["turns"].pop(0),
        lambda log: log["turns"].reverse(),
        lambda log: log["turns"][1]["items"].append(log["turns"][0]["items"][0]),
        lambda log: log["turns"][0]["items"][0]["body"].update(type="image"),
        lambda log: log["turns"][0]["items"][0]["body"].update(role="nobody"),
        lambda log: log["turns"][0]["items"][0]["body"].update(id=""),
        lambda log: log["turns"][0]["items"][0]["body"].update(content="text"),
        lambda log: log["turns"][0]["items"][0].update(body=None),
        lambda log: log.update(root="11" * 16),
        lambda log: log.update(template="unheard of"),
        lambda log: log.update(metadata={"k" * 65: "v"}),
        lambda log: log.update(metadata={str(number): "v" for number in range(17)}),
        lambda log: log.update(fingerprint=""),
        lambda log: log.update(state=None),
        lambda log: log["state"].update(sha256="00" * 32),
        lambda log: log["state"].update(num_bytes=len(STATE) - 1),
        lambda log: log.pop("turns"),
    ],
)
def test_a_log_that_does_not_fit_together_is_refused(change: Callable[[dict[str, Any]], object]) -> None:
    """However well its digest is computed."""
    with pytest.raises(FileRejected):
        all_of(read(forged(change)), root_digest())


def test_an_unchanged_log_under_a_new_digest_is_read() -> None:
    """It is not the forging itself that is refused above."""
    assert len(all_of(read(forged(lambda log: None)), root_digest())) == 3

"""The World tokenizer against known ids, and against the Rust implementation."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyrwkv_tokenizer import RWKVTokenizer

from engine.errors import TokenizerError
from engine.tokenizer import Tokenizer
from engine.tokenizer.world import WorldTokenizer, _vocabulary

RUST = RWKVTokenizer()
LONGEST_TOKEN = 128

# Runs, alphabets that the vocabulary has long tokens for, and joined emoji: where greedy matching has most to decide.
DENSE_TEXT = st.lists(
    st.sampled_from(
        ["\n", " ", "=", "-", "the ", "User", ":", "。", "好的", "的", "é", "👩", "\u200d", "🏽", "ي", "한", "</", "1"]
    ),
    max_size=60,
).map("".join)


@pytest.fixture(scope="module")
def world() -> Tokenizer:
    """The World tokenizer of the published models."""
    return WorldTokenizer()


@pytest.fixture(scope="module")
def vocabulary(world: Tokenizer) -> frozenset[bytes]:
    """The bytes of all tokens."""
    return frozenset(world.token_bytes(i) for i in range(1, 65_530))


@pytest.mark.parametrize(
    ("text", "token_ids"),
    [
        ("\n", [11]),
        ("\n\n", [261]),
        ("User", [24281]),
        (" User", [29956]),
        (":", [59]),
        ("Assistant", [5585, 41693]),
        ("think", [35762]),
        ("<", [61]),
        (">", [63]),
        ("></", [5439]),
        ("✿", [10060]),
        ("\nUser:", [11, 24281, 59]),
        ("", []),
    ],
)
def test_known_ids(world: Tokenizer, text: str, token_ids: list[int]) -> None:
    """The strings that prompts are built from have the ids they had in training."""
    assert world.encode(text) == token_ids


def test_cutting_text_changes_its_ids(world: Tokenizer) -> None:
    """Pieces encode to other ids than the whole, which is why turn borders are rendered in one piece."""
    assert world.encode("Hello\n") + world.encode("\nUser:") == [*world.encode("Hello"), 11, 11, 24281, 59]
    assert world.encode("Hello\n\nUser:") == [*world.encode("Hello"), 261, 24281, 59]
    assert world.encode("。") + world.encode("\n\nUser:") == [10080, 261, 24281, 59]
    assert world.encode("。\n\nUser:") == [28329, 11, 24281, 59]


@given(text=st.text() | DENSE_TEXT)
def test_agrees_with_the_rust_implementation(text: str) -> None:
    """Any text has the ids that the widely used implementation gives it."""
    assert WorldTokenizer().encode(text) == list(RUST.encode(text))


@given(data=st.binary(max_size=200) | DENSE_TEXT.map(str.encode))
def test_takes_the_longest_token_each_time(world: Tokenizer, vocabulary: frozenset[bytes], data: bytes) -> None:
    """At no position would a longer token of the vocabulary have fitted."""
    position = 0
    for token_id in world.encode_bytes(data):
        size = len(world.token_bytes(token_id))
        longer = {data[position : position + more] for more in range(size + 1, LONGEST_TOKEN + 1)}
        assert not (longer - {data[position : position + size]}) & vocabulary
        position += size
    assert position == len(data)


def test_vocabulary_is_complete(world: Tokenizer) -> None:
    """Ids 1 to 65529 are distinct byte strings, single bytes come first, and only the rows above are forbidden."""
    tokens = [world.token_bytes(i) for i in range(1, 65_530)]
    assert len(set(tokens)) == 65_529
    assert tokens[:256] == [bytes([byte]) for byte in range(256)]
    assert max(map(len, tokens)) == LONGEST_TOKEN
    assert world.eos_token_ids == (0,)
    assert world.forbidden_ids == tuple(range(65_530, 65_536))


def test_agrees_with_the_rust_implementation_on_a_book(shared_dir: Path, world: Tokenizer) -> None:
    """A million characters of plays have the ids that the widely used implementation gives them."""
    text = gzip.decompress((shared_dir / "data" / "text" / "tinyshakespeare.txt.gz").read_bytes()).decode()
    assert world.encode(text) == list(RUST.encode(text))


def test_a_changed_vocabulary_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A vocabulary file that is not the published one is an error, not other ids."""
    monkeypatch.setattr("engine.tokenizer.world._VOCABULARY_SHA256", "0" * 64)
    with pytest.raises(TokenizerError, match="not the published World vocabulary"):
        _vocabulary.__wrapped__()


def test_a_missing_vocabulary_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package that carries the vocabulary, the error names it."""
    monkeypatch.setattr("engine.tokenizer.world._PACKAGE", "no-such-package-here")
    with pytest.raises(TokenizerError, match="comes with the package no-such-package-here"):
        _vocabulary.__wrapped__()

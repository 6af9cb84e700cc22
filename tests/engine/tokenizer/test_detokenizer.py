"""Incremental text equals whole text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.tokenizer import Detokenizer, Tokenizer
from engine.tokenizer.bytes import ByteTokenizer
from engine.tokenizer.world import WorldTokenizer

EMOJI = "👩\u200d👩\u200d👧 龘靐齉 🏳️\u200d🌈 é"

# UTF-8 that goes wrong in every place: cut short, too long, surrogates, beyond U+10FFFF, stray continuations.
BROKEN = st.lists(
    st.sampled_from([b"\xf0\x9f", b"\x98\x80", b"\xed\xa0\x80", b"\xf4\x90", b"\xc0\xaf", b"\xe2\x82", b"\xff", b"a"])
    | st.text(max_size=2).map(str.encode)
).map(b"".join)


@given(data=st.data())
def test_any_ids_in_any_cut_equal_the_whole(tokenizer: Tokenizer, data: st.DataObject) -> None:
    """Random ids, pushed in random groups, give the text that decoding them at once gives."""
    groups = data.draw(st.lists(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=4)))
    detokenizer = Detokenizer(tokenizer)
    text = "".join(map(detokenizer.push, groups)) + detokenizer.flush()
    assert tokenizer.decode(token_id for group in groups for token_id in group) == text


@given(data=BROKEN)
def test_broken_utf8_is_replaced_as_in_the_whole(data: bytes) -> None:
    """Bytes that are not UTF-8 become the same U+FFFD one at a time as all at once."""
    detokenizer = Detokenizer(ByteTokenizer())
    text = "".join(detokenizer.push([byte]) for byte in data) + detokenizer.flush()
    assert data.decode("utf-8", "replace") == text


@given(text=st.text())
def test_text_is_never_said_in_part_characters(tokenizer: Tokenizer, text: str) -> None:
    """While the ids of a text arrive one by one, what has been said is always a beginning of that text."""
    detokenizer = Detokenizer(tokenizer)
    said = ""
    for token_id in tokenizer.encode(text):
        said += detokenizer.push([token_id])
        assert text.startswith(said)
    assert said == text
    assert detokenizer.flush() == ""


def test_a_character_waits_for_its_last_byte(tokenizer: Tokenizer) -> None:
    """Emoji and rare characters that span several tokens arrive whole."""
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push([token_id]) for token_id in tokenizer.encode(EMOJI)]
    assert "".join(pieces) == EMOJI
    assert "" in pieces


def test_an_unfinished_character_is_said_as_broken() -> None:
    """A character whose end never comes is one U+FFFD, at the end."""
    detokenizer = Detokenizer(ByteTokenizer())
    assert detokenizer.push("é👍".encode()[:-1]) == "é"
    assert detokenizer.flush() == "\ufffd"


@pytest.mark.parametrize("token_id", [0, 65_533])
def test_ids_without_bytes_say_nothing(token_id: int) -> None:
    """End of text and ids without a meaning do not show, not even inside a character."""
    first, *rest = WorldTokenizer().encode_bytes("👍".encode()[:2])
    detokenizer = Detokenizer(WorldTokenizer())
    said = detokenizer.push([first, token_id, *rest, *WorldTokenizer().encode_bytes("👍".encode()[2:])])
    assert said == "👍"

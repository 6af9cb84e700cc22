"""What holds for every kind of tokenizer."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import TokenizerError
from engine.tokenizer import Tokenizer
from engine.tokenizer.bytes import ByteTokenizer
from engine.tokenizer.world import WorldTokenizer

LOOKS_SPECIAL = "a<|endoftext|>b<|pad|>"


@given(text=st.text())
def test_decode_gives_back_the_text(tokenizer: Tokenizer, text: str) -> None:
    """Encoding and decoding any text gives the same text."""
    assert text == tokenizer.decode(tokenizer.encode(text))


@given(data=st.binary(max_size=64))
def test_encode_bytes_is_exact(tokenizer: Tokenizer, data: bytes) -> None:
    """The bytes of `encode_bytes(data)` are `data`, whole characters or not."""
    assert data == b"".join(map(tokenizer.token_bytes, tokenizer.encode_bytes(data)))


@given(text=st.text())
def test_encode_bytes_agrees_with_encode(tokenizer: Tokenizer, text: str) -> None:
    """Bytes that are text are encoded as that text is."""
    assert tokenizer.encode(text) == tokenizer.encode_bytes(text.encode())


@given(text=st.text())
def test_text_never_makes_an_id_without_bytes(tokenizer: Tokenizer, text: str) -> None:
    """No text, and nothing that looks like a special token, becomes an id without bytes."""
    assert all(tokenizer.token_bytes(i) for i in tokenizer.encode(text + LOOKS_SPECIAL))


def test_special_token_text_is_text(tokenizer: Tokenizer) -> None:
    """The names of special tokens survive encoding and decoding as the text they are."""
    assert tokenizer.decode(tokenizer.encode(LOOKS_SPECIAL)) == LOOKS_SPECIAL


def test_lone_surrogates_are_refused(tokenizer: Tokenizer) -> None:
    """Text that has no bytes raises UnicodeEncodeError."""
    with pytest.raises(UnicodeEncodeError):
        tokenizer.encode("a\ud800b")


def test_ids_without_bytes_are_forbidden_or_end_of_text(tokenizer: Tokenizer) -> None:
    """Every id either has bytes, is forbidden, or ends the text, and only one of these."""
    with_bytes = {i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i)}
    kinds = [with_bytes, set(tokenizer.forbidden_ids), set(tokenizer.eos_token_ids)]
    assert set.union(*kinds) == set(range(tokenizer.vocab_size))
    assert sum(map(len, kinds)) == tokenizer.vocab_size


def test_no_two_tokens_share_a_name(tokenizer: Tokenizer) -> None:
    """Log-probabilities are keyed by token text, so the texts of all ids differ."""
    names = {tokenizer.token_text(i) for i in range(tokenizer.vocab_size)}
    assert len(names) == tokenizer.vocab_size


@pytest.mark.parametrize("token_id", [-1, 1 << 20])
def test_ids_outside_the_vocabulary_are_refused(tokenizer: Tokenizer, token_id: int) -> None:
    """An id that no row of the head has raises IndexError instead of standing for another one."""
    with pytest.raises(IndexError):
        tokenizer.token_bytes(token_id)


def test_a_byte_is_named_as_openai_does() -> None:
    """A token that is not whole characters is named by its bytes."""
    assert ByteTokenizer().token_text(0xF0) == r"bytes:\xf0"
    assert ByteTokenizer().token_text(ord("\\")) == "\\"


def test_ids_without_text_are_named_by_number() -> None:
    """End of text has its own name, ids without a meaning their number."""
    world = WorldTokenizer()
    assert world.token_text(0) == "<|endoftext|>"
    assert world.token_text(65_535) == "id:65535"


def test_encode_special_maps_end_of_text(byte_level: Tokenizer) -> None:
    """Where the model has an end of text, its name stands for its id; everything else is text."""
    for tokenizer in (WorldTokenizer(), byte_level):
        hello = tokenizer.encode("hello")
        assert tokenizer.encode_special("<|endoftext|>") == [0]
        assert tokenizer.encode_special("hello<|endoftext|>hello") == [*hello, 0, *hello]
        assert tokenizer.encode_special("hello") == hello
        assert tokenizer.encode_special("<|pad|>") == tokenizer.encode("<|pad|>")


def test_encode_special_without_end_of_text() -> None:
    """A model without end of text has only text."""
    assert ByteTokenizer().encode_special("<|endoftext|>") == list(b"<|endoftext|>")


def test_bytes_have_no_end_of_text() -> None:
    """Every one of the 256 ids is a byte."""
    tokenizer = ByteTokenizer()
    assert tokenizer.eos_token_ids == ()
    assert tokenizer.forbidden_ids == ()
    assert tokenizer.encode('"in') == [34, 105, 110]


def test_rows_beyond_the_vocabulary_are_forbidden() -> None:
    """A head may be larger than the vocabulary; what is left over is never sampled."""
    assert ByteTokenizer(260).forbidden_ids == (256, 257, 258, 259)


def test_more_tokens_than_rows_is_an_error() -> None:
    """A vocabulary that does not fit the head is refused, with both numbers."""
    with pytest.raises(TokenizerError, match=r"ids up to 255, .* only 255 rows"):
        ByteTokenizer(255)

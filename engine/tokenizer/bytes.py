"""The byte vocabulary: token id = byte. Made for tiny models, and for tests that need no vocabulary at all."""

from __future__ import annotations

from engine.tokenizer.tokenizer import Tokenizer

NUM_BYTES = 256


class ByteTokenizer(Tokenizer):
    """One token a byte. Has no end of text."""

    def __init__(self, vocab_size: int = NUM_BYTES) -> None:
        super().__init__("bytes", [bytes([byte]) for byte in range(NUM_BYTES)], vocab_size)

    def encode(self, text: str) -> list[int]:
        """Return the UTF-8 bytes of `text`."""
        return list(text.encode())

    def encode_bytes(self, data: bytes) -> list[int]:
        """Return `data`, byte by byte."""
        return list(data)

"""A small vocabulary whose tokens overlap in every way that matters to stop strings."""

from __future__ import annotations

from collections.abc import Sequence


class StubVocabulary:
    """Single bytes of a small alphabet, pieces of several bytes, and tokens without bytes.

    `spellable` limits what `encode_bytes` can do, as vocabularies do that have no token for some bytes.
    """

    def __init__(self, tokens: Sequence[bytes], spellable: Sequence[bytes] | None = None) -> None:
        self.tokens = list(tokens)
        pieces = self.tokens if spellable is None else spellable
        self._pieces = sorted(((p, self.tokens.index(p)) for p in pieces if p), key=lambda piece: -len(piece[0]))

    def token_bytes(self, token_id: int) -> bytes:
        """Return the token's bytes."""
        return self.tokens[token_id]

    def encode_bytes(self, data: bytes) -> list[int]:
        """Return the greedy encoding; raises `ValueError` where there is none."""
        token_ids = []
        while data:
            for piece, token_id in self._pieces:
                if data.startswith(piece):
                    token_ids.append(token_id)
                    data = data[len(piece) :]
                    break
            else:
                raise ValueError("these bytes have no tokens")
        return token_ids

    def decode(self, token_ids: Sequence[int]) -> bytes:
        """Return the text of `token_ids`."""
        return b"".join(self.tokens[token_id] for token_id in token_ids)


LETTERS = StubVocabulary([b"a", b"b", b"c", b"ab", b"ba", b"abc", b"cab", b"aab", b"bcb", b"", b"bb", b"ca"])
"""Every stop string over {a, b, c} can begin and end inside, at and across its tokens."""

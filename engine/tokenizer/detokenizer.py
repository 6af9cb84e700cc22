"""Ids to text while they arrive: a character is said when it is whole, and only then."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from engine.tokenizer.tokenizer import Tokenizer


class Detokenizer:
    """The text of one growing sequence of token ids.

    What `push` returned so far, followed by `flush`, is what `Tokenizer.decode` makes of all the ids, however they
    were cut. Knows nothing of stop strings: the engine delivers no token that could still become part of one.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._begun = b""  # the beginning of a character

    def push(self, token_ids: Sequence[int]) -> str:
        """Return the text that `token_ids` complete; the beginning of a character waits for its end."""
        if len(token_ids) == 1 and not self._begun and (whole := self._tokenizer.whole_text(token_ids[0])) is not None:
            return whole
        data = self._begun + b"".join(map(self._tokenizer.token_bytes, token_ids))
        text, num_decoded = codecs.utf_8_decode(data, "replace", False)
        self._begun = data[num_decoded:]
        return text

    def flush(self) -> str:
        """Return what is left when no more ids come: U+FFFD if a character was never completed, else nothing."""
        rest, self._begun = self._begun, b""
        return rest.decode("utf-8", "replace")

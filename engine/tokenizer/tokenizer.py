"""What every tokenizer can do, whatever its vocabulary: a table of byte strings and two ways to encode."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import cached_property

from engine.errors import TokenizerError

END_OF_TEXT = "<|endoftext|>"


class Tokenizer(ABC):
    """Text to token ids, token ids to bytes. Immutable once made, and safe to share between threads.

    A token is a byte string, not a piece of text: a character may be spread over several tokens. For whole ids use
    `decode`, for ids that arrive one by one a `Detokenizer`.
    """

    def __init__(
        self,
        name: str,
        tokens: Sequence[bytes],
        vocab_size: int,
        eos_token_ids: tuple[int, ...] = (),
        eos_token: str = END_OF_TEXT,
    ) -> None:
        """Give token `i` the bytes `tokens[i]`, and none to ids from `len(tokens)` up to `vocab_size`.

        `vocab_size` is the number of rows of the model's head. Raises `TokenizerError` if the tokens need more.
        """
        if len(tokens) > vocab_size:
            raise TokenizerError(
                f"tokenizer {name} has ids up to {len(tokens) - 1}, but the model has only {vocab_size} rows for them"
            )
        self.name = name
        self.vocab_size = vocab_size
        self.eos_token = eos_token  # how end of text is written where it must be written; see encode_special
        self.eos_token_ids = eos_token_ids
        self._tokens = (*tokens, *[b""] * (vocab_size - len(tokens)))
        self._whole_texts: dict[int, str | None] = {}  # of tokens that were asked for

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`. What looks like a special token in it is text like any other.

        Raises `UnicodeEncodeError` for lone surrogates, which have no bytes.
        """

    @abstractmethod
    def encode_bytes(self, data: bytes) -> list[int]:
        """Return ids whose bytes are exactly `data`, which need not be whole characters."""

    def encode_special(self, text: str) -> list[int]:
        """Return the ids of `text` in which `eos_token` stands for end of text, where the model has one."""
        if not self.eos_token_ids:
            return self.encode(text)
        token_ids: list[int] = []
        for document in text.split(self.eos_token):
            token_ids += [*self.encode(document), self.eos_token_ids[0]]
        return token_ids[:-1]

    def token_bytes(self, token_id: int) -> bytes:
        """Return what the token adds to the text; nothing for end of text and for ids without a meaning.

        Raises `IndexError` outside `[0, vocab_size)`.
        """
        if token_id < 0:
            raise IndexError(f"negative token id {token_id}")
        return self._tokens[token_id]

    def whole_text(self, token_id: int) -> str | None:
        """Return what the token adds to a text that ends with a whole character, or None if it is not whole characters.

        Raises `IndexError` outside `[0, vocab_size)`.
        """
        try:
            return self._whole_texts[token_id]
        except KeyError:
            text = self._whole_texts[token_id] = _decoded(self.token_bytes(token_id))
            return text

    def decode(self, token_ids: Iterable[int]) -> str:
        """Return the text of a whole sequence of ids; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(map(self.token_bytes, token_ids)).decode("utf-8", "replace")

    def token_text(self, token_id: int) -> str:
        r"""Return the token's name in log-probabilities: its text, and no two tokens of a vocabulary share a name.

        A token that is not whole characters is called `bytes:\xf0\x9f`, as vLLM and OpenAI do; one without bytes, or
        with the bytes of a lower id, `id:65533`.
        """
        if token_id in self.eos_token_ids:
            return self.eos_token
        data = self.token_bytes(token_id)
        if not data or token_id in self._repeated_ids:
            return f"id:{token_id}"
        text = self.whole_text(token_id)
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data) if text is None else text

    @cached_property
    def forbidden_ids(self) -> tuple[int, ...]:
        """Ids that have no bytes and do not end the text: a model must never sample one. Ascending."""
        return tuple(i for i, data in enumerate(self._tokens) if not data and i not in self.eos_token_ids)

    @cached_property
    def _repeated_ids(self) -> frozenset[int]:
        first_ids: dict[bytes, int] = {}
        for i, data in enumerate(self._tokens):
            first_ids.setdefault(data, i)
        return frozenset(i for i, data in enumerate(self._tokens) if first_ids[data] != i)


def _decoded(data: bytes) -> str | None:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None

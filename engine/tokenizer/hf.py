"""Hugging Face tokenizers: a `tokenizer.json`, run by the `tokenizers` library.

Only tokenizers that lose nothing are taken, because a conversation here *is* its token history: every byte has a
token of its own, and encoding then decoding gives the text back. Byte-level BPE (GPT-2, the 20B tokenizer of the Pile
models, what `training` makes) and BPE with byte fallback are of that kind; anything else is refused when it is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import tokenizers

from engine.errors import TokenizerError
from engine.tokenizer.tokenizer import END_OF_TEXT, Tokenizer

FILE_NAME = "tokenizer.json"
CONFIG_NAME = "tokenizer_config.json"  # beside it, optional; says which token ends the text

_SPACE_MARK = "▁"  # how SentencePiece writes a space in the name of a token
_PROBE = f'A b  c\n\n\td"é 好的。👍🏽{_SPACE_MARK}x'
_BYTES_IN_UTF8 = frozenset(range(256)) - {0xC0, 0xC1, *range(0xF5, 0x100)}
_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json`. Its special tokens are never made from text, and have no bytes.

    End of text is the `eos_token` of a `tokenizer_config.json` beside the file, else `<|endoftext|>` if it is special.
    """

    def __init__(self, path: Path, vocab_size: int) -> None:
        self._codec, settings = _open(path)
        specials = {i: token.content for i, token in self._codec.get_added_tokens_decoder().items() if token.special}
        eos_token = _eos_token(path.with_name(CONFIG_NAME), specials)
        eos_ids = tuple(i for i, content in specials.items() if content == eos_token)
        self._marks_spaces = _marks_spaces(settings)
        super().__init__(str(path), _token_table(self._codec, settings), vocab_size, eos_ids, eos_token)
        self._byte_ids = {data[0]: i for i, data in reversed(tuple(enumerate(self._tokens))) if len(data) == 1}
        self._refuse_lossy()

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`."""
        text.encode()  # raises for lone surrogates, of which the library only says that they are no str
        if not self._marks_spaces:
            return self._encode_part(text)
        first, *others = map(self._encode_part, text.split(_SPACE_MARK))
        for part in others:
            first += [*self._spell(_SPACE_MARK.encode()), *part]  # a mark that is meant would come back as a space
        return first

    def encode_bytes(self, data: bytes) -> list[int]:
        """Return the ids of `data` as text if it is text and comes back unchanged, else one token a byte."""
        try:
            token_ids = self.encode(data.decode())
        except UnicodeDecodeError:
            token_ids = []
        if b"".join(map(self.token_bytes, token_ids)) == data:
            return token_ids
        return self._spell(data)

    def _encode_part(self, text: str) -> list[int]:
        token_ids: list[int] = self._codec.encode(text, add_special_tokens=False).ids
        return token_ids

    def _spell(self, data: bytes) -> list[int]:
        return [self._byte_ids[byte] for byte in data]

    def _refuse_lossy(self) -> None:
        missing = sorted(_BYTES_IN_UTF8 - self._byte_ids.keys())
        if missing:
            some = ", ".join(f"0x{byte:02x}" for byte in missing[:8])
            raise TokenizerError(
                f"tokenizer {self.name} cannot write every text: {len(missing)} bytes have no token ({some}, ...). "
                "A byte-level BPE has them if it was trained with initial_alphabet=ByteLevel.alphabet()"
            )
        returned = self.decode(self.encode(_PROBE))
        if returned != _PROBE:
            raise TokenizerError(f"tokenizer {self.name} changes text: {_PROBE!r} comes back as {returned!r}")


def _open(path: Path) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """Return the tokenizer and its settings as JSON, without those that would change single texts."""
    try:
        data = path.read_bytes()
        codec = tokenizers.Tokenizer.from_buffer(data)
        settings = msgspec.json.decode(data, type=dict[str, Any])
    except Exception as error:  # the library has no exception class of its own
        raise TokenizerError(f"cannot read tokenizer {path}: {error}") from error
    codec.no_padding()
    codec.no_truncation()
    codec.encode_special_tokens = True  # as text, that is
    return codec, settings


def _eos_token(config_path: Path, specials: Mapping[int, str]) -> str:
    """Return how end of text is written; `END_OF_TEXT` also where the vocabulary has no such token."""
    if not config_path.is_file():
        return END_OF_TEXT
    try:
        config = msgspec.json.decode(config_path.read_bytes(), type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise TokenizerError(f"cannot read {config_path}: {error}") from error
    token = config.get("eos_token")
    content = token.get("content") if isinstance(token, dict) else token
    if content is None:
        return END_OF_TEXT
    if content not in specials.values():
        raise TokenizerError(f"{config_path} names {content!r} as eos_token, which is not a special token beside it")
    return str(content)


def _token_table(codec: tokenizers.Tokenizer, settings: dict[str, Any]) -> list[bytes]:
    """Return the bytes of every token by id; special tokens and gaps have none."""
    spell = _spelling(settings)
    added = codec.get_added_tokens_decoder()
    vocabulary = codec.get_vocab(with_added_tokens=True)
    tokens = [b""] * (max(vocabulary.values(), default=-1) + 1)
    for token, token_id in vocabulary.items():
        if token_id not in added:
            tokens[token_id] = spell(token)
        elif not added[token_id].special:
            tokens[token_id] = token.encode()
    return tokens


def _spelling(settings: dict[str, Any]) -> Callable[[str], bytes]:
    """Return what turns the name of a token in this vocabulary into its bytes."""
    if _is_byte_level(settings):
        return _spell_byte_level
    space = _SPACE_MARK if _marks_spaces(settings) else " "
    return lambda token: _spell_with_fallback(token, space)


def _is_byte_level(settings: dict[str, Any]) -> bool:
    return any("ByteLevel" in _component_types(settings.get(part)) for part in ("decoder", "pre_tokenizer"))


def _marks_spaces(settings: dict[str, Any]) -> bool:
    return not _is_byte_level(settings) and not {"Metaspace", "Replace"}.isdisjoint(
        _component_types(settings.get("decoder"))
    )


def _component_types(component: dict[str, Any] | None) -> Iterator[str]:
    """Yield the type of a component of a `tokenizer.json`, and of what a sequence of them holds."""
    if component:
        yield component["type"]
        for part in component.get("decoders") or component.get("pretokenizers") or ():
            yield from _component_types(part)


def _byte_alphabet() -> dict[str, int]:
    """Return GPT-2's printable stand-in for every byte: itself where it prints, else U+0100 and on, in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in printable)
    return alphabet | {chr(0x100 + rank): byte for rank, byte in enumerate(others)}


_BYTE_ALPHABET = _byte_alphabet()


def _spell_byte_level(token: str) -> bytes:
    try:
        return bytes(_BYTE_ALPHABET[char] for char in token)
    except KeyError:
        return token.encode()  # as the library's own decoder does


def _spell_with_fallback(token: str, space: str) -> bytes:
    byte = _BYTE_TOKEN.fullmatch(token)
    return bytes.fromhex(byte[1]) if byte else token.replace(space, " ").encode()

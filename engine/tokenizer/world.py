"""The RWKV World vocabulary: 65,529 byte strings, and always the longest one that fits next.

Not byte-pair encoding: there are no merges and no text is split beforehand. The vocabulary holds every single byte,
so every byte string can be encoded, and exactly. Id 0 is end of text; the ids above the last token have no meaning.

The vocabulary itself (`rwkv_vocab_v20230424.txt`, Apache-2.0) comes with the `pyrwkv-tokenizer` package, of which
nothing else is used: its decoder aborts on ids that end inside a character.
"""

from __future__ import annotations

import ast
import hashlib
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from typing import Any

from engine.errors import TokenizerError
from engine.tokenizer.tokenizer import Tokenizer

NUM_TOKENS = 65_530  # end of text included
NUM_ROWS = 65_536  # of the heads of the published models

_PACKAGE = "pyrwkv-tokenizer"
_VOCABULARY_FILE = "pyrwkv_tokenizer/rwkv_vocab_v20230424.txt"
_VOCABULARY_SHA256 = "e6dee3d4e31b4d5c40ac99508ac6c701ceef4bed681bf2167ce9a908552bca89"

_END_OF_TEXT_ID = 0
_TOKEN = -1  # the key, beside the bytes 0..255, under which a trie node keeps the token that ends there

_Node = dict[int, Any]  # the next node under each byte that can follow, a token id under _TOKEN


class WorldTokenizer(Tokenizer):
    """Greedy longest match in a byte trie."""

    def __init__(self, vocab_size: int = NUM_ROWS) -> None:
        super().__init__("world", _vocabulary(), vocab_size, eos_token_ids=(_END_OF_TEXT_ID,))

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`."""
        return self.encode_bytes(text.encode())

    def encode_bytes(self, data: bytes) -> list[int]:
        """Return the ids of `data`."""
        root, num_bytes = _trie(), len(data)
        token_ids: list[int] = []
        start = 0
        while start < num_bytes:
            node = root[data[start]]
            token_id = node[_TOKEN]
            start = position = start + 1
            while position < num_bytes:
                node = node.get(data[position])
                if node is None:
                    break
                position += 1
                if _TOKEN in node:
                    token_id = node[_TOKEN]
                    start = position
            token_ids.append(token_id)
        return token_ids


@cache
def _trie() -> _Node:
    root: _Node = {}
    for token_id, token in enumerate(_vocabulary()):
        if token:
            node = root
            for byte in token:
                node = node.setdefault(byte, {})
            node[_TOKEN] = token_id
    return root


@cache
def _vocabulary() -> tuple[bytes, ...]:
    """Return the bytes of every token, by id; raises `TokenizerError` unless the file is the published one."""
    try:
        path = distribution(_PACKAGE).locate_file(_VOCABULARY_FILE)
        data = path.read_bytes()  # type: ignore[attr-defined]  # typed as a bare SimplePath; is a Path
    except (PackageNotFoundError, OSError) as error:
        raise TokenizerError(f"the World vocabulary comes with the package {_PACKAGE}, which is not there") from error
    if hashlib.sha256(data).hexdigest() != _VOCABULARY_SHA256:
        raise TokenizerError(f"{path} is not the published World vocabulary: its SHA-256 differs")
    tokens = [b""] * NUM_TOKENS
    for line in data.decode().removesuffix("\n").split("\n"):
        token_id, rest = line.split(" ", 1)
        literal, _num_bytes = rest.rsplit(" ", 1)
        tokens[int(token_id)] = _literal_bytes(literal)
    return tuple(tokens)


def _literal_bytes(literal: str) -> bytes:
    """Return the value of a Python `str` or `bytes` literal, a `str` as UTF-8."""
    if literal[0] in "'\"" and "\\" not in literal:
        return literal[1:-1].encode()  # most are this simple, and ast.literal_eval takes 10 times as long
    value = ast.literal_eval(literal)
    return value.encode() if isinstance(value, str) else bytes(value)

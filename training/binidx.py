"""RWKV-LM's `.bin`/`.idx` pairs, which hold documents as token ids (Megatron's MMapIndexedDataset, version 1).

The `.idx`: magic, u64 version, u8 type of the ids, u64 number of sequences, u64 length of the document table, then i32
sizes in ids, i64 offsets into the `.bin` in bytes, and the document table (i64): the sequences where documents begin.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.data import END_OF_TEXT_ID, TokenTable

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_TYPES: dict[int, type[np.integer[Any]]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    8: np.uint16,
}


class BinidxError(Exception):
    """A pair of files that is not what it should be."""


def read_binidx(path: Path) -> TokenTable:
    """Return the documents of a pair, every token learnt; an end-of-text id that ends one is dropped.

    `path` names the `.bin`. Raises `BinidxError`.
    """
    index = path.with_suffix(".idx").read_bytes()
    if len(index) < _HEADER.size or index[:9] != _MAGIC:
        raise BinidxError(f"{path.with_suffix('.idx')} is no index of this kind: it does not begin with {_MAGIC!r}")
    _, version, code, num_sequences, num_borders = _HEADER.unpack_from(index)
    if version != 1 or code not in _TYPES:
        raise BinidxError(
            f"{path.with_suffix('.idx')} has version {version} and type {code}; known: 1 and {sorted(_TYPES)}"
        )
    sizes_at = _HEADER.size
    offsets_at = sizes_at + 4 * num_sequences
    borders_at = offsets_at + 8 * num_sequences
    if len(index) < borders_at + 8 * num_borders:
        raise BinidxError(f"{path.with_suffix('.idx')} is cut off")
    sizes = np.frombuffer(index, np.int32, num_sequences, sizes_at)
    offsets = np.frombuffer(index, np.int64, num_sequences, offsets_at)
    tokens = np.memmap(path, dtype=_TYPES[code], mode="r")
    begins = offsets // tokens.itemsize
    if num_sequences and int((begins + sizes).max()) > len(tokens):
        raise BinidxError(f"{path} is shorter than its index says")
    documents = [tokens[begin : begin + size] for begin, size in zip(begins.tolist(), sizes.tolist(), strict=True)]
    documents = [ids[:-1] if len(ids) and ids[-1] == END_OF_TEXT_ID else ids for ids in documents]
    dtype = np.uint16 if _TYPES[code] in (np.uint8, np.uint16) else np.int32
    flat: NDArray[np.integer[Any]] = np.concatenate([np.zeros(0, dtype), *documents]).astype(dtype)
    ends = np.cumsum([0, *map(len, documents)], dtype=np.int64)
    return TokenTable(flat, np.full(len(flat), 100, np.uint8), ends)

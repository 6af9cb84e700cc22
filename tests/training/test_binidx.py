from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from training.binidx import BinidxError, read_binidx


def _write(path: Path, documents: list[list[int]], dtype: type[np.generic] = np.uint16, code: int = 8) -> Path:
    """A pair of files as RWKV-LM's tools write it."""
    path.write_bytes(np.concatenate([np.asarray(ids, dtype) for ids in documents]).tobytes())
    sizes = np.asarray([len(ids) for ids in documents], np.int32)
    offsets = np.cumsum([0, *sizes[:-1]]).astype(np.int64) * np.dtype(dtype).itemsize
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(documents), len(documents) + 1)
    borders = np.arange(len(documents) + 1, dtype=np.int64)
    path.with_suffix(".idx").write_bytes(header + sizes.tobytes() + offsets.tobytes() + borders.tobytes())
    return path


@pytest.mark.parametrize(("dtype", "code"), [(np.uint16, 8), (np.int32, 4)])
def test_documents_come_back(tmp_path: Path, dtype: type[np.generic], code: int) -> None:
    """The ids of every document, without the end of text that closes it: rows have their own."""
    table = read_binidx(_write(tmp_path / "set.bin", [[5, 6, 0], [7], [8, 9, 10, 0]], dtype, code))
    assert table.ids.tolist() == [5, 6, 7, 8, 9, 10]
    assert table.offsets.tolist() == [0, 2, 3, 6]
    assert set(table.weights.tolist()) == {100}


def test_another_file_is_refused(tmp_path: Path) -> None:
    """The error names the file."""
    path = _write(tmp_path / "set.bin", [[1]])
    path.with_suffix(".idx").write_bytes(b"something else entirely, and long enough")
    with pytest.raises(BinidxError, match=r"set\.idx is no index"):
        read_binidx(path)


@pytest.mark.parametrize(("name", "message"), [("set.idx", "cut off"), ("set.bin", "shorter than its index")])
def test_files_that_end_early_are_refused(tmp_path: Path, name: str, message: str) -> None:
    """Neither an index nor ids may be missing at the end."""
    path = _write(tmp_path / "set.bin", [[1, 2, 3], [4, 5]])
    cut = tmp_path / name
    cut.write_bytes(cut.read_bytes()[:-4])
    with pytest.raises(BinidxError, match=message):
        read_binidx(path)

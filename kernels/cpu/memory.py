"""Memory for weights, on large pages where the system has them.

A step of decoding reads all weights once. With pages of 4 KB a core then waits for address translation: two cores read
26 GB/s where they read 33 from pages of 2 MB (docs/experiments.md).
"""

from __future__ import annotations

import mmap

import torch

_PAGE = 2 << 20
_SLAB_BYTES = 64 << 20  # what is not used of it costs addresses only
_ALIGNMENT = 64


class Slabs:
    """Hands out pieces of large blocks; a block lives as long as one of its pieces."""

    def __init__(self) -> None:
        self._slab = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def take(self, num_bytes: int) -> torch.Tensor:
        """Return `uint8[num_bytes]`, 64-byte aligned, its contents undefined."""
        if self._used + num_bytes > len(self._slab):
            self._slab, self._used = _new_slab(max(num_bytes, _SLAB_BYTES)), 0
        piece = self._slab[self._used : self._used + num_bytes]
        self._used += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        return piece


def _new_slab(num_bytes: int) -> torch.Tensor:
    """Return at least so many bytes that begin at a large page's beginning."""
    mapping = mmap.mmap(-1, (-(-num_bytes // _PAGE) + 1) * _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        mapping.madvise(mmap.MADV_HUGEPAGE)
    slab = torch.frombuffer(mapping, dtype=torch.uint8)
    return slab[-slab.data_ptr() % _PAGE :]

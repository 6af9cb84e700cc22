"""Pieces of large blocks: apart from each other, aligned, and alive for as long as somebody holds one."""

from __future__ import annotations

import gc

import torch

from kernels.cpu.memory import Slabs

LARGE = 100 << 20  # more than a block


def test_pieces_are_aligned_and_apart() -> None:
    """Whatever is written into one piece, the others keep what they had."""
    slabs = Slabs()
    sizes = [1, 64, 65, 4096, 3 << 20, LARGE, 7, 40 << 20, 40 << 20]
    pieces = [slabs.take(size) for size in sizes]
    for number, piece in enumerate(pieces):
        piece.fill_(number)
    for number, (size, piece) in enumerate(zip(sizes, pieces, strict=True)):
        assert piece.dtype == torch.uint8
        assert piece.shape == (size,)
        assert piece.data_ptr() % 64 == 0
        assert bool((piece == number).all())


def test_a_piece_outlives_its_block_and_whoever_made_it() -> None:
    """Nothing but the piece itself is needed to keep its bytes."""
    slabs = Slabs()
    piece = slabs.take(1 << 20).fill_(7)
    slabs.take(LARGE)  # a new block: the old one is held by the piece alone
    del slabs
    gc.collect()
    assert bool((piece == 7).all())

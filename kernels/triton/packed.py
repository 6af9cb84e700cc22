"""Large matrices as products read them, and in which order their inputs are summed.

Weights are packed in panels of `PANEL` outputs, each a row of tiles `[PANEL, tile_k]` along the inputs, so that a
program reads memory in its order. Int8 ones (`int8.py`) have a tile more behind each panel, which begins with the
panel's scales.

Which inputs are summed in which order depends on the matrix alone: `K` is cut into `split` spans, each summed from its
front, and the spans' sums are added in order.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl

from kernels.triton import int8

PANEL = 64  # outputs, the tensor cores' unit
TILE_BYTES = 128  # of an output in a tile
MAX_BLOCK_K = 128  # inputs at once
PROGRAMS_WANTED = 128  # about as many as a data centre card has processors; a constant, so that bits are no card's

TRITON_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@dataclass(frozen=True, slots=True)
class Plan:
    """How a matrix `[O, K]` is stored and summed. A function of the matrix, never of the rows."""

    tile_k: int
    split: int


@lru_cache
def plan(out_features: int, in_features: int, itemsize: int, is_whole: bool = False) -> Plan:
    """Return the plan: tiles of `TILE_BYTES` an output, and one span or so many that the processors have work.

    Raises `ValueError` where `in_features` is no multiple of 16, or of 64 beside int8: such a matrix is not for these
    kernels.
    """
    least = int8.LEAST_TILE_K if itemsize == 1 else 16
    if in_features % least:
        raise ValueError(f"in_features must be a multiple of {least}, not {in_features}")
    tile_k = TILE_BYTES // itemsize
    while in_features % tile_k:
        tile_k //= 2
    step = min(2 * tile_k, MAX_BLOCK_K)
    split = 1
    while (
        not is_whole
        and split < 8
        and split * triton.cdiv(out_features, PANEL) < PROGRAMS_WANTED
        and in_features % (2 * split * step) == 0
        and in_features // (2 * split) >= 256
    ):
        split *= 2
    return Plan(tile_k, split)


def can_pack(weight: torch.Tensor) -> bool:
    """Say whether a matrix `[O, K]` can be stored so."""
    return weight.dtype in TRITON_DTYPES and weight.shape[1] % 16 == 0


def is_packed(weight: torch.Tensor) -> bool:
    """Say whether `pack` made this."""
    return weight.ndim == 4


def pack(weight: torch.Tensor) -> torch.Tensor:
    """Return `weight[O, K]` as `[panels, tiles, PANEL, tile_k]`, outputs padded with zeros."""
    outputs, K = weight.shape
    tile_k = plan(outputs, K, weight.element_size()).tile_k
    panels, tiles = triton.cdiv(outputs, PANEL), K // tile_k
    padded = weight.new_zeros(panels * PANEL, K)
    padded[:outputs] = weight
    return padded.view(panels, PANEL, tiles, tile_k).transpose(1, 2).contiguous()


def pack_int8(weight: torch.Tensor) -> torch.Tensor:
    """Return `weight[O, K]` quantised, as `pack` does but in words, and behind each panel a tile with its scales."""
    quantised, scales = int8.quantise(weight)
    tiles = int8.interleave(pack(quantised))
    of_panels = scales.new_zeros(len(tiles), PANEL)
    of_panels.view(-1)[: len(scales)] = scales
    last = tiles.new_zeros(len(tiles), *tiles.shape[2:])
    last.flatten(1)[:, : PANEL * scales.itemsize] = of_panels.view(torch.int8)
    return torch.cat([tiles, last[:, None]], dim=1)


def unpack(weight: torch.Tensor, out_features: int) -> torch.Tensor:
    """Return the `weight[O, K]` that `pack` was given; not for int8."""
    return weight.transpose(1, 2).reshape(len(weight) * PANEL, -1)[:out_features]


def plain(weight: torch.Tensor, out_features: int) -> torch.Tensor:
    """Return the matrix `[O, K]`, packed or not."""
    return unpack(weight, out_features) if is_packed(weight) else weight


def in_words(weight: torch.Tensor) -> torch.Tensor:
    """Return packed weights as the kernels take them: int8 ones in words."""
    return weight.view(torch.int32) if weight.dtype == torch.int8 else weight

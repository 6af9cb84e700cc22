"""All projections of a time mixing that read the mixes, in one launch, and the second halves of the low-rank ones in another.

The first matrix is `[receptance; key; value; decay; rate; gate; value mix]`, the low-rank ones being their `down`s.
Each part begins at a multiple of `PART`, so that a program's outputs belong to one of them. The second is the `up`s
side by side along the inputs, padded alike. Sums have one order for each output, whatever the batch (`linear.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels.triton.linear import TRITON_DTYPES, as_operand, plan, prefetch_weights, tile, weighted_sums
from kernels.triton.overlap import let_successor_begin, wait_for_inputs

PART = 128  # a part of the first matrix begins at a multiple of it
BLOCK_UP = 64  # outputs a program of the second launch has
MAX_ROWS_UP = 64  # and rows


@triton.jit(do_not_specialize=["T"])
def project_kernel(
    mixes, weight, rkv, hidden, T,
    C: tl.constexpr, WIDE: tl.constexpr, DECAY: tl.constexpr, RATE: tl.constexpr, GATE: tl.constexpr,
    OUTPUTS: tl.constexpr, DTYPE: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
    IS_READ_ONCE: tl.constexpr,
):  # fmt: skip
    """Program (outputs, rows). `mixes[6, T, C]` are r, w, k, v, a, g; WIDE is C padded, DECAY, RATE, GATE are ranks.

    Writes `rkv[3, T, C]`, and `hidden[T, OUTPUTS - 3 WIDE]` float32 after its activations.
    """
    let_successor_begin()
    first = tl.program_id(0) * BLOCK_O
    o = first + tl.arange(0, BLOCK_O)
    t = tl.program_id(1).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    k = tl.arange(0, BLOCK_K)
    if IS_READ_ONCE:
        prefetch_weights(weight, first, OUTPUTS, BLOCK_O, C, C)
    narrow = first - 3 * WIDE
    is_decay = (narrow >= 0) & (narrow < DECAY)
    is_rate = (narrow >= DECAY) & (narrow < DECAY + RATE)
    is_gate = (narrow >= DECAY + RATE) & (narrow < DECAY + RATE + GATE)
    plane = tl.where(first < WIDE, 0, tl.where(first < 2 * WIDE, 2, 3))
    plane = tl.where(is_decay, 1, tl.where(is_rate, 4, tl.where(is_gate, 5, plane)))
    wait_for_inputs()
    total = weighted_sums(
        weight + o.to(tl.int64)[:, None] * C + k[None, :],
        mixes + (plane.to(tl.int64) * T + tl.where(t < T, t, 0))[:, None] * C + k[None, :],
        C, 1, DTYPE, BLOCK_O, BLOCK_T, BLOCK_K, IS_READ_ONCE,
    )  # fmt: skip
    if narrow < 0:
        part = first // WIDE
        channel = o - part * WIDE
        is_inside = (channel < C)[:, None] & (t < T)[None, :]
        tl.store(rkv + (part * T + t)[None, :] * C + channel[:, None], total.to(rkv.dtype.element_ty), mask=is_inside)
    else:
        if is_decay:
            total = 2.0 / (1.0 + tl.exp(-2.0 * total)) - 1.0
        if is_gate:
            total = 1.0 / (1.0 + tl.exp(-total))
        to = hidden + t[None, :] * (OUTPUTS - 3 * WIDE) + (narrow + tl.arange(0, BLOCK_O))[:, None]
        tl.store(to, total, mask=(t < T)[None, :])


@triton.jit
def _raised(
    weights, rows, total, RANK: tl.constexpr, DTYPE: tl.constexpr, IS_EXACT: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Add a low-rank product. Where exact, float32 inputs are what two operands add up to."""
    for begin in tl.static_range(0, RANK, BLOCK_K):
        w = as_operand(tl.load(weights + begin), DTYPE)
        row = tl.load(rows + begin)
        high = as_operand(row.to(DTYPE), DTYPE)
        total = tl.dot(w, tl.trans(high), total, input_precision="ieee")
        if IS_EXACT:
            low = as_operand((row - high.to(tl.float32)).to(DTYPE), DTYPE)
            total = tl.dot(w, tl.trans(low), total, input_precision="ieee")
    return total


@triton.jit(do_not_specialize=["T"])
def raise_kernel(
    hidden, weight, decay_bias, rate_bias, mix_bias, decay, others, T,
    C: tl.constexpr, DECAY: tl.constexpr, RATE: tl.constexpr, GATE: tl.constexpr, VALUE: tl.constexpr,
    DTYPE: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Program (outputs, rows, which). Writes `decay[T, C]` float32, and `others[3, T, C]`: rate, gate, value mix."""
    let_successor_begin()
    first = tl.program_id(0) * BLOCK_O
    o = first + tl.arange(0, BLOCK_O)
    t = tl.program_id(1).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    which = tl.program_id(2)
    k = tl.arange(0, BLOCK_K)
    RANKS: tl.constexpr = DECAY + RATE + GATE + VALUE
    is_output = o < C
    weights = weight + tl.where(is_output, o, 0)[:, None] * RANKS + k[None, :]
    rows = hidden + tl.where(t < T, t, 0)[:, None] * RANKS + k[None, :]
    total = tl.zeros([BLOCK_O, BLOCK_T], tl.float32)
    at = t[None, :] * C + o[:, None]
    is_inside = is_output[:, None] & (t < T)[None, :]
    wait_for_inputs()
    if which == 0:
        total = _raised(weights, rows, total, DECAY, DTYPE, tl.float32 != DTYPE, BLOCK_K)
        total += tl.load(decay_bias + o, mask=is_output, other=0.0)[:, None]
        tl.store(decay + at, total, mask=is_inside)
    else:
        if which == 1:
            total = _raised(weights + DECAY, rows + DECAY, total, RATE, DTYPE, False, BLOCK_K)
            total += tl.load(rate_bias + o, mask=is_output, other=0.0)[:, None]
            total = 1.0 / (1.0 + tl.exp(-total))
        elif which == 2:
            total = _raised(weights + DECAY + RATE, rows + DECAY + RATE, total, GATE, DTYPE, False, BLOCK_K)
        else:
            BEFORE: tl.constexpr = DECAY + RATE + GATE
            total = _raised(weights + BEFORE, rows + BEFORE, total, VALUE, DTYPE, False, BLOCK_K)
            total += tl.load(mix_bias + o, mask=is_output, other=0.0)[:, None]
            total = 1.0 / (1.0 + tl.exp(-total))
        to = others + (which - 1).to(tl.int64) * T * C + at
        tl.store(to, total.to(others.dtype.element_ty), mask=is_inside)


@dataclass(frozen=True, slots=True)
class LowRankPart:
    """One low-rank product's place in the joint matrices."""

    down: torch.Tensor  # [D, C]
    up: torch.Tensor  # [C, D]
    bias: torch.Tensor | None  # [C] float32


@dataclass(frozen=True, slots=True)
class Projected:
    """What the two launches bring, for T tokens."""

    rkv: torch.Tensor  # [3, T, C]
    decay: torch.Tensor  # [T, C] float32, before the sigmoid
    others: torch.Tensor  # [3, T, C]: rate, gate, value mix (not filled in the first layer)


class Projections:
    """The joint matrices of a layer, in `dtype`."""

    def __init__(
        self,
        wide: Sequence[torch.Tensor],
        decay: LowRankPart,
        rate: LowRankPart,
        gate: LowRankPart,
        value_mix: LowRankPart | None,
        dtype: torch.dtype,
    ) -> None:
        """Take receptance, key and value `[C, C]`, and the low-rank ones; `value_mix` is None in the first layer."""
        narrow = [decay, rate, gate] + ([value_mix] if value_mix is not None else [])
        self._dtype = dtype
        self._width = wide[0].shape[1]
        self._wide = _padded(self._width)
        self._ranks = [_padded(len(part.down)) for part in narrow] + [0] * (4 - len(narrow))
        sizes = [self._wide] * 3 + self._ranks[: len(narrow)]
        self.joint = wide[0].new_zeros(sum(sizes), self._width, dtype=dtype)
        self._up = wide[0].new_zeros(self._width, sum(self._ranks), dtype=dtype)
        self.parts = [
            place[: len(matrix)].copy_(matrix)
            for place, matrix in zip(self.joint.split(sizes), [*wide, *(part.down for part in narrow)], strict=True)
        ]
        for place, part in zip(self._up.split(self._ranks, dim=1), narrow, strict=False):
            place[:, : part.up.shape[1]].copy_(part.up)
        nothing = self.joint.new_zeros(self._width, dtype=torch.float32)
        biases = [decay.bias, rate.bias, None if value_mix is None else value_mix.bias]
        self._biases = [nothing if bias is None else bias for bias in biases]

    def __call__(self, mixes: torch.Tensor, **launch: bool) -> Projected:
        """Return what `mixes[6, T, C]` project to."""
        _, T, C = mixes.shape
        decay, rate, gate, value = self._ranks
        outputs, itemsize = len(self.joint), mixes.element_size()
        rkv, others = mixes.new_empty(3, T, C), mixes.new_empty(3, T, C)
        hidden = mixes.new_empty(T, sum(self._ranks), dtype=torch.float32)
        raw_decay = mixes.new_empty(T, C, dtype=torch.float32)
        tiles, block_k = tile(T, itemsize), plan(outputs, C, itemsize, is_whole=True).block_k
        ranks = {"DECAY": decay, "RATE": rate, "GATE": gate}
        project_kernel[(outputs // tiles.block_o, triton.cdiv(T, tiles.block_t))](
            mixes, self.joint, rkv, hidden, T, C=C, WIDE=self._wide, OUTPUTS=outputs, **ranks,
            DTYPE=TRITON_DTYPES[self._dtype], BLOCK_K=block_k, **tiles.options(T), **launch,
        )  # fmt: skip
        block_t = min(MAX_ROWS_UP, tiles.block_t)
        grid = (triton.cdiv(C, BLOCK_UP), triton.cdiv(T, block_t), 4 if value else 3)
        raise_kernel[grid](
            hidden, self._up, *self._biases, raw_decay, others, T, C=C, VALUE=value, **ranks,
            DTYPE=TRITON_DTYPES[self._dtype], BLOCK_O=BLOCK_UP, BLOCK_T=block_t, BLOCK_K=min(block_k, 64),
            num_warps=4, num_stages=1, **launch,
        )  # fmt: skip
        return Projected(rkv, raw_decay, others)


def _padded(size: int) -> int:
    return triton.cdiv(size, PART) * PART

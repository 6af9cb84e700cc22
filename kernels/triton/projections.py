"""All projections of a time mixing: what reads the mixes in one launch, low-rank products' second halves in another.

The first launch has two matrices: `[receptance; key; value]`, which may be int8, and `[decay; rate; gate; value mix]`,
the low-rank `down`s, which are not. Where they are of one dtype they are one matrix and their programs one loop: two
loops take twice the registers. Each part begins at a multiple of `PART`, so that a program's outputs belong to one of
them. The second launch has the `up`s side by side along the inputs, padded alike. Sums have one order for each output,
whatever the batch (`linear.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels import Linear, LowRank
from kernels.triton import hopper
from kernels.triton.linear import activate, add_bias, as_operand, tile, weighted_sums
from kernels.triton.overlap import let_successor_begin, wait_for_inputs
from kernels.triton.packed import PANEL, TRITON_DTYPES, in_words, pack, plain, plan

PART = 2 * PANEL  # a part of the first matrix begins at a multiple of it
FEW_ROWS = 32  # of the second launch: up to so many, a program takes all inputs at once

_PANEL = tl.constexpr(PANEL)


@triton.jit(do_not_specialize=["T"])
def project_kernel(
    mixes, wide, narrow, rkv, hidden, T,
    C: tl.constexpr, WIDE: tl.constexpr, DECAY: tl.constexpr, RATE: tl.constexpr, GATE: tl.constexpr,
    VALUE: tl.constexpr, DTYPE: tl.constexpr, WIDE_STRIDE: tl.constexpr, WIDE_TILE_K: tl.constexpr,
    NARROW_TILE_K: tl.constexpr, WIDE_BLOCK_K: tl.constexpr, NARROW_BLOCK_K: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_T: tl.constexpr, IS_READ_ONCE: tl.constexpr, EARLY: tl.constexpr = False,
):  # fmt: skip
    """Program (outputs, rows). `mixes[6, T, C]` are r, w, k, v, a, g; WIDE is C padded, DECAY to VALUE are ranks.

    Writes `rkv[3, T, C]`, and `hidden[T, ranks]` float32 after its activations.
    """
    let_successor_begin(EARLY)
    IS_ONE_MATRIX: tl.constexpr = wide.dtype.element_ty == narrow.dtype.element_ty
    first = tl.program_id(0) * BLOCK_O
    in_block = tl.arange(0, BLOCK_O)
    t = tl.program_id(1).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    in_narrow = first - 3 * WIDE
    is_decay = (in_narrow >= 0) & (in_narrow < DECAY)
    is_rate = (in_narrow >= DECAY) & (in_narrow < DECAY + RATE)
    is_gate = (in_narrow >= DECAY + RATE) & (in_narrow < DECAY + RATE + GATE)
    plane = tl.where(first < WIDE, 0, tl.where(first < 2 * WIDE, 2, 3))
    plane = tl.where(is_decay, 1, tl.where(is_rate, 4, tl.where(is_gate, 5, plane)))
    rows = mixes + (plane.to(tl.int64) * T + tl.where(t < T, t, 0)) * C
    if IS_ONE_MATRIX or in_narrow < 0:
        total = weighted_sums(
            wide, first + in_block, rows, 0, C, 1, WIDE_STRIDE, WIDE_TILE_K, DTYPE,
            BLOCK_O, BLOCK_T, WIDE_BLOCK_K, IS_READ_ONCE,
        )  # fmt: skip
    else:
        total = weighted_sums(
            narrow, in_narrow + in_block, rows, 0, C, 1, C * _PANEL, NARROW_TILE_K, DTYPE,
            BLOCK_O, BLOCK_T, NARROW_BLOCK_K, IS_READ_ONCE,
        )  # fmt: skip
    if in_narrow < 0:
        part = first // WIDE
        channel = first - part * WIDE + in_block
        is_inside = (channel < C)[:, None] & (t < T)[None, :]
        at = (part * T + t)[None, :] * C + channel[:, None]
        tl.store(rkv + at, total.to(rkv.dtype.element_ty), mask=is_inside)
    else:
        if is_decay:
            total = activate(total, "tanh")
        if is_gate:
            total = activate(total, "sigmoid")
        at = t[None, :] * (DECAY + RATE + GATE + VALUE) + (in_narrow + in_block)[:, None]
        tl.store(hidden + at, total, mask=(t < T)[None, :])


@triton.jit
def raised(
    weights, rows, RANK: tl.constexpr, DTYPE: tl.constexpr, IS_EXACT: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A low-rank product, `[BLOCK_O, BLOCK_T]`. Where exact, what float32 inputs lose by rounding is added at the end.

    The first weights are asked for before the wait.
    """
    total = tl.zeros([BLOCK_O, BLOCK_T], tl.float32)
    STEP: tl.constexpr = min(RANK, BLOCK_K)
    k = tl.arange(0, STEP)[None, :]
    w = tl.load(weights + k)
    wait_for_inputs()
    for is_rest in tl.static_range(2 if IS_EXACT else 1):
        for begin in tl.static_range(0, RANK, STEP):
            if STEP < RANK:
                w = tl.load(weights + begin + k)
            row = tl.load(rows + begin + k)
            if is_rest:
                row -= row.to(DTYPE).to(tl.float32)
            operand = as_operand(row.to(DTYPE), DTYPE)
            total = tl.dot(as_operand(w, DTYPE), tl.trans(operand), total, input_precision="ieee")
    return total


@triton.jit(do_not_specialize=["T"])
def raise_kernel(
    hidden, weight, decay_bias, rate_bias, mix_bias, decay, others, T,
    C: tl.constexpr, DECAY: tl.constexpr, RATE: tl.constexpr, GATE: tl.constexpr, VALUE: tl.constexpr,
    DTYPE: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
    EARLY: tl.constexpr = False,
):  # fmt: skip
    """Program (outputs, rows, which). Writes `decay[T, C]` float32, and `others[3, T, C]`: rate, gate, value mix."""
    let_successor_begin(EARLY)
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    t = tl.program_id(1).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    which = tl.program_id(2)
    RANKS: tl.constexpr = DECAY + RATE + GATE + VALUE
    is_output = o < C
    weights = weight + tl.where(is_output, o, 0)[:, None] * RANKS
    rows = hidden + tl.where(t < T, t, 0)[:, None] * RANKS
    at = t[None, :] * C + o[:, None]
    is_inside = is_output[:, None] & (t < T)[None, :]
    if which == 0:
        total = raised(weights, rows, DECAY, DTYPE, tl.float32 != DTYPE, BLOCK_O, BLOCK_T, BLOCK_K)
        total = add_bias(total, tl.load(decay_bias + o, mask=is_output, other=0.0), is_output)
        tl.store(decay + at, total, mask=is_inside)
    elif which == 1:
        total = raised(weights + DECAY, rows + DECAY, RATE, DTYPE, False, BLOCK_O, BLOCK_T, BLOCK_K)
        total = add_bias(total, tl.load(rate_bias + o, mask=is_output, other=0.0), is_output)
        total = activate(total, "sigmoid")
        tl.store(others + at, total.to(others.dtype.element_ty), mask=is_inside)
    elif which == 2:
        BEFORE_GATE: tl.constexpr = DECAY + RATE
        total = raised(weights + BEFORE_GATE, rows + BEFORE_GATE, GATE, DTYPE, False, BLOCK_O, BLOCK_T, BLOCK_K)
        plane = others + tl.cast(T, tl.int64) * C
        tl.store(plane + at, total.to(others.dtype.element_ty), mask=is_inside)
    elif VALUE > 0:
        BEFORE_VALUE: tl.constexpr = DECAY + RATE + GATE
        total = raised(weights + BEFORE_VALUE, rows + BEFORE_VALUE, VALUE, DTYPE, False, BLOCK_O, BLOCK_T, BLOCK_K)
        total = add_bias(total, tl.load(mix_bias + o, mask=is_output, other=0.0), is_output)
        total = activate(total, "sigmoid")
        plane = others + tl.cast(T, tl.int64) * 2 * C
        tl.store(plane + at, total.to(others.dtype.element_ty), mask=is_inside)


@dataclass(frozen=True, slots=True)
class Projected:
    """What the two launches bring, for T tokens."""

    rkv: torch.Tensor  # [3, T, C]
    decay: torch.Tensor  # [T, C] float32, before the sigmoid
    others: torch.Tensor  # [3, T, C]: rate, gate, value mix (not filled in the first layer)


class Projections:
    """The joint matrices of a layer; the low-rank ones in `dtype`, the others in it or int8."""

    def __init__(self, wide: Sequence[Linear], narrow: Sequence[LowRank | None], dtype: torch.dtype) -> None:
        """Take receptance, key, value; and decay, rate, gate, value mix, the last being None in the first layer.

        The weights of the first three are views of the joint ones from then on.
        """
        low_ranks = [low_rank for low_rank in narrow if low_rank is not None]
        self._dtype = dtype
        self._width = width = wide[0].in_features
        self._ranks = [_padded(low_rank.rank) for low_rank in low_ranks] + [0] * (4 - len(low_ranks))
        down = low_ranks[0].down.new_zeros(sum(self._ranks), width, dtype=dtype)
        up = down.new_zeros(width, sum(self._ranks))
        places = zip(torch.split(down, self._ranks), torch.split(up, self._ranks, dim=1), low_ranks, strict=False)
        for place_down, place_up, low_rank in places:
            place_down[: low_rank.rank] = plain(low_rank.down, low_rank.rank)
            place_up[:, : low_rank.rank] = plain(low_rank.up, width)
        self._wide, self._narrow, self._up = _joined([linear.packed for linear in wide]), pack(down), up
        self._joint: torch.Tensor | None = None
        if self._wide.dtype == dtype:
            sizes = len(self._wide), len(self._narrow)
            self._joint = torch.cat([self._wide, self._narrow])
            self._wide, self._narrow = self._joint.split(sizes)
        for linear, panels in zip(wide, self._wide.chunk(3), strict=True):
            linear.packed = panels[: len(linear.packed)]
        nothing = up.new_zeros(width, dtype=torch.float32)
        biases = [low_rank.bias for low_rank in low_ranks if low_rank is not low_ranks[2]] + [None]
        self._biases = [nothing if bias is None else bias for bias in biases[:3]]

    def __call__(self, mixes: torch.Tensor, **launch: bool) -> Projected:
        """Return what `mixes[6, T, C]` project to."""
        _, T, C = mixes.shape
        rkv, others = mixes.new_empty(3, T, C), mixes.new_empty(3, T, C)
        projected = Projected(rkv, mixes.new_empty(T, C, dtype=torch.float32), others)
        sizes = dict(zip(("DECAY", "RATE", "GATE", "VALUE"), self._ranks, strict=True)) | {"C": C}
        if self._joint is not None and self._is_hoppers(mixes, self._joint, sizes):
            self._run_on_hopper(mixes, self._joint, projected, sizes, launch)
        else:
            self._run(mixes, projected, sizes, launch)
        return projected

    def _is_hoppers(self, mixes: torch.Tensor, joint: torch.Tensor, sizes: dict[str, int]) -> bool:
        matrix = plan(PANEL, self._width, mixes.element_size(), is_whole=True)
        return hopper.can_run(mixes, joint, matrix) and hopper.most_inputs(sizes) <= hopper.MAX_RANK

    def _run(self, mixes: torch.Tensor, projected: Projected, sizes: dict[str, int], launch: dict[str, bool]) -> None:
        _, T, C = mixes.shape
        hidden = mixes.new_empty(T, sum(self._ranks), dtype=torch.float32)
        of_matrix = {**sizes, "DTYPE": TRITON_DTYPES[self._dtype]}
        options = project_options(T, C, self._wide.element_size(), self._up.element_size())
        outputs = PANEL * (len(self._wide) + len(self._narrow))
        project_kernel[(outputs // options["BLOCK_O"], triton.cdiv(T, options["BLOCK_T"]))](
            mixes, in_words(self._wide), self._narrow, projected.rkv, hidden, T,
            WIDE=PANEL * len(self._wide) // 3, WIDE_STRIDE=self._wide.stride(0), **of_matrix, **options, **launch,
        )  # fmt: skip
        options = raise_options(T, mixes.element_size())
        planes = 4 if self._ranks[3] else 3
        raise_kernel[(triton.cdiv(C, options["BLOCK_O"]), triton.cdiv(T, options["BLOCK_T"]), planes)](
            hidden, self._up, *self._biases, projected.decay, projected.others, T, **of_matrix, **options, **launch
        )

    def _run_on_hopper(
        self,
        mixes: torch.Tensor,
        joint: torch.Tensor,
        projected: Projected,
        sizes: dict[str, int],
        launch: dict[str, bool],
    ) -> None:
        hidden = mixes.new_empty(mixes.shape[1], sum(self._ranks) + self._ranks[0])
        wide = PANEL * len(self._wide) // 3
        hopper.project(mixes, joint, projected.rkv, hidden, {**sizes, "WIDE": wide}, **launch)
        hopper.raise_ranks(hidden, self._up, self._biases, projected.decay, projected.others, sizes, **launch)


def project_options(num_rows: int, width: int, wide_itemsize: int, narrow_itemsize: int) -> dict[str, int]:
    """Return who computes what in the first launch, for weights of so many bytes each."""
    tiles = tile(num_rows, wide_itemsize)
    options: dict[str, int] = {}
    for name, itemsize in (("WIDE", wide_itemsize), ("NARROW", narrow_itemsize)):
        tile_k = plan(PANEL, width, itemsize, is_whole=True).tile_k
        of_part = tiles.options(num_rows, width, tile_k)
        options |= {f"{name}_TILE_K": tile_k, f"{name}_BLOCK_K": of_part.pop("BLOCK_K"), **of_part}
    return options


def raise_options(num_rows: int, itemsize: int) -> dict[str, int]:
    """Return who computes what in the second launch; few rows take all inputs of a low-rank product at once."""
    if itemsize == 4:
        return {"BLOCK_O": 64, "BLOCK_T": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 1}
    if num_rows <= FEW_ROWS:
        return {"BLOCK_O": 64, "BLOCK_T": max(16, triton.next_power_of_2(num_rows)), "BLOCK_K": 256, "num_warps": 4}
    return {"BLOCK_O": 64, "BLOCK_T": 64, "BLOCK_K": 64, "num_warps": 4}


def _joined(matrices: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return packed matrices one behind the other, each of as many panels as fill parts."""
    padded = len(matrices[0]) + len(matrices[0]) % (PART // PANEL)
    joint = matrices[0].new_zeros(3 * padded, *matrices[0].shape[1:])
    for place, matrix in zip(joint.chunk(3), matrices, strict=True):
        place[: len(matrix)] = matrix
    return joint


def _padded(size: int) -> int:
    return (size + PART - 1) // PART * PART

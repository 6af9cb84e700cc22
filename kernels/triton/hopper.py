"""The products of `linear.py` and `projections.py` for Hopper, whose copy engine brings weights before the wait.

Same weights, same order of every sum, same bits. What differs is when memory is asked: a program asks for all the
stages of weights it has room for before it waits for the kernel before it, one after the other, so that the card reads
weights while rows are still being made. Then it asks for the rows, of which there is a tile beside each of weights.
Gluon, because Triton places a loop's first copies itself: behind the wait.

NVIDIA, PTX ISA: "cp.async.bulk.tensor", "mbarrier", "wgmma.mma_async", "griddepcontrol".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.triton.packed import PANEL, Plan

TILE_K = 64  # inputs in a tile: the 128 bytes that the copy engine and the tensor cores exchange
CAPABILITY = (9, 0)  # these tensor core instructions are of this generation alone
MAX_RANK = 768  # of a low-rank product, a decay's counted twice: all its inputs are in shared memory at once
STAGES_BYTES = 170 << 10  # of few rows' program: as many stages as fit into it, by measurement
STEP = 2  # tiles of inputs a stage of such a program
PACE = 3  # stages of weights under way before the wait: enough to keep the memory busy, by measurement

_ask_for = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # its name before Triton 3.9
_PANEL, _TILE_K = gl.constexpr(PANEL), gl.constexpr(TILE_K)


@gluon.jit
def _activate(x, ACTIVATION: gl.constexpr):
    """As `linear.activate`, which Gluon cannot call."""
    if ACTIVATION == "sigmoid":
        x = 1.0 / (1.0 + gl.exp(-x))
    elif ACTIVATION == "tanh":
        x = 2.0 / (1.0 + gl.exp(-2.0 * x)) - 1.0
    elif ACTIVATION == "relu_squared":
        x = gl.maximum(x, 0.0)
        x = x * x
    return x


@gluon.jit
def weighted_sums(
    weights, rows, panel, row, first_tile,
    K: gl.constexpr, SPLIT: gl.constexpr, BLOCK_O: gl.constexpr, BLOCK_T: gl.constexpr, STEP: gl.constexpr,
    STAGES: gl.constexpr, PACE: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """`weight @ x.T` of outputs of `panel` and on, `[BLOCK_O, BLOCK_T]` float32, over K inputs from a tile on.

    In SPLIT spans, each summed from its front, and added in order. A stage is STEP tiles of each panel and of the rows.
    Waits for what comes before this kernel. Until then weights of all stages are asked for, but no more than PACE
    stages' are under way: what other kernels read from the card's cache meanwhile would wait behind them.
    """
    NUM: gl.constexpr = K // (STEP * _TILE_K)  # stages of work
    FIRST: gl.constexpr = min(NUM, STAGES)
    dtype: gl.constexpr = weights.dtype
    OF_ONE: gl.constexpr = STEP * _TILE_K * (dtype.primitive_bitwidth // 8)  # bytes of an output, or row, of a stage
    w = gl.allocate_shared_memory(dtype, [FIRST, BLOCK_O // _PANEL, STEP, _PANEL, _TILE_K], weights.layout)
    x = gl.allocate_shared_memory(dtype, [FIRST, STEP, BLOCK_T, _TILE_K], rows.layout)
    arrived = gl.allocate_shared_memory(gl.int64, [FIRST, 1], mbarrier.MBarrierLayout())
    first_rows_arrived = gl.allocate_shared_memory(gl.int64, [FIRST, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(FIRST):
        mbarrier.init(arrived.index(i), count=1)
        mbarrier.init(first_rows_arrived.index(i), count=1)
    for i in gl.static_range(FIRST):
        if i >= PACE:
            mbarrier.wait(arrived.index(i - PACE), 0)
        mbarrier.expect(arrived.index(i), BLOCK_O * OF_ONE)
        _ask_for(weights, [panel, first_tile + i * STEP, 0, 0], arrived.index(i), w.index(i))
    for i in gl.static_range(FIRST):
        mbarrier.expect(first_rows_arrived.index(i), BLOCK_T * OF_ONE)
    gdc_wait()
    for i in gl.static_range(FIRST):
        _ask_for(rows, [first_tile + i * STEP, row, 0], first_rows_arrived.index(i), x.index(i))
    total = gl.zeros([BLOCK_O, BLOCK_T], gl.float32, LAYOUT)
    PART: gl.constexpr = NUM // SPLIT
    for part in range(SPLIT):
        sums = gl.zeros([BLOCK_O, BLOCK_T], gl.float32, LAYOUT)
        for at in range(part * PART, (part + 1) * PART):
            stage = at % FIRST
            mbarrier.wait(arrived.index(stage), (at // FIRST) & 1)
            if at < FIRST:
                mbarrier.wait(first_rows_arrived.index(stage), 0)
            tiles_w = w.index(stage).reshape((STEP * BLOCK_O, _TILE_K))
            tiles_x = x.index(stage).reshape((STEP * BLOCK_T, _TILE_K))
            for j in gl.static_range(STEP):
                tile_w, tile_x = tiles_w.slice(j * BLOCK_O, BLOCK_O), tiles_x.slice(j * BLOCK_T, BLOCK_T)
                sums = warpgroup_mma(tile_w, tile_x.permute((1, 0)), sums, is_async=True)
            sums = warpgroup_mma_wait(STEP, deps=(sums,))  # the stage before is free now
            ahead = at - 1 + FIRST
            if (at > 0) & (ahead < NUM):
                free = ahead % FIRST
                mbarrier.expect(arrived.index(free), (BLOCK_O + BLOCK_T) * OF_ONE)
                _ask_for(weights, [panel, first_tile + ahead * STEP, 0, 0], arrived.index(free), w.index(free))
                _ask_for(rows, [first_tile + ahead * STEP, row, 0], arrived.index(free), x.index(free))
        total += warpgroup_mma_wait(0, deps=(sums,))
    return total


@gluon.jit(do_not_specialize=["T"])
def linear_kernel(
    rows, weights, bias, out, T,
    OUTPUTS: gl.constexpr, K: gl.constexpr, SPLIT: gl.constexpr, IS_SIDE_BY_SIDE: gl.constexpr,
    HAS_BIAS: gl.constexpr, ACTIVATION: gl.constexpr, BLOCK_O: gl.constexpr, BLOCK_T: gl.constexpr,
    STEP: gl.constexpr, STAGES: gl.constexpr, PACE: gl.constexpr,
    LAYOUT: gl.constexpr, STORED: gl.constexpr, EARLY: gl.constexpr = False,
):  # fmt: skip
    """As `linear.linear_kernel`: program (outputs, rows, span)."""
    if EARLY:
        gdc_launch_dependents()
    SPAN: gl.constexpr = K // SPLIT if IS_SIDE_BY_SIDE else K
    total = weighted_sums(
        weights, rows, gl.program_id(0) * (BLOCK_O // _PANEL), gl.program_id(1) * BLOCK_T,
        gl.program_id(2) * (SPAN // _TILE_K), SPAN, 1 if IS_SIDE_BY_SIDE else SPLIT,
        BLOCK_O, BLOCK_T, STEP, STAGES, PACE, LAYOUT,
    )  # fmt: skip
    if not IS_SIDE_BY_SIDE or SPLIT == 1:
        if HAS_BIAS:
            o = gl.program_id(0) * BLOCK_O + gl.arange(0, BLOCK_O, gl.SliceLayout(1, LAYOUT))
            total += gl.expand_dims(gl.load(bias + o, mask=o < OUTPUTS, other=0.0), 1)
        total = _activate(total, ACTIVATION)
    kept = gl.convert_layout(total.to(out.dtype.element_ty), STORED)
    o = gl.program_id(0) * BLOCK_O + gl.arange(0, BLOCK_O, gl.SliceLayout(1, STORED))
    t = gl.program_id(1).to(gl.int64) * BLOCK_T + gl.arange(0, BLOCK_T, gl.SliceLayout(0, STORED))
    at = gl.expand_dims(gl.program_id(2) * T + t, 0) * OUTPUTS + gl.expand_dims(o, 1)
    gl.store(out + at, kept, mask=gl.expand_dims(o < OUTPUTS, 1) & gl.expand_dims(t < T, 0))


@gluon.jit(do_not_specialize=["T"])
def project_kernel(
    mixes, weights, rkv, hidden, T,
    C: gl.constexpr, WIDE: gl.constexpr, DECAY: gl.constexpr, RATE: gl.constexpr, GATE: gl.constexpr,
    VALUE: gl.constexpr, BLOCK_O: gl.constexpr, BLOCK_T: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr,
    PACE: gl.constexpr, LAYOUT: gl.constexpr, STORED: gl.constexpr, EARLY: gl.constexpr = False,
):  # fmt: skip
    """As `projections.project_kernel`, of one matrix: program (outputs, rows). `mixes` are `[6 * T, C]` here."""
    if EARLY:
        gdc_launch_dependents()
    first = gl.program_id(0) * BLOCK_O
    in_narrow = first - 3 * WIDE
    is_decay = (in_narrow >= 0) & (in_narrow < DECAY)
    is_rate = (in_narrow >= DECAY) & (in_narrow < DECAY + RATE)
    is_gate = (in_narrow >= DECAY + RATE) & (in_narrow < DECAY + RATE + GATE)
    plane = gl.where(first < WIDE, 0, gl.where(first < 2 * WIDE, 2, 3))
    plane = gl.where(is_decay, 1, gl.where(is_rate, 4, gl.where(is_gate, 5, plane)))
    total = weighted_sums(
        weights, mixes, gl.program_id(0) * (BLOCK_O // _PANEL), plane * T + gl.program_id(1) * BLOCK_T, 0,
        C, 1, BLOCK_O, BLOCK_T, STEP, STAGES, PACE, LAYOUT,
    )  # fmt: skip
    if in_narrow < 0:
        part = first // WIDE
        o = first - part * WIDE + gl.arange(0, BLOCK_O, gl.SliceLayout(1, STORED))
        t = gl.program_id(1).to(gl.int64) * BLOCK_T + gl.arange(0, BLOCK_T, gl.SliceLayout(0, STORED))
        at = gl.expand_dims(part * T + t, 0) * C + gl.expand_dims(o, 1)
        values = gl.convert_layout(total.to(rkv.dtype.element_ty), STORED)
        gl.store(rkv + at, values, mask=gl.expand_dims(o < C, 1) & gl.expand_dims(t < T, 0))
    else:
        if is_decay:
            total = _activate(total, "tanh")
        if is_gate:
            total = _activate(total, "sigmoid")
        sums = gl.convert_layout(total, STORED)
        o = in_narrow + gl.arange(0, BLOCK_O, gl.SliceLayout(1, STORED))
        t = gl.program_id(1).to(gl.int64) * BLOCK_T + gl.arange(0, BLOCK_T, gl.SliceLayout(0, STORED))
        to = hidden + gl.expand_dims(t, 0) * (2 * DECAY + RATE + GATE + VALUE) + gl.expand_dims(o, 1)
        is_there = gl.expand_dims((t < T) & (in_narrow >= 0), 0)
        rounded = sums.to(hidden.dtype.element_ty)
        gl.store(to, rounded, mask=is_there)
        if is_decay:
            lost = (sums - rounded.to(gl.float32)).to(hidden.dtype.element_ty)
            gl.store(to + (DECAY + RATE + GATE + VALUE), lost, mask=is_there)


@gluon.jit
def _raised(
    weights, hidden, first_tile, lost_tile, RANK: gl.constexpr, IS_EXACT: gl.constexpr,
    BLOCK_O: gl.constexpr, BLOCK_T: gl.constexpr, LAYOUT: gl.constexpr, w, x, arrived,
):  # fmt: skip
    """A low-rank product, `[BLOCK_O, BLOCK_T]`; where exact, what rounding took from its inputs is added at the end."""
    TILES: gl.constexpr = RANK // _TILE_K
    INPUTS: gl.constexpr = 2 * TILES if IS_EXACT else TILES
    o, t = gl.program_id(0) * BLOCK_O, gl.program_id(1) * BLOCK_T
    mbarrier.expect(arrived, (TILES * BLOCK_O + INPUTS * BLOCK_T) * _TILE_K * (weights.dtype.primitive_bitwidth // 8))
    for i in gl.static_range(TILES):
        _ask_for(weights, [o, (first_tile + i) * _TILE_K], arrived, w.index(i))
    gdc_wait()
    for i in gl.static_range(TILES):
        _ask_for(hidden, [t, (first_tile + i) * _TILE_K], arrived, x.index(i))
    for i in gl.static_range(INPUTS - TILES):
        _ask_for(hidden, [t, (lost_tile + i) * _TILE_K], arrived, x.index(TILES + i))
    mbarrier.wait(arrived, 0)
    total = gl.zeros([BLOCK_O, BLOCK_T], gl.float32, LAYOUT)
    for i in gl.static_range(INPUTS):
        total = warpgroup_mma(w.index(i % TILES), x.index(i).permute((1, 0)), total, is_async=True)
    return warpgroup_mma_wait(0, deps=(total,))


@gluon.jit
def _biased(total, bias, C: gl.constexpr, BLOCK_O: gl.constexpr, LAYOUT: gl.constexpr):
    o = gl.program_id(0) * BLOCK_O + gl.arange(0, BLOCK_O, gl.SliceLayout(1, LAYOUT))
    return total + gl.expand_dims(gl.load(bias + o, mask=o < C, other=0.0), 1)


@gluon.jit(do_not_specialize=["T"])
def raise_kernel(
    hidden, weights, decay_bias, rate_bias, mix_bias, decay, others, T,
    C: gl.constexpr, DECAY: gl.constexpr, RATE: gl.constexpr, GATE: gl.constexpr, VALUE: gl.constexpr,
    BLOCK_O: gl.constexpr, BLOCK_T: gl.constexpr, LAYOUT: gl.constexpr, STORED: gl.constexpr,
    EARLY: gl.constexpr = False,
):  # fmt: skip
    """As `projections.raise_kernel`: program (outputs, rows, which)."""
    if EARLY:
        gdc_launch_dependents()
    MOST_WEIGHTS: gl.constexpr = max(DECAY, RATE, GATE, VALUE) // _TILE_K
    MOST_INPUTS: gl.constexpr = max(2 * DECAY, RATE, GATE, VALUE) // _TILE_K
    BEFORE_RATE: gl.constexpr = DECAY // _TILE_K
    BEFORE_GATE: gl.constexpr = (DECAY + RATE) // _TILE_K
    BEFORE_VALUE: gl.constexpr = (DECAY + RATE + GATE) // _TILE_K
    LOST: gl.constexpr = (DECAY + RATE + GATE + VALUE) // _TILE_K
    w = gl.allocate_shared_memory(weights.dtype, [MOST_WEIGHTS, BLOCK_O, _TILE_K], weights.layout)
    x = gl.allocate_shared_memory(weights.dtype, [MOST_INPUTS, BLOCK_T, _TILE_K], hidden.layout)
    arrived = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(arrived, count=1)
    o = gl.program_id(0) * BLOCK_O + gl.arange(0, BLOCK_O, gl.SliceLayout(1, STORED))
    t = gl.program_id(1).to(gl.int64) * BLOCK_T + gl.arange(0, BLOCK_T, gl.SliceLayout(0, STORED))
    at = gl.expand_dims(t, 0) * C + gl.expand_dims(o, 1)
    is_inside = gl.expand_dims(o < C, 1) & gl.expand_dims(t < T, 0)
    plane = gl.to_tensor(T).to(gl.int64) * C
    which = gl.program_id(2)
    if which == 0:
        total = _raised(weights, hidden, 0, LOST, DECAY, True, BLOCK_O, BLOCK_T, LAYOUT, w, x, arrived)
        total = _biased(total, decay_bias, C, BLOCK_O, LAYOUT)
        gl.store(decay + at, gl.convert_layout(total, STORED), mask=is_inside)
    elif which == 1:
        total = _raised(weights, hidden, BEFORE_RATE, 0, RATE, False, BLOCK_O, BLOCK_T, LAYOUT, w, x, arrived)
        total = _activate(_biased(total, rate_bias, C, BLOCK_O, LAYOUT), "sigmoid")
        gl.store(others + at, gl.convert_layout(total.to(others.dtype.element_ty), STORED), mask=is_inside)
    elif which == 2:
        total = _raised(weights, hidden, BEFORE_GATE, 0, GATE, False, BLOCK_O, BLOCK_T, LAYOUT, w, x, arrived)
        gl.store(others + plane + at, gl.convert_layout(total.to(others.dtype.element_ty), STORED), mask=is_inside)
    elif VALUE > 0:
        total = _raised(weights, hidden, BEFORE_VALUE, 0, VALUE, False, BLOCK_O, BLOCK_T, LAYOUT, w, x, arrived)
        total = _activate(_biased(total, mix_bias, C, BLOCK_O, LAYOUT), "sigmoid")
        gl.store(others + 2 * plane + at, gl.convert_layout(total.to(others.dtype.element_ty), STORED), mask=is_inside)


@dataclass(frozen=True, slots=True)
class Tile:
    """What a program does. Decides who computes a sum, never how it is summed."""

    block_o: int  # outputs, a multiple of a panel
    block_t: int  # rows
    num_warps: int
    stages: int = 1  # that there is room for
    step: int = 1  # tiles of inputs a stage; several only beside one panel

    def streaming(self) -> dict[str, int]:
        """Return the arguments of a kernel whose inputs come in stages."""
        return {"STEP": self.step, "STAGES": self.stages, "PACE": PACE}

    def options(self) -> dict[str, object]:
        """Return any kernel's arguments."""
        across = self.block_o // 8  # threads beside each other where results are stored, of eight outputs each
        return {
            "BLOCK_O": self.block_o,
            "BLOCK_T": self.block_t,
            "LAYOUT": gl.NVMMADistributedLayout([3, 0], [self.num_warps, 1], [16, self.block_t, 16]),
            "STORED": gl.BlockedLayout([8, 1], [across, 32 // across], [1, self.num_warps], [0, 1]),
            "num_warps": self.num_warps,
        }


@lru_cache
def tile(num_rows: int, split: int = 1) -> Tile:
    """Return the tile for so many rows, and a program that adds so many spans."""
    if num_rows > 256:
        # Who adds spans needs room for two sums.
        return Tile(128, 256, 8, stages=4) if split == 1 else Tile(128, 128, 8, stages=6)
    if num_rows > 64:
        return Tile(128, 128, 8, stages=6)
    block_t = _block_for(num_rows)
    return Tile(PANEL, block_t, 4, STAGES_BYTES // (STEP * (PANEL + block_t) * TILE_K * 2), STEP)


def raise_tile(num_rows: int, rank: int) -> Tile:
    """Return the tile of `raise_kernel`, whose inputs all are one stage, for low-rank products of so many at most."""
    if num_rows > 64 and rank <= 256:
        return Tile(128, 128, 8)
    return Tile(PANEL, _block_for(min(num_rows, 64)), 4)


def most_inputs(sizes: Mapping[str, int]) -> int:
    """Return how many inputs the largest low-rank product has; a decay's has each twice."""
    return max(2 * sizes["DECAY"], sizes["RATE"], sizes["GATE"], sizes["VALUE"])


def _block_for(num_rows: int) -> int:
    return next(rows for rows in (8, 16, 32, 64) if rows >= num_rows)


def can_run(x: torch.Tensor, weight: torch.Tensor, plan: Plan) -> bool:
    """Say whether these kernels take rows and packed weights: of the same 16 bits, spans of pairs of whole tiles."""
    return (
        x.is_cuda
        and x.dtype == weight.dtype
        and x.element_size() == 2
        and plan.tile_k == TILE_K
        and weight.shape[1] % (2 * plan.split) == 0
        and _is_hopper(x.device)
    )


@lru_cache
def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) == CAPABILITY


def layout_of(num_dimensions: int) -> gl.NVMMASharedLayout:
    """Return how tiles lie in shared memory."""
    return gl.NVMMASharedLayout(128, 16, num_dimensions)


def _brick(tensor: torch.Tensor, *sizes: int) -> TensorDescriptor:
    """Return what the copy engine takes a brick of such sizes of at once; `sizes` end with `TILE_K`."""
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), list(sizes), layout_of(len(sizes)))


def _operands(rows: torch.Tensor, weight: torch.Tensor, tiles: Tile) -> tuple[TensorDescriptor, TensorDescriptor]:
    by_tiles = rows.view(len(rows), -1, TILE_K).transpose(0, 1)
    return (
        _brick(by_tiles, tiles.step, tiles.block_t, TILE_K),
        _brick(weight, tiles.block_o // PANEL, tiles.step, PANEL, TILE_K),
    )


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    split: int,
    is_side_by_side: bool,
    activation: str,
    **launch: bool,
) -> None:
    """Fill `out[T, O]`, or `out[split, T, O]` where spans are side by side, from contiguous `x[T, K]`."""
    (T, K), outputs = x.shape, out.shape[-1]
    tiles = tile(T, 1 if is_side_by_side else split)
    grid = (triton.cdiv(outputs, tiles.block_o), triton.cdiv(T, tiles.block_t), split if is_side_by_side else 1)
    linear_kernel[grid](
        *_operands(x, weight, tiles), out if bias is None else bias, out, T,
        OUTPUTS=outputs, K=K, SPLIT=split, IS_SIDE_BY_SIDE=is_side_by_side, HAS_BIAS=bias is not None,
        ACTIVATION=activation, **tiles.streaming(), **tiles.options(), **launch,
    )  # fmt: skip


def project(
    mixes: torch.Tensor,
    weight: torch.Tensor,
    rkv: torch.Tensor,
    hidden: torch.Tensor,
    sizes: dict[str, int],
    **launch: bool,
) -> None:
    """Fill `rkv[3, T, C]` and `hidden[T, ranks + decay]` from `mixes[6, T, C]`.

    Of the decay's, `hidden` has twice what others have: rounded, and at the end what rounding took away.
    """
    _, T, C = mixes.shape
    tiles = tile(T)
    grid = (triton.cdiv(len(weight) * PANEL, tiles.block_o), triton.cdiv(T, tiles.block_t))
    project_kernel[grid](
        *_operands(mixes.view(-1, C), weight, tiles), rkv, hidden, T,
        **sizes, **tiles.streaming(), **tiles.options(), **launch,
    )  # fmt: skip


def raise_ranks(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    biases: Sequence[torch.Tensor],
    decay: torch.Tensor,
    others: torch.Tensor,
    sizes: dict[str, int],
    **launch: bool,
) -> None:
    """Fill `decay[T, C]` and `others[3, T, C]` from what `project` left, with weights `[C, ranks]`."""
    T, C = decay.shape
    tiles = raise_tile(T, most_inputs(sizes))
    grid = (triton.cdiv(C, tiles.block_o), triton.cdiv(T, tiles.block_t), 4 if sizes["VALUE"] else 3)
    raise_kernel[grid](
        _brick(hidden, tiles.block_t, TILE_K), _brick(weight, tiles.block_o, TILE_K), *biases, decay, others, T,
        **sizes, **tiles.options(), **launch,
    )  # fmt: skip

"""Products of few rows with large matrices: every weight is read once, and a row's result knows nothing of the others.

The weights take the side of the product that tensor cores want large, the rows the side that may be small: `out.T =
weight @ x.T`. Which inputs are summed in which order depends on the matrix alone: `K` is cut into `split` spans, each
summed from its front, and the spans' sums are added in order, by a second launch (few rows: the spans run side by
side) or by the same program (many rows). The number of rows only chooses how many share a program.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl

from kernels.triton.overlap import INTERPRETED, let_successor_begin, prefetch, wait_for_inputs

MAX_ROWS_SIDE_BY_SIDE = 256  # above it there are programs enough without cutting K
PROGRAMS_WANTED = 128  # about as many as a data centre card has processors; a constant, so that bits are no card's
ADD_BLOCK, ADD_WARPS = 256, 2  # of the launch that adds spans
INT8_TAIL = 16  # bytes behind a row of int8 weights; the first four are its scale

@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "sigmoid":
        x = 1.0 / (1.0 + tl.exp(-x))
    elif ACTIVATION == "tanh":
        x = 2.0 / (1.0 + tl.exp(-2.0 * x)) - 1.0
    elif ACTIVATION == "relu_squared":
        x = tl.maximum(x, 0.0)
        x = x * x
    return x


@triton.jit
def as_operand(tile, DTYPE: tl.constexpr):
    """The tile as the product takes it; bfloat16 is only stored by Triton's interpreter, not computed with."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        return tile.to(tl.float32)
    return tile.to(DTYPE)


@triton.jit
def weighted_sums(
    weights, rows, K: tl.constexpr, SPLIT: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, IS_READ_ONCE: tl.constexpr,
):  # fmt: skip
    """`weight @ x.T`, `[BLOCK_O, BLOCK_T]` float32, over K inputs in SPLIT spans: each from its front, then added."""
    total = tl.zeros([BLOCK_O, BLOCK_T], tl.float32)
    for part in range(SPLIT):
        sums = tl.zeros([BLOCK_O, BLOCK_T], tl.float32)
        for begin in range(0, K // SPLIT, BLOCK_K):
            k = part * (K // SPLIT) + begin
            w = as_operand(tl.load(weights + k, eviction_policy="evict_first" if IS_READ_ONCE else ""), DTYPE)
            row = as_operand(tl.load(rows + k), DTYPE)
            sums = tl.dot(w, tl.trans(row), sums, input_precision="ieee")
        total += sums
    return total


@triton.jit
def prefetch_weights(weight, first, OUTPUTS, BLOCK_O: tl.constexpr, STRIDE: tl.constexpr, SPAN: tl.constexpr):
    """Ask for a span of `BLOCK_O` rows of weights, beginning at `weight + first * STRIDE`."""
    o = first + tl.arange(0, BLOCK_O)
    num_bytes = tl.full([BLOCK_O], SPAN * (weight.dtype.element_ty.primitive_bitwidth // 8), tl.int32)
    prefetch(weight + tl.where(o < OUTPUTS, o, 0).to(tl.int64) * STRIDE, num_bytes)


@triton.jit(do_not_specialize=["T"])
def linear_kernel(
    x, weight, scale, bias, out, T,
    OUTPUTS: tl.constexpr, K: tl.constexpr, STRIDE: tl.constexpr, SPLIT: tl.constexpr, IS_SIDE_BY_SIDE: tl.constexpr,
    DTYPE: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, IS_READ_ONCE: tl.constexpr,
):  # fmt: skip
    """Program (outputs, rows, span). Side by side, `out` is `[SPLIT, T, O]` float32 and not activated yet."""
    let_successor_begin()
    SPAN: tl.constexpr = K // SPLIT if IS_SIDE_BY_SIDE else K
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    t = tl.program_id(1).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    k = tl.program_id(2) * SPAN + tl.arange(0, BLOCK_K)
    if IS_READ_ONCE:
        prefetch_weights(weight + tl.program_id(2) * SPAN, tl.program_id(0) * BLOCK_O, OUTPUTS, BLOCK_O, STRIDE, SPAN)
    wait_for_inputs()
    # Rows and outputs past the end read the first one's, and are not stored: no mask in the loop.
    total = weighted_sums(
        weight + tl.where(o < OUTPUTS, o, 0).to(tl.int64)[:, None] * STRIDE + k[None, :],
        x + tl.where(t < T, t, 0)[:, None] * K + k[None, :],
        SPAN, 1 if IS_SIDE_BY_SIDE else SPLIT, DTYPE, BLOCK_O, BLOCK_T, BLOCK_K, IS_READ_ONCE,
    )  # fmt: skip
    is_inside = (o < OUTPUTS)[:, None] & (t < T)[None, :]
    to = out + (tl.program_id(2) * T + t)[None, :] * OUTPUTS + o[:, None]
    if not IS_SIDE_BY_SIDE or SPLIT == 1:
        if HAS_SCALE:
            total *= tl.load(scale + o.to(tl.int64) * (STRIDE // 4), mask=o < OUTPUTS, other=0.0)[:, None]
        if HAS_BIAS:
            total += tl.load(bias + o, mask=o < OUTPUTS, other=0.0)[:, None]
        total = activate(total, ACTIVATION)
    tl.store(to, total.to(out.dtype.element_ty), mask=is_inside)


@triton.jit(do_not_specialize=["T"])
def add_spans_kernel(
    sums, scale, bias, out, T,
    OUTPUTS: tl.constexpr, STRIDE: tl.constexpr, SPLIT: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """Add the spans' sums `[SPLIT, T, O]` in order and finish as `linear_kernel` would; program (outputs, row)."""
    let_successor_begin()
    wait_for_inputs()
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    row = tl.program_id(1).to(tl.int64)
    total = tl.zeros([BLOCK_O], tl.float32)
    for part in tl.static_range(SPLIT):
        total += tl.load(sums + (part * T + row) * OUTPUTS + o, mask=o < OUTPUTS, other=0.0)
    if HAS_SCALE:
        total *= tl.load(scale + o.to(tl.int64) * (STRIDE // 4), mask=o < OUTPUTS, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + o, mask=o < OUTPUTS, other=0.0)
    tl.store(out + row * OUTPUTS + o, activate(total, ACTIVATION).to(out.dtype.element_ty), mask=o < OUTPUTS)


@dataclass(frozen=True, slots=True)
class Plan:
    """How a matrix `[O, K]` is summed. A function of the matrix, never of the rows."""

    block_k: int
    split: int


@lru_cache
def plan(out_features: int, in_features: int, itemsize: int, is_whole: bool = False) -> Plan:
    """Return the plan: loads of up to 256 bytes a row, and one span or so many that the processors have work.

    Raises `ValueError` where `in_features` is no multiple of 16: such a matrix is not for these kernels.
    """
    if in_features % 16:
        raise ValueError(f"in_features must be a multiple of 16, not {in_features}")
    widest = 32 if itemsize == 4 else 128
    block_k = next(size for size in (128, 64, 32, 16) if size <= widest and in_features % size == 0)
    split = 1
    while (
        not is_whole
        and split < 8
        and split * triton.cdiv(out_features, 64) < PROGRAMS_WANTED
        and in_features % (2 * split * block_k) == 0
        and in_features // (2 * split) >= 256
    ):
        split *= 2
    return Plan(block_k, split)


@dataclass(frozen=True, slots=True)
class Tile:
    """What a program does. Decides who computes a sum, never how it is summed."""

    block_o: int  # outputs, a multiple of the tensor cores' 64
    block_t: int  # rows
    num_warps: int
    num_stages: int
    is_side_by_side: bool  # the spans of K are different programs'

    def options(self, num_rows: int) -> dict[str, int | bool]:
        """Return the kernel's arguments for so many rows."""
        return {
            "BLOCK_O": self.block_o,
            "BLOCK_T": self.block_t,
            "IS_READ_ONCE": num_rows <= self.block_t,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


@lru_cache
def tile(num_rows: int, itemsize: int) -> Tile:
    """Return the tile for so many rows; float32 products are not tensor cores' and take fewer."""
    if num_rows > MAX_ROWS_SIDE_BY_SIDE:
        return Tile(64, 32, 4, 3, False) if itemsize == 4 else Tile(128, 128, 8, 3, False)
    most = 32 if itemsize == 4 else 128
    return Tile(64, next((rows for rows in (16, 32, 64) if rows >= num_rows and rows <= most), most), 4, 4, True)


def can_run(weight: torch.Tensor) -> bool:
    """Say whether the kernels take this matrix, packed or about to be."""
    return weight.dtype in (torch.int8, *TRITON_DTYPES) and weight.shape[1] % 16 == 0


def pack_int8(weight: torch.Tensor) -> torch.Tensor:
    """Return `weight[O, K]` as int8 `[O, K + INT8_TAIL]`, each row followed by its scale."""
    scale = weight.float().abs().amax(dim=1).div(127).clamp_(min=torch.finfo(torch.float32).tiny)
    packed = torch.zeros(len(weight), weight.shape[1] + INT8_TAIL, dtype=torch.int8, device=weight.device)
    packed[:, : weight.shape[1]] = (weight.float() / scale[:, None]).round_()
    packed[:, weight.shape[1] : weight.shape[1] + 4] = scale[:, None].view(torch.int8)
    return packed


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str = "none",
    dtype: torch.dtype | None = None,
    is_whole: bool = False,
    **launch: bool,
) -> torch.Tensor:
    """Return `activation(x @ weight.T + bias)` for `x[T, K]`, in `dtype` or `x`'s own.

    `weight[O, K]` is bfloat16, float16, float32, or what `pack_int8` made; the product takes the rows in the weights'
    dtype (beside int8: bfloat16) and sums in float32. K is a multiple of 16. `is_whole` sums K in one span, which
    saves a launch. `launch` are Triton's options.
    """
    out = x.new_empty(len(x), len(weight), dtype=dtype or x.dtype)
    sums = _run(x, weight, bias, activation, out, is_whole, launch)
    if sums is not out:
        epilogue = {"HAS_SCALE": weight.dtype == torch.int8, "HAS_BIAS": bias is not None, "ACTIVATION": activation}
        scale = _scale(x, weight)
        add_spans_kernel[(triton.cdiv(len(weight), ADD_BLOCK), len(x))](
            sums, scale, x if bias is None else bias, out, len(x), OUTPUTS=len(weight), STRIDE=weight.stride(0),
            SPLIT=len(sums), BLOCK_O=ADD_BLOCK, **epilogue, num_warps=ADD_WARPS, **launch,
        )  # fmt: skip
    return out


def linear_sums(x: torch.Tensor, weight: torch.Tensor, **launch: bool) -> torch.Tensor:
    """As `linear`, but return the spans' sums `[S, T, O]` float32, for the next kernel to add in order; not for int8."""
    whole = x.new_empty(1, len(x), len(weight), dtype=torch.float32)
    return _run(x, weight, None, "none", whole, False, launch)


def _run(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    out: torch.Tensor,
    is_whole: bool,
    launch: dict[str, bool],
) -> torch.Tensor:
    """Fill `out` and return it, or return the spans' sums where several programs share an output."""
    x = x.contiguous()
    (T, K), outputs = x.shape, len(weight)
    matrix, tiles = plan(outputs, K, weight.element_size(), is_whole), tile(T, weight.element_size())
    has_sums = tiles.is_side_by_side and matrix.split > 1
    if has_sums:
        out = x.new_empty(matrix.split, T, outputs, dtype=torch.float32)
    is_int8 = weight.dtype == torch.int8
    grid = (triton.cdiv(outputs, tiles.block_o), triton.cdiv(T, tiles.block_t), matrix.split if has_sums else 1)
    linear_kernel[grid](
        x, weight, _scale(x, weight), x if bias is None else bias, out, T,
        OUTPUTS=outputs, K=K, STRIDE=weight.stride(0), SPLIT=matrix.split, IS_SIDE_BY_SIDE=tiles.is_side_by_side,
        DTYPE=tl.bfloat16 if is_int8 else TRITON_DTYPES[weight.dtype],
        HAS_SCALE=is_int8, HAS_BIAS=bias is not None, ACTIVATION=activation, BLOCK_K=matrix.block_k,
        **tiles.options(T), **launch,
    )  # fmt: skip
    return out


def _scale(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return the scales of int8 rows, or for others something that is not read."""
    K = x.shape[1]
    return weight[:, K : K + 4].view(torch.float32) if weight.dtype == torch.int8 else x


TRITON_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}

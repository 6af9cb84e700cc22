"""Products of few rows with large matrices: every weight is read once, and a row's result knows nothing of the others.

The weights (`packed.py`) take the side of the product that tensor cores want large, the rows the side that may be
small: `out.T = weight @ x.T`. The sums of the matrix's spans are added by a second launch (few rows: the spans run side
by side) or by the same program (many rows). The number of rows only chooses how many share a program. A span's sum of
int8 weights is multiplied by their scales once, when it is whole.

Where the card is of the generation that `hopper.py` is for, that runs 16-bit products: the same, with other copies.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl

from kernels.triton import hopper, int8
from kernels.triton.overlap import INTERPRETED, let_successor_begin, wait_for_inputs
from kernels.triton.packed import MAX_BLOCK_K, PANEL, TRITON_DTYPES, in_words, plan

MAX_ROWS_SIDE_BY_SIDE = 512  # above it there are programs enough without cutting K
ADD_BLOCK, ADD_WARPS = 256, 2  # of the launch that adds spans

_PANEL = tl.constexpr(PANEL)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """Apply an activation by its name."""
    if ACTIVATION == "sigmoid":
        x = 1.0 / (1.0 + tl.exp(-x))
    elif ACTIVATION == "tanh":
        x = 2.0 / (1.0 + tl.exp(-2.0 * x)) - 1.0
    elif ACTIVATION == "relu_squared":
        x = tl.maximum(x, 0.0)
        x = x * x
    return x


@triton.jit
def add_bias(total, bias, is_output):
    """`total[O, T] + bias[O]`, never the product begun from the bias: Triton makes that of a product of one step only.

    Then a row would have other bits where its product takes several steps. The selection in between prevents it.
    """
    return tl.where(is_output[:, None], total, 0.0) + bias[:, None]


@triton.jit
def as_operand(tile, DTYPE: tl.constexpr):
    """The tile as the product takes it; bfloat16 is only stored by Triton's interpreter, not computed with."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        return tile.to(tl.float32)
    return tile.to(DTYPE)


@triton.jit
def _weights_at(o, k, STRIDE: tl.constexpr, TILE_K: tl.constexpr):
    """Offsets `[O, K]` of outputs and inputs in packed weights, whose panels are STRIDE apart."""
    of_outputs = (o // _PANEL).to(tl.int64) * STRIDE + o % _PANEL * TILE_K
    return of_outputs[:, None] + (k // TILE_K * (_PANEL * TILE_K) + k % TILE_K)[None, :]


@triton.jit
def weighted_sums(
    weight, o, rows, first_k,
    K: tl.constexpr, SPLIT: tl.constexpr, STRIDE: tl.constexpr, TILE_K: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, IS_READ_ONCE: tl.constexpr,
):  # fmt: skip
    """`weight @ x.T` of outputs `o`, `[BLOCK_O, BLOCK_T]` float32, over K inputs from `first_k` on, in SPLIT spans.

    Each is summed from its front, scaled where the weights are int8 (then `weight` points to words), and added to the
    others in order. `rows[BLOCK_T]` point to the rows' first inputs. Waits for what comes before this kernel; what
    does not depend on it is asked for before.
    """
    IS_INT8: tl.constexpr = weight.dtype.element_ty == tl.int32
    IN_ONE: tl.constexpr = 4 if IS_INT8 else 1
    begin_of_panels = weight + first_k * (_PANEL // IN_ONE)
    in_tile = tl.arange(0, BLOCK_K // IN_ONE)
    weights = begin_of_panels + _weights_at(o, in_tile, STRIDE // IN_ONE, TILE_K // IN_ONE)
    inputs = rows[:, None] + (first_k + tl.arange(0, BLOCK_K))[None, :]
    if IS_INT8:
        SCALES: tl.constexpr = (STRIDE - _PANEL * TILE_K) // IN_ONE
        scale_words = tl.load(weight + (o // _PANEL).to(tl.int64) * (STRIDE // IN_ONE) + SCALES + o % _PANEL)
        scales = scale_words.to(tl.float32, bitcast=True)
    wait_for_inputs()
    total = tl.zeros([BLOCK_O, BLOCK_T], tl.float32)
    for part in range(SPLIT):
        sums = tl.zeros([BLOCK_O, BLOCK_T], tl.float32)
        for begin in range(0, K // SPLIT, BLOCK_K):
            k = part * (K // SPLIT) + begin
            w = tl.load(weights + k * (_PANEL // IN_ONE), eviction_policy="evict_first" if IS_READ_ONCE else "")
            w = int8.unpacked(w, BLOCK_O, BLOCK_K) if IS_INT8 else as_operand(w, DTYPE)
            row = as_operand(tl.load(inputs + k), DTYPE)
            sums = tl.dot(w, tl.trans(row), sums, input_precision="ieee")
        if IS_INT8:
            sums *= scales[:, None]
        total += sums
    return total


@triton.jit(do_not_specialize=["T"])
def linear_kernel(
    x, weight, bias, out, T,
    OUTPUTS: tl.constexpr, K: tl.constexpr, STRIDE: tl.constexpr, TILE_K: tl.constexpr, SPLIT: tl.constexpr,
    IS_SIDE_BY_SIDE: tl.constexpr, DTYPE: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, IS_READ_ONCE: tl.constexpr,
    EARLY: tl.constexpr = False,
):  # fmt: skip
    """Program (outputs, rows, span). Side by side, `out` is `[SPLIT, T, O]` float32 and not activated yet."""
    let_successor_begin(EARLY)
    SPAN: tl.constexpr = K // SPLIT if IS_SIDE_BY_SIDE else K
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    t = tl.program_id(1).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    parts: tl.constexpr = 1 if IS_SIDE_BY_SIDE else SPLIT
    # Rows and outputs past the end read the first one's, and are not stored: no mask in the loop.
    total = weighted_sums(
        weight, tl.where(o < OUTPUTS, o, 0), x + tl.where(t < T, t, 0) * K, tl.program_id(2) * SPAN,
        SPAN, parts, STRIDE, TILE_K, DTYPE, BLOCK_O, BLOCK_T, BLOCK_K, IS_READ_ONCE,
    )  # fmt: skip
    is_inside = (o < OUTPUTS)[:, None] & (t < T)[None, :]
    to = out + (tl.program_id(2) * T + t)[None, :] * OUTPUTS + o[:, None]
    if not IS_SIDE_BY_SIDE or SPLIT == 1:
        if HAS_BIAS:
            total = add_bias(total, tl.load(bias + o, mask=o < OUTPUTS, other=0.0), o < OUTPUTS)
        total = activate(total, ACTIVATION)
    tl.store(to, total.to(out.dtype.element_ty), mask=is_inside)


@triton.jit(do_not_specialize=["T"])
def add_spans_kernel(
    sums, bias, out, T,
    OUTPUTS: tl.constexpr, SPLIT: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_O: tl.constexpr, EARLY: tl.constexpr = False,
):  # fmt: skip
    """Add the spans' sums `[SPLIT, T, O]` in order and finish as `linear_kernel` would; program (outputs, row)."""
    let_successor_begin(EARLY)
    wait_for_inputs()
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    row = tl.program_id(1).to(tl.int64)
    total = tl.zeros([BLOCK_O], tl.float32)
    for part in tl.static_range(SPLIT):
        total += tl.load(sums + (part * T + row) * OUTPUTS + o, mask=o < OUTPUTS, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + o, mask=o < OUTPUTS, other=0.0)
    tl.store(out + row * OUTPUTS + o, activate(total, ACTIVATION).to(out.dtype.element_ty), mask=o < OUTPUTS)


@dataclass(frozen=True, slots=True)
class Tile:
    """What a program does. Decides who computes a sum, never how it is summed."""

    block_o: int  # outputs, a multiple of a panel
    block_t: int  # rows
    max_k: int  # inputs at once, or fewer
    num_warps: int
    num_stages: int
    is_side_by_side: bool  # the spans of K are different programs'
    enable_fp_fusion: bool = True  # not where a program adds scaled sums: two launches could not fuse that

    def options(self, num_rows: int, span: int, tile_k: int) -> dict[str, int]:
        """Return the kernel's arguments for so many rows, and spans of so many inputs."""
        block_k = max(self.max_k, tile_k)
        while span % block_k:
            block_k //= 2
        return {
            "BLOCK_O": self.block_o,
            "BLOCK_T": self.block_t,
            "BLOCK_K": block_k,
            "IS_READ_ONCE": self.block_o == PANEL and num_rows <= self.block_t,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": self.enable_fp_fusion,
        }


@lru_cache
def tile(num_rows: int, itemsize: int, split: int = 1) -> Tile:
    """Return the tile for so many rows beside weights of so many bytes.

    float32 products are not tensor cores' and take fewer. A step of int8 ones is a tile of weights, whatever the rows,
    half the bytes of a 16-bit one: few rows have twice as many in flight.
    """
    if itemsize == 4:
        return Tile(64, 32, 32, 4, 3, num_rows <= MAX_ROWS_SIDE_BY_SIDE)
    if itemsize == 1:
        return _int8_tile(num_rows)
    is_side_by_side = num_rows <= MAX_ROWS_SIDE_BY_SIDE
    if num_rows > 256 and split == 1:
        return Tile(128, 256, 64, 8, 4, is_side_by_side)
    if num_rows > 64:
        return Tile(128, 128, 64, 8, 6 if is_side_by_side else 4, is_side_by_side)  # who adds spans has two sums
    block_t = next(rows for rows in (16, 32, 64) if rows >= num_rows)
    return Tile(PANEL, block_t, MAX_BLOCK_K, 4, 6, True)


def _int8_tile(num_rows: int) -> Tile:
    if num_rows > 64:
        return Tile(128, 128, 64, 8, 4, num_rows <= MAX_ROWS_SIDE_BY_SIDE, enable_fp_fusion=False)
    block_t, num_stages = next((rows, stages) for rows, stages in ((16, 12), (32, 12), (64, 8)) if rows >= num_rows)
    return Tile(PANEL, block_t, 64, 4, num_stages, True, enable_fp_fusion=False)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    out_features: int,
    bias: torch.Tensor | None = None,
    activation: str = "none",
    dtype: torch.dtype | None = None,
    is_whole: bool = False,
    **launch: bool,
) -> torch.Tensor:
    """Return `activation(x @ weight.T + bias)` for `x[T, K]`, in `dtype` or `x`'s own.

    `weight` is what `pack` made; the product takes the rows in the weights' dtype (beside int8: bfloat16) and sums in
    float32. `is_whole` sums K in one span, which saves a launch. `launch` are Triton's options.
    """
    out = x.new_empty(len(x), out_features, dtype=dtype or x.dtype)
    sums = _run(x, weight, bias, activation, out, is_whole, launch)
    if sums is not out:
        add_spans_kernel[(triton.cdiv(out_features, ADD_BLOCK), len(x))](
            sums, x if bias is None else bias, out, len(x), SPLIT=len(sums), BLOCK_O=ADD_BLOCK,
            **_outputs(out, bias, activation), num_warps=ADD_WARPS, **launch,
        )  # fmt: skip
    return out


def linear_sums(x: torch.Tensor, weight: torch.Tensor, out_features: int, **launch: bool) -> torch.Tensor:
    """As `linear`, but return the spans' sums `[S, T, O]` float32, for the next kernel to add in order."""
    whole = x.new_empty(1, len(x), out_features, dtype=torch.float32)
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
    """Fill `out[..., T, O]` and return it, or return the spans' sums where several programs share an output."""
    dtype = torch.bfloat16 if weight.dtype == torch.int8 else weight.dtype
    if x.element_size() > dtype.itemsize:
        x = x.to(dtype)  # tiles have room for rows of the product's dtype
    x = x.contiguous()
    (T, K), outputs = x.shape, out.shape[-1]
    matrix = plan(outputs, K, weight.element_size(), is_whole)
    tiles = tile(T, weight.element_size(), matrix.split)
    has_sums = tiles.is_side_by_side and matrix.split > 1
    if has_sums:
        out = x.new_empty(matrix.split, T, outputs, dtype=torch.float32)
    if hopper.can_run(x, weight, matrix):
        hopper.linear(x, weight, bias, out, matrix.split, tiles.is_side_by_side, activation, **launch)
        return out
    grid = (triton.cdiv(outputs, tiles.block_o), triton.cdiv(T, tiles.block_t), matrix.split if has_sums else 1)
    linear_kernel[grid](
        x, in_words(weight), x if bias is None else bias, out, T,
        K=K, STRIDE=weight.stride(0), SPLIT=matrix.split, IS_SIDE_BY_SIDE=tiles.is_side_by_side,
        DTYPE=TRITON_DTYPES[dtype], TILE_K=matrix.tile_k, **_outputs(out, bias, activation),
        **tiles.options(T, K // matrix.split, matrix.tile_k), **launch,
    )  # fmt: skip
    return out


def _outputs(out: torch.Tensor, bias: torch.Tensor | None, activation: str) -> dict[str, int | bool | str]:
    return {"OUTPUTS": out.shape[-1], "HAS_BIAS": bias is not None, "ACTIVATION": activation}

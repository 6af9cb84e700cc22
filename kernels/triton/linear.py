"""Products of few rows with large matrices: every weight is read once, and a row's result knows nothing of the others.

The weights take the side of the product that tensor cores want large, the rows the side that may be small: `out.T =
weight @ x.T`. Which inputs are summed in which order depends on the matrix alone: `K` is cut into `split` spans, each
summed from its front, and the spans' sums are added in order, by a second launch (few rows: the spans run side by
side) or by the same program (many rows). The number of rows only chooses how many share a program.

Weights are packed in panels of `PANEL` outputs, each a row of tiles `[PANEL, TILE_K]` along the inputs, so that a
program reads memory in its order.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl

from kernels.triton.overlap import INTERPRETED, let_successor_begin, wait_for_inputs

PANEL = 64  # outputs, the tensor cores' unit
TILE_BYTES = 128  # of an output in a tile
MAX_ROWS_SIDE_BY_SIDE = 256  # above it there are programs enough without cutting K
PROGRAMS_WANTED = 128  # about as many as a data centre card has processors; a constant, so that bits are no card's
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
def weights_at(o, k, STRIDE: tl.constexpr, TILE_K: tl.constexpr):
    """Offsets `[O, K]` of outputs and inputs in packed weights, whose panels are STRIDE apart."""
    of_outputs = (o // _PANEL).to(tl.int64) * STRIDE + o % _PANEL * TILE_K
    return of_outputs[:, None] + (k // TILE_K * (_PANEL * TILE_K) + k % TILE_K)[None, :]


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
            w = tl.load(weights + k * _PANEL, eviction_policy="evict_first" if IS_READ_ONCE else "")
            row = as_operand(tl.load(rows + k), DTYPE)
            sums = tl.dot(as_operand(w, DTYPE), tl.trans(row), sums, input_precision="ieee")
        total += sums
    return total


@triton.jit(do_not_specialize=["T"])
def linear_kernel(
    x, weight, scale, bias, out, T,
    OUTPUTS: tl.constexpr, K: tl.constexpr, STRIDE: tl.constexpr, TILE_K: tl.constexpr, SPLIT: tl.constexpr,
    IS_SIDE_BY_SIDE: tl.constexpr, DTYPE: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
    IS_READ_ONCE: tl.constexpr,
):  # fmt: skip
    """Program (outputs, rows, span). Side by side, `out` is `[SPLIT, T, O]` float32 and not activated yet."""
    let_successor_begin()
    SPAN: tl.constexpr = K // SPLIT if IS_SIDE_BY_SIDE else K
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    t = tl.program_id(1).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    first_k = tl.program_id(2) * SPAN
    k = tl.arange(0, BLOCK_K)
    # Rows and outputs past the end read the first one's, and are not stored: no mask in the loop.
    weights = weight + first_k * _PANEL + weights_at(tl.where(o < OUTPUTS, o, 0), k, STRIDE, TILE_K)
    rows = x + tl.where(t < T, t, 0)[:, None] * K + (first_k + k)[None, :]
    parts: tl.constexpr = 1 if IS_SIDE_BY_SIDE else SPLIT
    wait_for_inputs()
    total = weighted_sums(weights, rows, SPAN, parts, DTYPE, BLOCK_O, BLOCK_T, BLOCK_K, IS_READ_ONCE)
    is_inside = (o < OUTPUTS)[:, None] & (t < T)[None, :]
    to = out + (tl.program_id(2) * T + t)[None, :] * OUTPUTS + o[:, None]
    if not IS_SIDE_BY_SIDE or SPLIT == 1:
        if HAS_SCALE:
            total *= tl.load(scale + _scale_at(o, K, STRIDE, TILE_K), mask=o < OUTPUTS, other=0.0)[:, None]
        if HAS_BIAS:
            total = add_bias(total, tl.load(bias + o, mask=o < OUTPUTS, other=0.0), o < OUTPUTS)
        total = activate(total, ACTIVATION)
    tl.store(to, total.to(out.dtype.element_ty), mask=is_inside)


@triton.jit
def _scale_at(o, K: tl.constexpr, STRIDE: tl.constexpr, TILE_K: tl.constexpr):
    """Where the scale of int8 outputs is, in float32: a tile more, behind a panel's inputs, begins with it."""
    return (o // _PANEL).to(tl.int64) * (STRIDE // 4) + (K * _PANEL + o % _PANEL * TILE_K) // 4


@triton.jit(do_not_specialize=["T"])
def add_spans_kernel(
    sums, scale, bias, out, T,
    OUTPUTS: tl.constexpr, K: tl.constexpr, STRIDE: tl.constexpr, TILE_K: tl.constexpr, SPLIT: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_O: tl.constexpr,
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
        total *= tl.load(scale + _scale_at(o, K, STRIDE, TILE_K), mask=o < OUTPUTS, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + o, mask=o < OUTPUTS, other=0.0)
    tl.store(out + row * OUTPUTS + o, activate(total, ACTIVATION).to(out.dtype.element_ty), mask=o < OUTPUTS)


@dataclass(frozen=True, slots=True)
class Plan:
    """How a matrix `[O, K]` is stored and summed. A function of the matrix, never of the rows."""

    tile_k: int
    split: int


@lru_cache
def plan(out_features: int, in_features: int, itemsize: int, is_whole: bool = False) -> Plan:
    """Return the plan: tiles of `TILE_BYTES` an output, and one span or so many that the processors have work.

    Raises `ValueError` where `in_features` is no multiple of 16: such a matrix is not for these kernels.
    """
    if in_features % 16:
        raise ValueError(f"in_features must be a multiple of 16, not {in_features}")
    tile_k = TILE_BYTES // itemsize
    while in_features % tile_k:
        tile_k //= 2
    split = 1
    while (
        not is_whole
        and split < 8
        and split * triton.cdiv(out_features, PANEL) < PROGRAMS_WANTED
        and in_features % (2 * split * 2 * tile_k) == 0
        and in_features // (2 * split) >= 256
    ):
        split *= 2
    return Plan(tile_k, split)


@dataclass(frozen=True, slots=True)
class Tile:
    """What a program does. Decides who computes a sum, never how it is summed."""

    block_o: int  # outputs, a multiple of a panel
    block_t: int  # rows
    max_k: int  # inputs at once, or fewer
    num_warps: int
    num_stages: int
    is_side_by_side: bool  # the spans of K are different programs'

    def options(self, num_rows: int, span: int, tile_k: int) -> dict[str, int]:
        """Return the kernel's arguments for so many rows, and spans of so many inputs."""
        block_k = max(self.max_k, tile_k)
        while span % block_k:
            block_k //= 2
        return {
            "BLOCK_O": self.block_o,
            "BLOCK_T": self.block_t,
            "BLOCK_K": block_k,
            "TILE_K": tile_k,
            "IS_READ_ONCE": self.block_o == PANEL and num_rows <= self.block_t,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


@lru_cache
def tile(num_rows: int, itemsize: int, split: int = 1) -> Tile:
    """Return the tile for so many rows; float32 products are not tensor cores' and take fewer."""
    if itemsize == 4:
        return Tile(64, 32, 32, 4, 3, num_rows <= MAX_ROWS_SIDE_BY_SIDE)
    if num_rows > MAX_ROWS_SIDE_BY_SIDE:
        # A program that adds spans needs room for two sums.
        return Tile(128, 256, 64, 8, 4, False) if split == 1 else Tile(128, 128, 64, 8, 4, False)
    if num_rows > 64:
        return Tile(128, 128, 64, 8, 6, True)
    block_t = next(rows for rows in (16, 32, 64) if rows >= num_rows)
    return Tile(PANEL, block_t, 128, 4, 6, True)


def can_run(weight: torch.Tensor) -> bool:
    """Say whether the kernels take a matrix `[O, K]`."""
    return weight.dtype in TRITON_DTYPES and weight.shape[1] % 16 == 0


def is_packed(weight: torch.Tensor) -> bool:
    """Say whether `pack` made this."""
    return weight.ndim == 4


def pack(weight: torch.Tensor, int8: bool = False) -> torch.Tensor:
    """Return `weight[O, K]` as `[panels, tiles, PANEL, tile_k]`, outputs padded with zeros.

    `int8`: as integers, with a tile more behind each panel, in which an output's row begins with its float32 scale.
    """
    outputs, K = weight.shape
    scale = None
    if int8:
        scale = weight.float().abs().amax(dim=1).div(127).clamp_(min=torch.finfo(torch.float32).tiny)
        weight = (weight.float() / scale[:, None]).round_().to(torch.int8)
    tile_k = plan(outputs, K, weight.element_size()).tile_k
    panels, tiles = triton.cdiv(outputs, PANEL), K // tile_k
    padded = weight.new_zeros(panels * PANEL, K)
    padded[:outputs] = weight
    packed = weight.new_zeros(panels, tiles + int8, PANEL, tile_k)
    packed[:, :tiles] = padded.view(panels, PANEL, tiles, tile_k).transpose(1, 2)
    if scale is not None:
        scales = scale.new_zeros(panels * PANEL)
        scales[:outputs] = scale
        packed[:, tiles, :, :4] = scales.view(panels, PANEL, 1).view(torch.int8)
    return packed


def unpack(weight: torch.Tensor, out_features: int) -> torch.Tensor:
    """Return the `weight[O, K]` that `pack` was given; not for int8."""
    return weight.transpose(1, 2).reshape(len(weight) * PANEL, -1)[:out_features]


def plain(weight: torch.Tensor, out_features: int) -> torch.Tensor:
    """Return the matrix `[O, K]`, packed or not."""
    return unpack(weight, out_features) if is_packed(weight) else weight


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
            sums, _scales(weight), x if bias is None else bias, out, len(x), K=x.shape[1], SPLIT=len(sums),
            TILE_K=weight.shape[3], BLOCK_O=ADD_BLOCK, **_matrix(weight, out, bias, activation),
            num_warps=ADD_WARPS, **launch,
        )  # fmt: skip
    return out


def linear_sums(x: torch.Tensor, weight: torch.Tensor, out_features: int, **launch: bool) -> torch.Tensor:
    """As `linear`, but return the spans' sums `[S, T, O]` float32, for the next kernel to add in order.

    Not for int8.
    """
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
    x = x.contiguous()
    (T, K), outputs = x.shape, out.shape[-1]
    matrix = plan(outputs, K, weight.element_size(), is_whole)
    tiles = tile(T, weight.element_size(), matrix.split)
    has_sums = tiles.is_side_by_side and matrix.split > 1
    if has_sums:
        out = x.new_empty(matrix.split, T, outputs, dtype=torch.float32)
    grid = (triton.cdiv(outputs, tiles.block_o), triton.cdiv(T, tiles.block_t), matrix.split if has_sums else 1)
    linear_kernel[grid](
        x, weight, _scales(weight), x if bias is None else bias, out, T,
        K=K, SPLIT=matrix.split, IS_SIDE_BY_SIDE=tiles.is_side_by_side,
        DTYPE=tl.bfloat16 if weight.dtype == torch.int8 else TRITON_DTYPES[weight.dtype],
        **_matrix(weight, out, bias, activation), **tiles.options(T, K // matrix.split, matrix.tile_k), **launch,
    )  # fmt: skip
    return out


def _matrix(
    weight: torch.Tensor, out: torch.Tensor, bias: torch.Tensor | None, activation: str
) -> dict[str, int | bool | str]:
    return {
        "OUTPUTS": out.shape[-1],
        "STRIDE": weight.stride(0),
        "HAS_SCALE": weight.dtype == torch.int8,
        "HAS_BIAS": bias is not None,
        "ACTIVATION": activation,
    }


def _scales(weight: torch.Tensor) -> torch.Tensor:
    """Return what int8 weights find their scales in, or for others something that is not read."""
    return weight.view(torch.float32) if weight.dtype == torch.int8 else weight


TRITON_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}

"""The residual stream's two ends: embedded tokens into it, normed rows out of it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.triton.overlap import let_successor_begin, wait_for_inputs
from kernels.triton.shift_mix import FP_FUSION, NUM_WARPS, residual, statistics

GATHER_BLOCK = 1024


@triton.jit
def embed_kernel(
    token_ids, embedding, ln_weight, ln_bias, out, eps, C: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """`LayerNorm(embedding[token])`; program (token)."""
    let_successor_begin(True)
    wait_for_inputs()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    is_inside = columns < C
    token_id = tl.load(token_ids + row)
    values = tl.load(embedding + token_id * C + columns, mask=is_inside, other=0.0).to(tl.float32)
    mean = tl.sum(values, axis=0) / C
    centred = tl.where(is_inside, values - mean, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / C + eps)
    weight = tl.load(ln_weight + columns, mask=is_inside, other=0.0)
    bias = tl.load(ln_bias + columns, mask=is_inside, other=0.0)
    tl.store(out + row * C + columns, centred * scale * weight + bias, mask=is_inside)


@triton.jit(do_not_specialize=["T"])
def gather_kernel(
    x, sums, rows, out, T, C: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr = False
):  # fmt: skip
    """Chosen rows of the residual stream, sums added; program (row, part)."""
    let_successor_begin(EARLY)
    wait_for_inputs()
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(rows + tl.program_id(0)).to(tl.int64)
    values = residual(x, sums, row, columns, columns < C, T, C, SPLIT)
    tl.store(out + tl.program_id(0).to(tl.int64) * C + columns, values, mask=columns < C)


@triton.jit(do_not_specialize=["T"])
def norm_kernel(
    x, sums, rows, ln_weight, ln_bias, out, T, eps,
    C: tl.constexpr, WIDTH: tl.constexpr, SPLIT: tl.constexpr, IS_GATHERED: tl.constexpr,
    EARLY: tl.constexpr = False,
):  # fmt: skip
    """`LayerNorm` of rows of the residual stream, sums added, or of all rows; program (row)."""
    let_successor_begin(EARLY)
    columns = tl.arange(0, WIDTH)
    is_inside = columns < C
    weight = tl.load(ln_weight + columns, mask=is_inside, other=0.0)
    bias = tl.load(ln_bias + columns, mask=is_inside, other=0.0)
    wait_for_inputs()
    row = tl.program_id(0).to(tl.int64)
    if IS_GATHERED:
        row = tl.load(rows + row).to(tl.int64)
    mean, scale = statistics(x, sums, row, T, eps, C, WIDTH, SPLIT)
    values = (residual(x, sums, row, columns, is_inside, T, C, SPLIT) - mean) * scale * weight + bias
    to = out + tl.program_id(0).to(tl.int64) * C + columns
    tl.store(to, values.to(out.dtype.element_ty), mask=is_inside)


def embed(
    token_ids: torch.Tensor, embedding: torch.Tensor, ln_weight: torch.Tensor, ln_bias: torch.Tensor, eps: float
) -> torch.Tensor:
    """Return `[T, C]` float32: where the residual stream begins."""
    C = embedding.shape[1]
    out = embedding.new_empty(len(token_ids), C, dtype=torch.float32)
    width = triton.next_power_of_2(C)
    embed_kernel[(len(token_ids),)](
        token_ids,
        embedding,
        ln_weight,
        ln_bias,
        out,
        eps,
        C=C,
        WIDTH=width,
        num_warps=NUM_WARPS,
        enable_fp_fusion=FP_FUSION,
    )
    return out


def gather(x: torch.Tensor, sums: torch.Tensor, rows: torch.Tensor, **launch: bool) -> torch.Tensor:
    """Return `rows` of `x[T, C]` plus, in order, `sums[S, T, C]`: `[R, C]` float32."""
    T, C = x.shape
    out = x.new_empty(len(rows), C)
    block = min(GATHER_BLOCK, triton.next_power_of_2(C))
    grid = (len(rows), triton.cdiv(C, block))
    gather_kernel[grid](
        x,
        sums,
        rows,
        out,
        T,
        C=C,
        SPLIT=len(sums),
        BLOCK=block,
        num_warps=NUM_WARPS,
        enable_fp_fusion=FP_FUSION,
        **launch,
    )
    return out


def norm(
    x: torch.Tensor,
    ln_weight: torch.Tensor,
    ln_bias: torch.Tensor,
    eps: float,
    dtype: torch.dtype,
    gathered: tuple[torch.Tensor, torch.Tensor] | None = None,
    **launch: bool,
) -> torch.Tensor:
    """Return `LayerNorm(x[R, C])` in `dtype`; with `gathered`, sums and rows, that of what `gather` would return."""
    T, C = x.shape
    sums, rows = gathered or (None, None)
    out = x.new_empty(T if rows is None else len(rows), C, dtype=dtype)
    norm_kernel[(len(out),)](
        x, x if sums is None else sums, x if rows is None else rows, ln_weight, ln_bias, out, T, eps,
        C=C, WIDTH=triton.next_power_of_2(C), SPLIT=0 if sums is None else len(sums), IS_GATHERED=rows is not None,
        num_warps=NUM_WARPS, enable_fp_fusion=FP_FUSION, **launch,
    )  # fmt: skip
    return out

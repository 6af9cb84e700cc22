"""Layer norm, token shift and the mixes of a block in one launch, and a second one where sequences are longer than one.

Several programs share a token: each sums the whole row, which is in cache after the first, and writes its own part of
the mixes. A token's predecessor is normed again rather than waited for. Sums have one order, whatever the batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

MAX_WIDTH = 16384  # a program sums a whole row
NUM_WARPS = 4
BLOCK = 1024  # channels a program writes


@triton.jit
def _statistics(x, C: tl.constexpr, WIDTH: tl.constexpr, eps):
    """Mean and reciprocal deviation of the row at `x`; WIDTH is the power of two that holds C."""
    columns = tl.arange(0, WIDTH)
    values = tl.load(x + columns, mask=columns < C, other=0.0)
    mean = tl.sum(values, axis=0) / C
    centred = tl.where(columns < C, values - mean, 0.0)
    return mean, 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / C + eps)


@triton.jit
def _normed(x, ln_weight, ln_bias, columns, is_inside, eps, C: tl.constexpr, WIDTH: tl.constexpr):
    """The part `columns` of the layer-normed row at `x`."""
    mean, scale = _statistics(x, C, WIDTH, eps)
    weight = tl.load(ln_weight + columns, mask=is_inside, other=0.0)
    bias = tl.load(ln_bias + columns, mask=is_inside, other=0.0)
    return (tl.load(x + columns, mask=is_inside, other=0.0) - mean) * scale * weight + bias


@triton.jit(do_not_specialize=["T"])
def step_kernel(
    x, ln_weight, ln_bias, shift, mix, slots, out, shift_stride, T, eps,
    M: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One token a sequence; program (row, part). A row with slot -1 touches no state, and its result is zero."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_inside = columns < C
    slot = tl.load(slots + row).to(tl.int64)
    if slot >= 0:
        h = _normed(x + row * C, ln_weight, ln_bias, columns, is_inside, eps, C, WIDTH)
        carried = shift + slot * shift_stride + columns
        difference = tl.load(carried, mask=is_inside, other=0.0).to(tl.float32) - h
        tl.store(carried, h.to(shift.dtype.element_ty), mask=is_inside)
        for m in tl.static_range(M):
            mixed = h + difference * tl.load(mix + m * C + columns, mask=is_inside, other=0.0)
            tl.store(out + (m * T + row) * C + columns, mixed.to(out.dtype.element_ty), mask=is_inside)
    else:
        for m in tl.static_range(M):
            tl.store(out + (m * T + row) * C + columns, tl.zeros([BLOCK], out.dtype.element_ty), mask=is_inside)


@triton.jit(do_not_specialize=["T", "num_rows"])
def prefill_kernel(
    x, ln_weight, ln_bias, shift, mix, slots, starts, out, shift_stride, T, num_rows, eps,
    M: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Packed sequences; program (token, part). The states are read only: `remember_kernel` writes them afterwards."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_inside = columns < C
    rows = tl.arange(0, ROWS)  # ROWS is a power of two not less than the number of sequences
    begins = tl.load(starts + rows, mask=rows < num_rows, other=T)
    row = tl.sum((begins <= token).to(tl.int32), axis=0) - 1
    slot = tl.load(slots + row).to(tl.int64)
    if slot >= 0:
        h = _normed(x + token * C, ln_weight, ln_bias, columns, is_inside, eps, C, WIDTH)
        if token == tl.load(starts + row):
            previous = tl.load(shift + slot * shift_stride + columns, mask=is_inside, other=0.0).to(tl.float32)
        else:
            previous = _normed(x + (token - 1) * C, ln_weight, ln_bias, columns, is_inside, eps, C, WIDTH)
        difference = previous - h
        for m in tl.static_range(M):
            mixed = h + difference * tl.load(mix + m * C + columns, mask=is_inside, other=0.0)
            tl.store(out + (m * T + token) * C + columns, mixed.to(out.dtype.element_ty), mask=is_inside)
    else:
        for m in tl.static_range(M):
            tl.store(out + (m * T + token) * C + columns, tl.zeros([BLOCK], out.dtype.element_ty), mask=is_inside)


@triton.jit
def remember_kernel(
    x, ln_weight, ln_bias, shift, slots, starts, shift_stride, eps,
    C: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Give each sequence's slot its last normed row; program (sequence, part)."""
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_inside = columns < C
    slot = tl.load(slots + row).to(tl.int64)
    if slot >= 0:
        last = tl.load(starts + row + 1).to(tl.int64) - 1
        h = _normed(x + last * C, ln_weight, ln_bias, columns, is_inside, eps, C, WIDTH)
        tl.store(shift + slot * shift_stride + columns, h.to(shift.dtype.element_ty), mask=is_inside)


def can_run(shift: torch.Tensor) -> bool:
    """Say whether the kernels take this state: contiguous within a slot, rows of up to `MAX_WIDTH`."""
    return shift.stride(1) == 1 and shift.shape[1] <= MAX_WIDTH and shift.dtype in (torch.float32, torch.float16)


def shift_mix(
    x: torch.Tensor,
    ln_weight: torch.Tensor,
    ln_bias: torch.Tensor,
    eps: float,
    shift: torch.Tensor,
    mix: torch.Tensor,
    slots: torch.Tensor,
    starts: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """See `kernels.shift_mix`; a slot of -1 is a padding row, and `shift` may be float16."""
    (T, C), M = x.shape, len(mix)
    x = x.float().contiguous()
    out = x.new_empty(M, T, C, dtype=dtype)
    width = triton.next_power_of_2(C)
    block = min(BLOCK, width)
    parts = triton.cdiv(C, block)
    sizes = {"C": C, "WIDTH": width, "BLOCK": block, "num_warps": NUM_WARPS}
    norm = (x, ln_weight, ln_bias, shift)
    if len(slots) == T:
        step_kernel[(T, parts)](*norm, mix, slots, out, shift.stride(0), T, eps, M=M, **sizes)
        return out
    num_rows = len(slots)
    prefill_kernel[(T, parts)](
        *norm, mix, slots, starts, out, shift.stride(0), T, num_rows, eps,
        M=M, ROWS=max(16, triton.next_power_of_2(num_rows)), **sizes,
    )  # fmt: skip
    remember_kernel[(num_rows, parts)](*norm, slots, starts, shift.stride(0), eps, **sizes)
    return out

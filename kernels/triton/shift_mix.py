"""Layer norm, token shift and the mixes of a block in one launch.

The row may still be a residual row and the sums of the projection before: then these are added first, in order, and
the new residual row is written too. Several programs share a token: each sums the whole row, which is in cache after
the first, and writes its own part of the mixes. A program of a prompt norms the predecessor of its first token again
rather than wait for it. Sums have one order, whatever the batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.triton.overlap import let_successor_begin, wait_for_inputs

MAX_WIDTH = 16384  # a program sums a whole row
NUM_WARPS = 8
MOST_TOKENS = 8  # of a prompt for a program: each but the first finds its predecessor normed
PROGRAMS_WANTED = 128  # or a program has fewer tokens
FP_FUSION = False  # which products and sums become one instruction must not depend on what a program writes


@triton.jit
def residual(x, sums, row, columns, is_inside, T, C: tl.constexpr, SPLIT: tl.constexpr):
    """The part `columns` of a row of the residual stream `x[T, C]`, to which `sums[SPLIT, T, C]` are added in order."""
    values = tl.load(x + row * C + columns, mask=is_inside, other=0.0)
    if SPLIT > 0:
        total = tl.load(sums + row * C + columns, mask=is_inside, other=0.0)
        for part in tl.static_range(1, SPLIT):
            total += tl.load(sums + (part * T + row) * C + columns, mask=is_inside, other=0.0)
        values += total
    return values


@triton.jit
def statistics(x, sums, row, T, eps, C: tl.constexpr, WIDTH: tl.constexpr, SPLIT: tl.constexpr):
    """Mean and reciprocal deviation of a row; WIDTH is the power of two that holds C."""
    columns = tl.arange(0, WIDTH)
    values = residual(x, sums, row, columns, columns < C, T, C, SPLIT)
    mean = tl.sum(values, axis=0) / C
    centred = tl.where(columns < C, values - mean, 0.0)
    return mean, 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / C + eps)


@triton.jit
def _normed(
    x, sums, row, T, ln_weight, ln_bias, columns, is_inside, eps,
    C: tl.constexpr, WIDTH: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """The part `columns` of a row, and of the row after layer norm with that part's weights and biases."""
    mean, scale = statistics(x, sums, row, T, eps, C, WIDTH, SPLIT)
    values = residual(x, sums, row, columns, is_inside, T, C, SPLIT)
    return values, (values - mean) * scale * ln_weight + ln_bias


@triton.jit
def _parameters(ln_weight, ln_bias, mix, columns, is_inside, M: tl.constexpr, M_PADDED: tl.constexpr, C: tl.constexpr):
    """Weights and biases of the norm, and the mixes `[M, columns]`."""
    weight = tl.load(ln_weight + columns, mask=is_inside, other=0.0)
    bias = tl.load(ln_bias + columns, mask=is_inside, other=0.0)
    m = tl.arange(0, M_PADDED)[:, None]
    return weight, bias, tl.load(mix + m * C + columns[None, :], mask=(m < M) & is_inside[None, :], other=0.0)


@triton.jit
def _store_mixes(
    out, h, difference, mixes, row, T, columns, is_inside, M: tl.constexpr, M_PADDED: tl.constexpr, C: tl.constexpr
):
    m = tl.arange(0, M_PADDED)[:, None]
    to = out + (m * T + row) * C + columns[None, :]
    mixed = h[None, :] + difference[None, :] * mixes
    tl.store(to, mixed.to(out.dtype.element_ty), mask=(m < M) & is_inside[None, :])


@triton.jit(do_not_specialize=["T"])
def step_kernel(
    x, sums, x_out, ln_weight, ln_bias, shift, mix, slots, out, shift_stride, T, eps,
    SPLIT: tl.constexpr, M: tl.constexpr, M_PADDED: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, EARLY: tl.constexpr = False,
):  # fmt: skip
    """One token a sequence; program (row, part). A row with slot -1 touches no state, and its mixes are zero."""
    let_successor_begin(EARLY)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_inside = columns < C
    slot = tl.load(slots + row).to(tl.int64)
    is_row = is_inside & (slot >= 0)
    carried = shift + tl.maximum(slot, 0) * shift_stride + columns
    before = tl.load(carried, mask=is_row, other=0.0).to(tl.float32)
    weight, bias, mixes = _parameters(ln_weight, ln_bias, mix, columns, is_inside, M, M_PADDED, C)
    wait_for_inputs()
    values, h = _normed(x, sums, row, T, weight, bias, columns, is_inside, eps, C, WIDTH, SPLIT)
    if SPLIT > 0:
        tl.store(x_out + row * C + columns, tl.where(slot >= 0, values, 0.0), mask=is_inside)
    h = tl.where(slot >= 0, h, 0.0)
    tl.store(carried, h.to(shift.dtype.element_ty), mask=is_row)
    _store_mixes(out, h, before - h, mixes, row, T, columns, is_inside, M, M_PADDED, C)


@triton.jit(do_not_specialize=["T", "num_rows"])
def prefill_kernel(
    x, sums, x_out, ln_weight, ln_bias, shift, mix, slots, starts, out, shift_stride, T, num_rows, eps,
    SPLIT: tl.constexpr, M: tl.constexpr, M_PADDED: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, EARLY: tl.constexpr = False,
):  # fmt: skip
    """Packed sequences; program (TOKENS tokens, part).

    Whoever has a sequence's first token reads its state, and then gives it the last token's row, normed once more: so
    nobody else must wait until it was read.
    """
    let_successor_begin(EARLY)
    first = tl.program_id(0).to(tl.int64) * TOKENS
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_inside = columns < C
    rows = tl.arange(0, ROWS)  # ROWS is a power of two not less than the number of sequences
    begins = tl.load(starts + rows, mask=rows < num_rows, other=T)
    weight, bias, mixes = _parameters(ln_weight, ln_bias, mix, columns, is_inside, M, M_PADDED, C)
    wait_for_inputs()
    before = tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range(TOKENS):
        token = tl.minimum(first + i, T - 1)
        is_stored = is_inside & (first + i < T)
        row = tl.sum((begins <= token).to(tl.int32), axis=0) - 1
        slot = tl.load(slots + row).to(tl.int64)
        is_first = token == tl.load(starts + row)
        values, h = _normed(x, sums, token, T, weight, bias, columns, is_inside, eps, C, WIDTH, SPLIT)
        if SPLIT > 0:
            tl.store(x_out + token * C + columns, tl.where(slot >= 0, values, 0.0), mask=is_stored)
        if i == 0 and not is_first:
            _, before = _normed(x, sums, token - 1, T, weight, bias, columns, is_inside, eps, C, WIDTH, SPLIT)
        carried = shift + tl.maximum(slot, 0) * shift_stride + columns
        state = tl.load(carried, mask=is_inside & is_first & (slot >= 0), other=0.0).to(tl.float32)
        if is_first and slot >= 0:
            last = tl.load(starts + row + 1).to(tl.int64) - 1
            remembered = h
            if last != token:
                _, remembered = _normed(x, sums, last, T, weight, bias, columns, is_inside, eps, C, WIDTH, SPLIT)
            tl.store(carried, remembered.to(shift.dtype.element_ty), mask=is_inside)
        previous = tl.where(is_first, state, before)
        before = h
        h, previous = tl.where(slot >= 0, h, 0.0), tl.where(slot >= 0, previous, 0.0)
        _store_mixes(out, h, previous - h, mixes, token, T, columns, is_stored, M, M_PADDED, C)


def block_for(num_tokens: int, width: int) -> int:
    """Return how many channels a program writes: fewer where there are too few programs else."""
    if num_tokens <= 64:
        return min(256 if num_tokens <= 16 else 512, width)
    return min(1024, width)


def tokens_for(num_tokens: int) -> int:
    """Return how many tokens of so many a program takes."""
    for_each = max(1, num_tokens // PROGRAMS_WANTED)
    return min(MOST_TOKENS, 1 << (for_each.bit_length() - 1))


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
    x = x.float().contiguous()
    out, _ = add_and_shift_mix(x, None, ln_weight, ln_bias, eps, shift, mix, slots, starts, dtype)
    return out


def add_and_shift_mix(
    x: torch.Tensor,
    sums: torch.Tensor | None,
    ln_weight: torch.Tensor,
    ln_bias: torch.Tensor,
    eps: float,
    shift: torch.Tensor,
    mix: torch.Tensor,
    slots: torch.Tensor,
    starts: torch.Tensor,
    dtype: torch.dtype,
    **launch: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `shift_mix`, of the sum of `x[T, C]` and, in order, `sums[S, T, C]`; return that sum too, or `x` itself."""
    (T, C), M, num_rows = x.shape, len(mix), len(slots)
    split = 0 if sums is None else len(sums)
    addends = (x, x if sums is None else sums)
    out = x.new_empty(M, T, C, dtype=dtype)
    x_out = x if sums is None else torch.empty_like(x)
    width = triton.next_power_of_2(C)
    block = block_for(T, width)
    parts = triton.cdiv(C, block)
    sizes = {"SPLIT": split, "C": C, "WIDTH": width, "BLOCK": block}
    sizes |= {"num_warps": NUM_WARPS, "enable_fp_fusion": FP_FUSION, **launch}
    norm = (ln_weight, ln_bias, shift)
    mixes = {"M": M, "M_PADDED": triton.next_power_of_2(M)}
    if num_rows == T:
        step_kernel[(T, parts)](*addends, x_out, *norm, mix, slots, out, shift.stride(0), T, eps, **mixes, **sizes)
        return out, x_out
    tokens = tokens_for(T)
    prefill_kernel[(triton.cdiv(T, tokens), parts)](
        *addends, x_out, *norm, mix, slots, starts, out, shift.stride(0), T, num_rows, eps,
        **mixes, TOKENS=tokens, ROWS=max(16, triton.next_power_of_2(num_rows)), **sizes,
    )  # fmt: skip
    return out, x_out

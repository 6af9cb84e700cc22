"""Time mixing between its projections: decay, removal, state, group norm, bonus and gate.

A sequence of one token takes one launch, in which a program owns one head, with its whole state `S[N(value), N(key)]`
in registers. Longer ones take four more: everything about a chunk that does not need the state before it, for all
chunks at once (`solve_kernel`, partly token by token; `prepare_kernel`, the rest); the states, chunk after chunk
(`scan_kernel`); and what follows the read-out (`finish_kernel`). Chunks are counted from a sequence's first token in
the call, so a prompt cut at multiples of `CHUNK_LEN` gives the same bits however often it is cut. A lone token is the
same in a batch of lone tokens and beside prompts. A float16 state is rounded after a lone token, with dither, and after
a chunk, to the nearest; what lies between is float32 always.

Yang, Wang, Shen, Panda, Kim, "Parallelizing linear transformers with the delta rule over sequence length", 2024, for
the chunked form; `kernels.chunked` has the letters used here, and the same with gradients.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from kernels.triton.overlap import INTERPRETED, let_successor_begin, wait_for_inputs

HEAD_SIZES = (16, 32, 64, 128)
CHUNK_LEN = 32  # the cumulative decay of a chunk is above 0.545 ** 32 = 4e-9, and its inverse harmless in float32
STEP_WARPS, SCAN_WARPS, FINISH_WARPS = 2, 4, 4
SCAN_ROWS = 16  # of a state, which its rows do not share: several programs advance one
SCAN_STAGES = 3
# How products of a chunk are made, by how many warps of `solve_kernel` and `prepare_kernel`, and with how many
# registers a thread of the first. Three tf32 ones are float32 but for its last two bits. Beside inputs of 16 bits one
# does: it moves results of a bfloat16 model no further than steps instead of chunks.
OF_FLOAT32 = ("tf32x3", 8, 255)
OF_16_BITS = ("tf32", 4, 128)
FP_FUSION = False  # lone tokens: which products and sums become one instruction is the same beside prompts and alone

_SOLVED = tl.constexpr(CHUNK_LEN // 4)  # rows of a block that is solved row by row
_COLUMN_HASH, _ROW_HASH = tl.constexpr(0x9E3779B1 - 2**32), tl.constexpr(0x85EBCA6B - 2**32)  # as int32 has them
_LOST_BITS = tl.constexpr((1 << 13) - 1)  # of a float32, that a float16 of its size does not have
_LOG_DECAY_BOUND = tl.constexpr(-math.exp(-0.5))  # log w = -exp(-0.5) * sigmoid(dw)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _load_row(pointer, offsets, is_inside):
    if is_inside is None:  # noqa: SIM108  both would be compiled
        row = tl.load(pointer + offsets)
    else:
        row = tl.load(pointer + offsets, mask=is_inside, other=0.0)
    return row.to(tl.float32)


@triton.jit
def _value(v, v_first, value_mix, offsets, is_inside, HAS_VALUE_MIX: tl.constexpr):
    """The value after the value residual."""
    value = _load_row(v, offsets, is_inside)
    if HAS_VALUE_MIX:
        value += (_load_row(v_first, offsets, is_inside) - value) * _load_row(value_mix, offsets, is_inside)
    return value


@triton.jit
def _keys(k, a, offsets, is_inside, k_k, k_a, channels, AXIS: tl.constexpr):
    """The removal key of length 1, what it is removed by, and the key as it is written."""
    key = _load_row(k, offsets, is_inside)
    rate = _load_row(a, offsets, is_inside)
    kk = key * tl.load(k_k + channels)
    length = tl.sqrt(tl.sum(kk * kk, axis=AXIS, keep_dims=True))
    kk = kk / tl.maximum(length, 1e-12)
    return kk, kk * rate, key * (1.0 + (rate - 1.0) * tl.load(k_a + channels))


@triton.jit
def _finish(y, read, key, value, gate, bonus_weight, norm_weight, norm_bias, eps, N: tl.constexpr, AXIS: tl.constexpr):
    """Group norm of a head, bonus of the present token, gate."""
    mean = tl.sum(y, axis=AXIS, keep_dims=True) / N
    centred = y - mean
    variance = tl.sum(centred * centred, axis=AXIS, keep_dims=True) / N
    bonus = tl.sum(read * key * bonus_weight, axis=AXIS, keep_dims=True) * value
    return (centred / tl.sqrt(variance + eps) * norm_weight + norm_bias + bonus) * gate


@triton.jit
def _bits(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def _dithered(S, removal, key, removed, value):
    """One of the two neighbours that each number has in float16, the nearer one more often (`kernels/README.md`)."""
    of_columns = (_bits(removal) + _bits(key)) * _COLUMN_HASH
    of_rows = (_bits(removed) + _bits(value)) * _ROW_HASH
    dither = ((of_columns[None, :] + of_rows[:, None]) >> 19) & _LOST_BITS
    dither = tl.where(S == S, dither, 0)  # or NaN with all bits set would be followed by zero
    return ((_bits(S) + dither) & ~_LOST_BITS).to(tl.float32, bitcast=True)


@triton.jit
def step_kernel(
    r, k, v, decay, a, gate, v_first, value_mix, k_k, k_a, r_k, ln_weight, ln_bias, state, slots, starts, out,
    state_stride, C, eps, N: tl.constexpr, HAS_VALUE_MIX: tl.constexpr, IS_MIXED: tl.constexpr,
    EARLY: tl.constexpr = False,
):  # fmt: skip
    """Sequences of one token; program (sequence, head). Slot -1 touches no state, and its result is zero.

    IS_MIXED: other sequences are longer, and not this kernel's.
    """
    let_successor_begin(EARLY)
    row, head = tl.program_id(0), tl.program_id(1)
    columns = tl.arange(0, N)
    channels = head * N + columns
    token = tl.load(starts + row)
    length = 1
    if IS_MIXED:
        length = (tl.load(starts + row + 1) - token).to(tl.int32)
    offsets = token * C + channels
    slot = tl.load(slots + row).to(tl.int64)
    tile = state + tl.maximum(slot, 0) * state_stride + head * N * N + columns[:, None] * N + columns[None, :]
    if (slot >= 0) & (length == 1):
        # Everything is asked for before anything is needed.
        S = tl.load(tile).to(tl.float32)
        bonus_weight, norm_weight = tl.load(r_k + channels), tl.load(ln_weight + channels)
        norm_bias = tl.load(ln_bias + channels)
        wait_for_inputs()
        raw_decay, output_gate = _load_row(decay, offsets, None), _load_row(gate, offsets, None)
        read = _load_row(r, offsets, None)
        value = _value(v, v_first, value_mix, offsets, None, HAS_VALUE_MIX)
        kk, removal, key = _keys(k, a, offsets, None, k_k, k_a, channels, 0)
        w = tl.exp(_LOG_DECAY_BOUND * _sigmoid(raw_decay))
        removed = tl.sum(S * kk[None, :], axis=1)
        S = S * w[None, :] - removed[:, None] * removal[None, :] + value[:, None] * key[None, :]
        if state.dtype.element_ty == tl.float16:
            S = _dithered(S, -removal, key, removed, value)
        kept = S.to(state.dtype.element_ty)
        tl.store(tile, kept)
        y = tl.sum(kept.to(tl.float32) * read[None, :], axis=1)
        y = _finish(y, read, key, value, output_gate, bonus_weight, norm_weight, norm_bias, eps, N, 0)
        tl.store(out + offsets, y.to(out.dtype.element_ty))
    else:
        wait_for_inputs()
        if length == 1:
            tl.store(out + offsets, tl.zeros([N], out.dtype.element_ty))


@triton.jit
def _chunks(starts, num_rows, ROWS: tl.constexpr, L: tl.constexpr):
    """How many chunks each of `ROWS` sequences has; those of one token have none."""
    rows = tl.arange(0, ROWS)
    begins = tl.load(starts + rows, mask=rows < num_rows, other=0)
    ends = tl.load(starts + rows + 1, mask=rows < num_rows, other=0)
    return tl.where(ends - begins > 1, (ends - begins + L - 1) // L, 0).to(tl.int32)


@triton.jit
def _tokens_of_chunk(starts, chunk, num_rows, ROWS: tl.constexpr, L: tl.constexpr):
    """The sequence, first token and end of a chunk, all sequences' chunks counted; empty if there is no such chunk."""
    counts = _chunks(starts, num_rows, ROWS, L)
    before = tl.cumsum(counts, axis=0)
    row = tl.sum((before <= chunk).to(tl.int32), axis=0)
    is_there = row < num_rows
    row = tl.where(is_there, row, 0)
    first = tl.sum(tl.where(tl.arange(0, ROWS) < row, counts, 0), axis=0)
    end = tl.load(starts + row + 1).to(tl.int64)
    begin = tl.load(starts + row).to(tl.int64) + (chunk - first) * L
    return row, begin, tl.where(is_there, tl.minimum(end, begin + L), begin)


@triton.jit
def _places(begin, end, head, C, N: tl.constexpr, L: tl.constexpr):
    """A head's channels, where a chunk has them `[L, N]`, and which of its L tokens there are `[L, 1]`."""
    channels = head * N + tl.arange(0, N)
    tokens = begin + tl.arange(0, L)
    return channels, tokens[:, None] * C + channels[None, :], (tokens < end)[:, None]


@triton.jit
def _joined(inverse, strict, SIZE: tl.constexpr, L: tl.constexpr, PRECISION: tl.constexpr):
    """From inverses of blocks of SIZE rows on the diagonal to those of blocks twice as large."""
    rows, columns = tl.arange(0, L)[:, None], tl.arange(0, L)[None, :]
    is_below = (rows // (2 * SIZE) == columns // (2 * SIZE)) & (rows // SIZE != columns // SIZE)
    below = tl.dot(tl.where(is_below, strict, 0.0), inverse, input_precision=PRECISION)
    return tl.dot(inverse, below, inverse, input_precision=PRECISION)


@triton.jit
def _inverse(strict, L: tl.constexpr, PRECISION: tl.constexpr):
    """`(1 - strict)^-1` of a strictly lower triangular matrix: blocks on the diagonal row by row, then pairs of blocks.

    Products of its powers would be fewer steps, and cancel.
    """
    rows, columns = tl.arange(0, L)[:, None], tl.arange(0, L)[None, :]
    is_block = rows // _SOLVED == columns // _SOLVED
    blocks = tl.where(is_block, strict, 0.0)
    inverse = tl.where(rows == columns, 1.0, 0.0)
    for i in range(1, _SOLVED):
        is_row = rows % _SOLVED == i
        weights = tl.sum(tl.where(is_row, blocks, 0.0), axis=0)
        new = tl.sum(weights[:, None] * inverse, axis=0)
        inverse = tl.where(is_row & is_block, inverse + new[None, :], inverse)
    inverse = _joined(inverse, strict, _SOLVED, L, PRECISION)
    return _joined(inverse, strict, 2 * _SOLVED, L, PRECISION)


@triton.jit
def _log_decays(decay, offsets, is_inside):
    """Of each token, and their sums up to it; past the end nothing decays."""
    log_w = tl.where(is_inside, _LOG_DECAY_BOUND * _sigmoid(_load_row(decay, offsets, is_inside)), 0.0)
    return log_w, tl.cumsum(log_w, axis=0)


@triton.jit(do_not_specialize=["num_rows"])
def solve_kernel(
    k, v, decay, a, v_first, value_mix, k_k, k_a, starts, by_state, by_values, num_rows, C,
    ROWS: tl.constexpr, N: tl.constexpr, L: tl.constexpr, HAS_VALUE_MIX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What each token of a chunk finds under its removal key; program (chunk, head).

    That is `by_state S^T + by_values`, both `[L, N]` float32, for any state S before the chunk.
    """
    chunk, head = tl.program_id(0), tl.program_id(1)
    _, begin, end = _tokens_of_chunk(starts, chunk, num_rows, ROWS, L)
    wait_for_inputs()
    if begin < end:
        columns = tl.arange(0, N)
        channels, offsets, is_inside = _places(begin, end, head, C, N, L)
        kk, removal, key = _keys(k, a, offsets, is_inside, k_k, k_a, channels[None, :], 1)
        log_w, c = _log_decays(decay, offsets, is_inside)
        a_in = kk * tl.exp(c - log_w)
        is_before = tl.arange(0, L)[:, None] > tl.arange(0, L)[None, :]
        from_ab = tl.dot(a_in, tl.trans(-removal * tl.exp(-c)), input_precision=PRECISION)
        from_ak = tl.dot(a_in, tl.trans(key * tl.exp(-c)), input_precision=PRECISION)
        inverse = _inverse(tl.where(is_before, from_ab, 0.0), L, PRECISION)
        at = ((chunk * tl.num_programs(1) + head).to(tl.int64) * L + tl.arange(0, L))[:, None] * N + columns[None, :]
        tl.store(by_state + at, tl.dot(inverse, a_in, input_precision=PRECISION))
        value = _value(v, v_first, value_mix, offsets, is_inside, HAS_VALUE_MIX)
        found = tl.dot(tl.where(is_before, from_ak, 0.0), value, input_precision=PRECISION)
        tl.store(by_values + at, tl.dot(inverse, found, input_precision=PRECISION))


@triton.jit(do_not_specialize=["num_rows"])
def prepare_kernel(
    r, k, v, decay, a, v_first, value_mix, k_k, k_a, starts, by_state, by_values, carry, added, reads, found,
    num_rows, C,
    ROWS: tl.constexpr, N: tl.constexpr, L: tl.constexpr, HAS_VALUE_MIX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What a chunk does to any state S before it; program (chunk, head, which half).

    `S_after = S carry + added`, both `[N, N]`, and the read-outs are `reads S^T + found`, both `[L, N]`; all float32.
    """
    chunk, head = tl.program_id(0), tl.program_id(1)
    _, begin, end = _tokens_of_chunk(starts, chunk, num_rows, ROWS, L)
    wait_for_inputs()
    if begin < end:
        columns = tl.arange(0, N)
        channels, offsets, is_inside = _places(begin, end, head, C, N, L)
        part = ((chunk * tl.num_programs(1) + head).to(tl.int64) * L + tl.arange(0, L))[:, None] * N + columns[None, :]
        from_state, from_values = tl.load(by_state + part), tl.load(by_values + part)
        value = _value(v, v_first, value_mix, offsets, is_inside, HAS_VALUE_MIX)
        _kk, removal, key = _keys(k, a, offsets, is_inside, k_k, k_a, channels[None, :], 1)
        log_w, c = _log_decays(decay, offsets, is_inside)
        if tl.program_id(2) == 0:
            is_until = tl.arange(0, L)[:, None] >= tl.arange(0, L)[None, :]
            r_in = _load_row(r, offsets, is_inside) * tl.exp(c)
            from_rb = tl.dot(r_in, tl.trans(-removal * tl.exp(-c)), input_precision=PRECISION)
            from_rb = tl.where(is_until, from_rb, 0.0)
            from_rk = tl.dot(r_in, tl.trans(key * tl.exp(-c)), input_precision=PRECISION)
            tl.store(reads + part, tl.dot(from_rb, from_state, r_in, input_precision=PRECISION))
            y = tl.dot(tl.where(is_until, from_rk, 0.0), value, input_precision=PRECISION)
            tl.store(found + part, tl.dot(from_rb, from_values, y, input_precision=PRECISION))
        else:
            c_end = tl.sum(log_w, axis=0)
            to_end = tl.exp(c_end[None, :] - c)
            removal = -removal * to_end
            whole = ((chunk * tl.num_programs(1) + head).to(tl.int64) * N + columns)[:, None] * N + columns[None, :]
            kept = tl.where(columns[:, None] == columns[None, :], tl.exp(c_end)[None, :], 0.0)
            tl.store(carry + whole, tl.dot(tl.trans(from_state), removal, kept, input_precision=PRECISION))
            S = tl.dot(tl.trans(value), key * to_end, input_precision=PRECISION)
            tl.store(added + whole, tl.dot(tl.trans(from_values), removal, S, input_precision=PRECISION))


@triton.jit
def _through_chunk(
    S, carry, added, reads, found, chunk, values, KEPT_AS: tl.constexpr, N: tl.constexpr, L: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Read out a chunk and return the state after it, of the rows `values`; `chunk` counts heads, too.

    The state is what KEPT_AS can hold, so that nobody can tell whether the pool had it in between.
    """
    columns, rows = tl.arange(0, N), tl.arange(0, L)
    whole = (chunk * N + columns)[:, None] * N + columns[None, :]
    part = (chunk * N + values)[:, None] * N + columns[None, :]
    carried = tl.load(carry + whole)
    new = tl.load(added + part)
    read = tl.load(reads + (chunk * L + rows)[:, None] * N + columns[None, :])
    at = found + (chunk * L + rows)[:, None] * N + values[None, :]
    tl.store(at, tl.dot(read, tl.trans(S), tl.load(at), input_precision=PRECISION))
    return tl.dot(S, carried, new, input_precision=PRECISION).to(KEPT_AS).to(tl.float32)


@triton.jit(do_not_specialize=["num_rows"])
def scan_kernel(
    carry, added, reads, found, state, slots, starts, state_stride, num_rows, H,
    ROWS: tl.constexpr, N: tl.constexpr, L: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Advance states through their chunks, and complete `found`; program (long sequence, head, rows of the state)."""
    head = tl.program_id(1)
    counts = _chunks(starts, num_rows, ROWS, L)
    until = tl.cumsum((counts > 0).to(tl.int32), axis=0)  # how many long sequences there are up to each
    row = tl.sum((until <= tl.program_id(0)).to(tl.int32), axis=0)
    first = tl.sum(tl.where(tl.arange(0, ROWS) < row, counts, 0), axis=0)
    count = tl.sum(tl.where(tl.arange(0, ROWS) == row, counts, 0), axis=0)
    slot = tl.load(slots + tl.minimum(row, num_rows - 1)).to(tl.int64)
    wait_for_inputs()
    if (slot >= 0) & (count > 0):
        values = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
        tile = state + slot * state_stride + head * N * N + values[:, None] * N + tl.arange(0, N)[None, :]
        S = tl.load(tile).to(tl.float32)
        if INTERPRETED:  # Triton 3.6 does not interpret run-time ranges with numpy 2.4
            chunk = first
            while chunk < first + count:
                at = (chunk * H + head).to(tl.int64)
                S = _through_chunk(S, carry, added, reads, found, at, values, state.dtype.element_ty, N, L, PRECISION)
                chunk += 1
        else:
            for chunk in tl.range(first, first + count, num_stages=STAGES):
                at = (chunk * H + head).to(tl.int64)
                S = _through_chunk(S, carry, added, reads, found, at, values, state.dtype.element_ty, N, L, PRECISION)
        tl.store(tile, S.to(state.dtype.element_ty))


@triton.jit(do_not_specialize=["num_rows"])
def finish_kernel(
    r, k, v, a, gate, v_first, value_mix, k_k, k_a, r_k, ln_weight, ln_bias, slots, starts, found, out, num_rows, C,
    eps, ROWS: tl.constexpr, N: tl.constexpr, L: tl.constexpr, HAS_VALUE_MIX: tl.constexpr,
):  # fmt: skip
    """From read-outs to results; program (chunk, head)."""
    chunk, head = tl.program_id(0), tl.program_id(1)
    row, begin, end = _tokens_of_chunk(starts, chunk, num_rows, ROWS, L)
    slot = tl.load(slots + row)
    wait_for_inputs()
    if begin < end:
        columns = tl.arange(0, N)
        channels, offsets, is_inside = _places(begin, end, head, C, N, L)
        if slot >= 0:
            at = ((chunk * tl.num_programs(1) + head).to(tl.int64) * L + tl.arange(0, L))[:, None] * N
            y = tl.load(found + at + columns[None, :])
            value = _value(v, v_first, value_mix, offsets, is_inside, HAS_VALUE_MIX)
            _, _, key = _keys(k, a, offsets, is_inside, k_k, k_a, channels[None, :], 1)
            read = _load_row(r, offsets, is_inside)
            y = _finish(
                y, read, key, value, _load_row(gate, offsets, is_inside), tl.load(r_k + channels)[None, :],
                tl.load(ln_weight + channels)[None, :], tl.load(ln_bias + channels)[None, :], eps, N, 1,
            )  # fmt: skip
            tl.store(out + offsets, y.to(out.dtype.element_ty), mask=is_inside)
        else:
            tl.store(out + offsets, tl.zeros([L, N], out.dtype.element_ty), mask=is_inside)


def can_run(state: torch.Tensor, head_size: int) -> bool:
    """Say whether the kernels take this state: heads of `HEAD_SIZES`, rows contiguous within a slot."""
    is_contiguous = state.stride()[1:] == (head_size * head_size, head_size, 1)
    return head_size in HEAD_SIZES and is_contiguous and state.dtype in (torch.float32, torch.float16)


def wkv7(
    r: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    decay: torch.Tensor,
    a: torch.Tensor,
    gate: torch.Tensor,
    v_first: torch.Tensor | None,
    value_mix: torch.Tensor | None,
    k_k: torch.Tensor,
    k_a: torch.Tensor,
    r_k: torch.Tensor,
    ln_weight: torch.Tensor,
    ln_bias: torch.Tensor,
    eps: float,
    state: torch.Tensor,
    slots: torch.Tensor,
    starts: torch.Tensor,
    num_long: int | None = None,
    **launch: bool,
) -> torch.Tensor:
    """See `kernels.wkv7`; a slot of -1 is a padding row, and `state` may be float16. `launch` are Triton's options.

    At most `num_long` sequences have several tokens, so no programs are begun for more; None: no bound is known.
    """
    (H, N), T, C, B = r_k.shape, *r.shape, len(slots)
    r, k, v, decay, a, gate = (x.contiguous() for x in (r, k, v, decay, a, gate))
    has_value_mix = v_first is not None and value_mix is not None
    residual = [x.contiguous() for x in (v_first, value_mix) if x is not None] if has_value_mix else [r, k]  # not read
    out = torch.empty_like(gate)
    norm = (r_k, ln_weight, ln_bias)
    step_kernel[(B, H)](
        r, k, v, decay, a, gate, *residual, k_k, k_a, *norm, state, slots, starts, out, state.stride(0), C, eps,
        N=N, HAS_VALUE_MIX=has_value_mix, IS_MIXED=B < T,
        num_warps=STEP_WARPS, enable_fp_fusion=FP_FUSION, **launch,
    )  # fmt: skip
    if B == T:
        return out
    num_long = min(B, T - B) if num_long is None else min(num_long, B, T - B)
    num_chunks = T // CHUNK_LEN + num_long  # or fewer
    carry, added = (r.new_empty(num_chunks, H, N, N, dtype=torch.float32) for _ in range(2))
    by_state, by_values, reads, found = (
        r.new_empty(num_chunks, H, CHUNK_LEN, N, dtype=torch.float32) for _ in range(4)
    )
    precision, num_warps, solve_registers = OF_FLOAT32 if k.dtype == torch.float32 else OF_16_BITS
    sizes = {"ROWS": max(16, triton.next_power_of_2(B)), "N": N, "L": CHUNK_LEN}
    products = {**sizes, "PRECISION": precision}
    solve_kernel[(num_chunks, H)](
        k, v, decay, a, *residual, k_k, k_a, starts, by_state, by_values, B, C,
        HAS_VALUE_MIX=has_value_mix, **products, num_warps=num_warps, maxnreg=solve_registers, **launch,
    )  # fmt: skip
    prepare_kernel[(num_chunks, H, 2)](
        r, k, v, decay, a, *residual, k_k, k_a, starts, by_state, by_values, carry, added, reads, found, B, C,
        HAS_VALUE_MIX=has_value_mix, **products, num_warps=num_warps, **launch,
    )  # fmt: skip
    block = min(SCAN_ROWS, N)
    scan_kernel[(num_long, H, N // block)](
        carry, added, reads, found, state, slots, starts, state.stride(0), B, H,
        BLOCK=block, STAGES=SCAN_STAGES, **products, num_warps=SCAN_WARPS, **launch,
    )  # fmt: skip
    finish_kernel[(num_chunks, H)](
        r, k, v, a, gate, *residual, k_k, k_a, *norm, slots, starts, found, out, B, C, eps,
        HAS_VALUE_MIX=has_value_mix, **sizes, num_warps=FINISH_WARPS, **launch,
    )  # fmt: skip
    return out

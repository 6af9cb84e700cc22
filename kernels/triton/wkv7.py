"""Time mixing between its projections: decay, removal, state, group norm, bonus and gate in one launch.

A program owns one head of one sequence, with its whole state `S[N(value), N(key)]` in registers. `step_kernel` advances
it by one token, `prefill_kernel` by any number. Both do a lone token with the same functions in the same order, so a
decode is the same in a batch of decodes and beside a prompt. A whole aligned chunk of `CHUNK_LEN` tokens goes through
the parallel form of `kernels.chunked`; which tokens these are depends on absolute positions only, never on the call:
prompts cut at multiples of `CHUNK_LEN` therefore give the same bits however often they are cut.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

HEAD_SIZES = (16, 32, 64, 128)
CHUNK_LEN = 16  # the cumulative decay of a chunk is above 0.545 ** 16 = 6e-5: harmless in float32
NUM_WARPS = 8  # with 4 the chunk spills
PRECISION = "ieee"  # the chunk's products are float32's own
FP_FUSION = False  # which products and sums become one instruction must not differ between the two kernels

_LOG_DECAY_BOUND = tl.constexpr(-math.exp(-0.5))  # log w = -exp(-0.5) * sigmoid(dw)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _load_row(pointer, offsets):
    return tl.load(pointer + offsets).to(tl.float32)


@triton.jit
def _value(v, v_first, value_mix, offsets, HAS_VALUE_MIX: tl.constexpr):
    """The value after the value residual."""
    value = _load_row(v, offsets)
    if HAS_VALUE_MIX:
        value += (_load_row(v_first, offsets) - value) * _load_row(value_mix, offsets)
    return value


@triton.jit
def _keys(k, a, offsets, k_k, k_a, channels, AXIS: tl.constexpr):
    """The removal key of length 1, what it is removed by, and the key as it is written."""
    key = _load_row(k, offsets)
    rate = _load_row(a, offsets)
    kk = key * tl.load(k_k + channels)
    length = tl.sqrt(tl.sum(kk * kk, axis=AXIS, keep_dims=True))
    kk = kk / tl.maximum(length, 1e-12)
    return kk, kk * rate, key * (1.0 + (rate - 1.0) * tl.load(k_a + channels))


@triton.jit
def _finish(
    y, read, key, value, gate, offsets, r_k, ln_weight, ln_bias, channels, eps, N: tl.constexpr, AXIS: tl.constexpr
):
    """Group norm of a head, bonus of the present token, gate."""
    mean = tl.sum(y, axis=AXIS, keep_dims=True) / N
    centred = y - mean
    variance = tl.sum(centred * centred, axis=AXIS, keep_dims=True) / N
    bonus = tl.sum(read * key * tl.load(r_k + channels), axis=AXIS, keep_dims=True) * value
    normed = centred / tl.sqrt(variance + eps) * tl.load(ln_weight + channels) + tl.load(ln_bias + channels)
    return (normed + bonus) * _load_row(gate, offsets)


@triton.jit
def _one_token(
    S, r, k, v, decay, a, gate, v_first, value_mix, k_k, k_a, r_k, ln_weight, ln_bias, eps, out, offsets, channels,
    N: tl.constexpr, HAS_VALUE_MIX: tl.constexpr,
):  # fmt: skip
    """Advance `S` by the token at `offsets[N]`, write its result, return the new `S`."""
    read = _load_row(r, offsets)
    value = _value(v, v_first, value_mix, offsets, HAS_VALUE_MIX)
    kk, removal, key = _keys(k, a, offsets, k_k, k_a, channels, 0)
    w = tl.exp(_LOG_DECAY_BOUND * _sigmoid(_load_row(decay, offsets)))
    removed = tl.sum(S * kk[None, :], axis=1)
    S = S * w[None, :] - removed[:, None] * removal[None, :] + value[:, None] * key[None, :]
    y = tl.sum(S * read[None, :], axis=1)
    y = _finish(y, read, key, value, gate, offsets, r_k, ln_weight, ln_bias, channels, eps, N, 0)
    tl.store(out + offsets, y.to(out.dtype.element_ty))
    return S


@triton.jit
def _one_chunk(
    S, r, k, v, decay, a, gate, v_first, value_mix, k_k, k_a, r_k, ln_weight, ln_bias, eps, out, offsets, channels,
    N: tl.constexpr, L: tl.constexpr, HAS_VALUE_MIX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """As `_one_token` for the L tokens at `offsets[L, N]`, all at once; the letters are those of `kernels.chunked`."""
    read = _load_row(r, offsets)
    value = _value(v, v_first, value_mix, offsets, HAS_VALUE_MIX)
    kk, removal, key = _keys(k, a, offsets, k_k, k_a, channels[None, :], 1)
    log_w = _LOG_DECAY_BOUND * _sigmoid(_load_row(decay, offsets))
    c = tl.cumsum(log_w, axis=0)
    c_end = tl.sum(log_w, axis=0)
    a_in, r_in = kk * tl.exp(c - log_w), read * tl.exp(c)
    b_grown, k_grown = tl.trans(-removal * tl.exp(-c)), tl.trans(key * tl.exp(-c))

    rows, columns = tl.arange(0, L)[:, None], tl.arange(0, L)[None, :]
    from_ab = tl.where(rows > columns, tl.dot(a_in, b_grown, input_precision=PRECISION), 0.0)
    from_ak = tl.where(rows > columns, tl.dot(a_in, k_grown, input_precision=PRECISION), 0.0)
    from_rb = tl.where(rows >= columns, tl.dot(r_in, b_grown, input_precision=PRECISION), 0.0)
    from_rk = tl.where(rows >= columns, tl.dot(r_in, k_grown, input_precision=PRECISION), 0.0)

    # What each token finds under its removal key, [L, N(value)]: a unitriangular system, solved row by row.
    S_in = tl.trans(S)
    found = tl.dot(a_in, S_in, input_precision=PRECISION)
    found = tl.dot(from_ak, value, found, input_precision=PRECISION)
    for i in range(1, L):
        weights = tl.sum(tl.where(rows == i, from_ab, 0.0), axis=0)
        found = tl.where(rows == i, found + tl.sum(weights[:, None] * found, axis=0)[None, :], found)

    y = tl.dot(r_in, S_in, input_precision=PRECISION)
    y = tl.dot(from_rb, found, y, input_precision=PRECISION)
    y = tl.dot(from_rk, value, y, input_precision=PRECISION)
    y = _finish(y, read, key, value, gate, offsets, r_k, ln_weight, ln_bias, channels[None, :], eps, N, 1)
    tl.store(out + offsets, y.to(out.dtype.element_ty))

    to_end = tl.exp(c_end[None, :] - c)
    S = S * tl.exp(c_end)[None, :]
    S = tl.dot(tl.trans(found), -removal * to_end, S, input_precision=PRECISION)
    S = tl.dot(tl.trans(value), key * to_end, S, input_precision=PRECISION)
    return S


@triton.jit
def step_kernel(
    r, k, v, decay, a, gate, v_first, value_mix, k_k, k_a, r_k, ln_weight, ln_bias, state, slots, out,
    state_stride, C, eps, N: tl.constexpr, HAS_VALUE_MIX: tl.constexpr,
):  # fmt: skip
    """One token a sequence; program (row, head). A row with slot -1 touches no state, and its result is zero."""
    row, head = tl.program_id(0), tl.program_id(1)
    columns = tl.arange(0, N)
    channels = head * N + columns
    offsets = row * C + channels
    slot = tl.load(slots + row).to(tl.int64)
    if slot >= 0:
        tile = state + slot * state_stride + head * N * N + columns[:, None] * N + columns[None, :]
        S = tl.load(tile).to(tl.float32)
        S = _one_token(
            S, r, k, v, decay, a, gate, v_first, value_mix, k_k, k_a, r_k, ln_weight, ln_bias, eps, out, offsets,
            channels, N, HAS_VALUE_MIX,
        )  # fmt: skip
        tl.store(tile, S.to(state.dtype.element_ty))
    else:
        tl.store(out + offsets, tl.zeros([N], out.dtype.element_ty))


@triton.jit
def prefill_kernel(
    r, k, v, decay, a, gate, v_first, value_mix, k_k, k_a, r_k, ln_weight, ln_bias, state, slots, starts, positions,
    out, state_stride, C, eps, N: tl.constexpr, L: tl.constexpr, HAS_VALUE_MIX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Packed sequences; program (sequence, head). `positions` are the absolute ones of the sequences' first tokens."""
    row, head = tl.program_id(0), tl.program_id(1)
    columns = tl.arange(0, N)
    channels = head * N + columns
    slot = tl.load(slots + row).to(tl.int64)
    token = tl.load(starts + row).to(tl.int64)
    end = tl.load(starts + row + 1).to(tl.int64)
    if slot >= 0:
        to_position = tl.load(positions + row).to(tl.int64) - token
        tile = state + slot * state_stride + head * N * N + columns[:, None] * N + columns[None, :]
        S = tl.load(tile).to(tl.float32)
        while token < end:  # not range: Triton 3.6 does not interpret run-time ranges with numpy 2.4
            if ((token + to_position) % L == 0) & (token + L <= end):
                S = _one_chunk(
                    S, r, k, v, decay, a, gate, v_first, value_mix, k_k, k_a, r_k, ln_weight, ln_bias, eps,
                    out, (token + tl.arange(0, L))[:, None] * C + channels[None, :], channels,
                    N, L, HAS_VALUE_MIX, PRECISION,
                )  # fmt: skip
                token += L
            else:
                S = _one_token(
                    S, r, k, v, decay, a, gate, v_first, value_mix, k_k, k_a, r_k, ln_weight, ln_bias, eps,
                    out, token * C + channels, channels, N, HAS_VALUE_MIX,
                )  # fmt: skip
                token += 1
        tl.store(tile, S.to(state.dtype.element_ty))
    else:
        while token < end:
            tl.store(out + token * C + channels, tl.zeros([N], out.dtype.element_ty))
            token += 1


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
    positions: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `kernels.wkv7`; a slot of -1 is a padding row, and `state` may be float16.

    `positions[B]` says how many tokens each sequence has consumed before, which is where its chunks are anchored; None
    counts from the first token of the call.
    """
    (H, N), T, C = r_k.shape, *r.shape
    rows = [x.contiguous() for x in (r, k, v, decay, a, gate)]
    has_value_mix = v_first is not None and value_mix is not None
    rows += [x.contiguous() for x in (v_first, value_mix) if x is not None] if has_value_mix else rows[:2]  # not read
    out = torch.empty_like(rows[5])
    parameters = (k_k, k_a, r_k, ln_weight, ln_bias)
    options = {"num_warps": NUM_WARPS, "enable_fp_fusion": FP_FUSION}
    if len(slots) == T:
        step_kernel[(T, H)](
            *rows, *parameters, state, slots, out, state.stride(0), C, eps, N=N, HAS_VALUE_MIX=has_value_mix, **options
        )
        return out
    if positions is None:
        positions = torch.zeros_like(slots)
    prefill_kernel[(len(slots), H)](
        *rows, *parameters, state, slots, starts, positions, out, state.stride(0), C, eps,
        N=N, L=CHUNK_LEN, HAS_VALUE_MIX=has_value_mix, PRECISION=PRECISION, **options,
    )  # fmt: skip
    return out

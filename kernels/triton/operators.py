"""The operators of `kernels` on the Triton kernels. What these do not handle goes on to `kernels.eager`."""

from __future__ import annotations

import torch

from kernels import eager
from kernels.triton import linear as products
from kernels.triton import packed, sampling
from kernels.triton import shift_mix as shifts
from kernels.triton import wkv7 as recurrence
from kernels.triton.int8 import can_quantise


def pack_linear(weight: torch.Tensor, int8: bool = False) -> torch.Tensor:
    """See `kernels.Linear`."""
    if not packed.can_pack(weight):
        return eager.pack_linear(weight, int8)
    return packed.pack_int8(weight) if int8 and can_quantise(weight) else packed.pack(weight)


def linear(x: torch.Tensor, weight: torch.Tensor, out_features: int) -> torch.Tensor:
    """See `kernels.Linear`."""
    if not packed.is_packed(weight):
        return eager.linear(x, weight, out_features)
    return products.linear(x, weight, out_features)


def low_rank(
    x: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
    rank: int,
    bias: torch.Tensor | None,
    activation: str,
    output_activation: str,
    out_features: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """See `kernels.LowRank`."""
    if not (packed.is_packed(down) and packed.is_packed(up)):  # the other one may be packed all the same
        down, up = packed.plain(down, rank), packed.plain(up, out_features)
        return eager.low_rank(x, down, up, rank, bias, activation, output_activation, out_features, dtype)
    hidden = products.linear(x, down, rank, activation=activation, dtype=up.dtype)
    return products.linear(hidden, up, out_features, bias, output_activation, dtype)


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
    """See `kernels.shift_mix`; a slot of -1 is a padding row."""
    run = shifts.shift_mix if shifts.can_run(shift) else eager.shift_mix
    return run(x, ln_weight, ln_bias, eps, shift, mix, slots, starts, dtype)


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
) -> torch.Tensor:
    """See `kernels.wkv7`; a slot of -1 is a padding row."""
    per_token = (r, k, v, decay, a, gate, v_first, value_mix)
    run = recurrence.wkv7 if recurrence.can_run(state, r_k.shape[1]) else eager.wkv7
    return run(*per_token, k_k, k_a, r_k, ln_weight, ln_bias, eps, state, slots, starts)


def sample(logits: torch.Tensor, rules: torch.Tensor) -> torch.Tensor:
    """See `kernels.sample`."""
    if logits.dtype != torch.float32 or logits.stride(1) != 1:
        return eager.sample(logits, rules)
    return sampling.sample_rows(logits, sampling.SamplingRows.from_host(rules, logits.device))

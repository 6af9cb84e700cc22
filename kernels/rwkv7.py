"""An RWKV-7 model in operators: one after the other, or as few calls where a backend fuses them.

The only place that says how the operators make a layer. Which weights belong where is the caller's knowledge
(`engine.models.rwkv7`); the formulas are in `kernels.reference`, the operators' contracts in `kernels`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

import kernels
from kernels import Linear, LowRank, cpu, triton_operators


@dataclass(frozen=True, slots=True)
class Norm:
    """Scale `[C]`, shift `[C]`, both float32, and epsilon of a layer norm, or of a group norm over heads."""

    weight: torch.Tensor
    bias: torch.Tensor
    eps: float


@dataclass(frozen=True, slots=True)
class TimeMixing:
    """The recurrent half of a layer. All plain tensors float32."""

    norm: Norm
    mix: torch.Tensor  # [6, C] in the order r, w, k, v, a, g
    receptance: Linear
    key: Linear
    value: Linear
    output: Linear
    decay: LowRank
    rate: LowRank
    gate: LowRank
    value_mix: LowRank | None  # None in the first layer
    k_k: torch.Tensor  # [C]
    k_a: torch.Tensor  # [C]
    r_k: torch.Tensor  # [H, N]
    head_norm: Norm


@dataclass(frozen=True, slots=True)
class ChannelMixing:
    """The feed-forward half of a layer."""

    norm: Norm
    mix: torch.Tensor  # [1, C] float32
    key: Linear
    value: Linear


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer: both halves, each added to the residual stream."""

    time_mixing: TimeMixing
    channel_mixing: ChannelMixing


@dataclass(frozen=True, slots=True)
class Weights:
    """A whole model, prepared for one device."""

    embedding: torch.Tensor  # [V, C]
    ln0: Norm
    layers: Sequence[Layer]
    ln_out: Norm
    head: Linear


class Rwkv7(Protocol):
    """A model that can be run."""

    def forward(
        self,
        token_ids: torch.Tensor,
        wkv: torch.Tensor,
        shift: torch.Tensor,
        slots: torch.Tensor,
        starts: torch.Tensor,
        output_rows: torch.Tensor,
        num_long: int | None = None,
    ) -> torch.Tensor:
        """Consume `token_ids[T]`, advance the slots' states in place, return the residual stream of `output_rows[R]`.

        `wkv[S, L, H, N(value), N(key)]` and `shift[S, L, 2, C]` (0: before time mixing, 1: before channel mixing) are
        views of the pool, `wkv` float32 or float16, `shift` float32; `slots[B]` and `starts[B + 1]` as for every
        operator; all indices int64. At most `num_long` sequences have several tokens, or the rest of them is not
        consumed; None: no bound is known. Returns `[R, C]` float32.
        """
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return `[R, V]` float32 for rows `hidden[R, C]` of the residual stream."""
        ...

    def next_logits(
        self,
        token_ids: torch.Tensor,
        wkv: torch.Tensor,
        shift: torch.Tensor,
        slots: torch.Tensor,
        starts: torch.Tensor,
        output_rows: torch.Tensor,
        num_long: int | None = None,
    ) -> torch.Tensor:
        """Return the `logits` of what `forward` returns."""
        return self.logits(self.forward(token_ids, wkv, shift, slots, starts, output_rows, num_long))

    def step(
        self,
        token_ids: torch.Tensor,
        wkv: torch.Tensor,
        shift: torch.Tensor,
        slots: torch.Tensor,
        starts: torch.Tensor,
        forbidden_ids: torch.Tensor,
        rules: torch.Tensor,
    ) -> torch.Tensor:
        """Consume tokens as `forward` does, and draw one after each sequence's last; returns `[B]` int64.

        As `kernels.sample`, by `rules[B, 5]`, from logits in which `forbidden_ids` are impossible.
        """
        logits = self.next_logits(token_ids, wkv, shift, slots, starts, starts[1:] - 1)
        logits.index_fill_(1, forbidden_ids, -torch.inf)
        return kernels.sample(logits, rules)


def runnable(weights: Weights, dtype: torch.dtype) -> Rwkv7:
    """Return the fastest way to run `weights`; activations between their operators have `dtype`, or better."""
    fused = cpu.fuse_rwkv7(weights) or triton_operators.fuse_rwkv7(weights, dtype)
    return fused or OperatorByOperator(weights, dtype)


class OperatorByOperator(Rwkv7):
    """Runs on any device."""

    def __init__(self, weights: Weights, dtype: torch.dtype) -> None:
        self._weights = weights
        self._dtype = dtype

    def forward(
        self,
        token_ids: torch.Tensor,
        wkv: torch.Tensor,
        shift: torch.Tensor,
        slots: torch.Tensor,
        starts: torch.Tensor,
        output_rows: torch.Tensor,
        num_long: int | None = None,
    ) -> torch.Tensor:
        """Consume tokens, advance states, return hidden rows."""
        x = _normalise(self._weights.embedding.index_select(0, token_ids).float(), self._weights.ln0)
        v_first: torch.Tensor | None = None
        for i, layer in enumerate(self._weights.layers):
            out, v = self._mix_time(layer.time_mixing, x, v_first, wkv[:, i], shift[:, i, 0], slots, starts)
            x += out
            x += self._mix_channels(layer.channel_mixing, x, shift[:, i, 1], slots, starts)
            v_first = v if v_first is None else v_first
        return x.index_select(0, output_rows)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits for hidden rows."""
        return self._weights.head(_normalise(hidden, self._weights.ln_out))

    def _mix_time(
        self,
        p: TimeMixing,
        x: torch.Tensor,
        v_first: torch.Tensor | None,
        wkv: torch.Tensor,
        shift: torch.Tensor,
        slots: torch.Tensor,
        starts: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return this half's output, and the value as projected."""
        m_r, m_w, m_k, m_v, m_a, m_g = self._shift_mix(p, x, shift, slots, starts)
        v = p.value(m_v)
        y = kernels.wkv7(
            p.receptance(m_r),
            p.key(m_k),
            v,
            p.decay(m_w),
            p.rate(m_a),
            p.gate(m_g),
            v_first if p.value_mix else None,
            p.value_mix(m_v) if p.value_mix else None,
            p.k_k,
            p.k_a,
            p.r_k,
            p.head_norm.weight,
            p.head_norm.bias,
            p.head_norm.eps,
            wkv,
            slots,
            starts,
        )
        return p.output(y), v

    def _mix_channels(
        self, p: ChannelMixing, x: torch.Tensor, shift: torch.Tensor, slots: torch.Tensor, starts: torch.Tensor
    ) -> torch.Tensor:
        (m,) = self._shift_mix(p, x, shift, slots, starts)
        return p.value(kernels.relu_squared(p.key(m)))

    def _shift_mix(
        self,
        p: TimeMixing | ChannelMixing,
        x: torch.Tensor,
        shift: torch.Tensor,
        slots: torch.Tensor,
        starts: torch.Tensor,
    ) -> torch.Tensor:
        return kernels.shift_mix(x, p.norm.weight, p.norm.bias, p.norm.eps, shift, p.mix, slots, starts, self._dtype)


def _normalise(x: torch.Tensor, norm: Norm) -> torch.Tensor:
    return nn.functional.layer_norm(x, norm.weight.shape, norm.weight, norm.bias, norm.eps)

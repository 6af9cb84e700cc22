"""All layers of an RWKV-7 model: one operator after the other, or one call where a backend fuses them.

The only place that says how the operators make a layer. Which weights belong where is the caller's knowledge
(`engine.models.rwkv7`); the formulas are in `kernels.reference`, the operators' contracts in `kernels`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

import kernels
from kernels import Linear, LowRank, cpu


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


Advance = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]


class Layers:
    """A stack of layers on one device, activations between their operators in `dtype`."""

    def __init__(self, layers: Sequence[Layer], dtype: torch.dtype) -> None:
        self._layers = layers
        self._dtype = dtype
        self._fused: Advance | None = cpu.fuse_rwkv7(layers)

    def __call__(
        self, x: torch.Tensor, wkv: torch.Tensor, shift: torch.Tensor, slots: torch.Tensor, starts: torch.Tensor
    ) -> None:
        """Advance the residual stream `x[T, C]` float32 and the slots' states in place.

        `wkv[S, L, H, N(value), N(key)]` and `shift[S, L, 2, C]` (0: before time mixing, 1: before channel mixing) are
        views of the float32 pool; `slots[B]` and `starts[B + 1]` as for every operator.
        """
        if self._fused is not None:
            self._fused(x, wkv, shift, slots, starts)
            return
        v_first: torch.Tensor | None = None
        for i, layer in enumerate(self._layers):
            out, v = self._mix_time(layer.time_mixing, x, v_first, wkv[:, i], shift[:, i, 0], slots, starts)
            x += out
            x += self._mix_channels(layer.channel_mixing, x, shift[:, i, 1], slots, starts)
            v_first = v if v_first is None else v_first

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

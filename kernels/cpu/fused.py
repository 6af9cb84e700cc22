"""All layers of an RWKV-7 model as one call of the compiled library."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import byref
from typing import TYPE_CHECKING

import torch

import kernels
from kernels.cpu import library
from kernels.cpu.library import ACTIVATIONS
from kernels.cpu.operators import Operators, as_matrix, is_packed_here

if TYPE_CHECKING:
    from kernels.rwkv7 import Layer, Norm


class FusedRwkv7:
    """Advances the residual stream and the states through all layers; the contract is that of `kernels.rwkv7.Layers`.

    Activations between two operators have the format of the weights that read them, or are float32: products of
    bfloat16 weights round their inputs, nothing else is rounded.
    """

    def __init__(self, operators: Operators, layers: Sequence[Layer]) -> None:
        self._operators = operators
        self._parameters = layers  # the structures below point into these
        self._layers = (library.Rwkv7Layer * len(layers))(*map(_layer, layers))
        self._width = layers[0].time_mixing.mix.shape[1]

    def __call__(
        self, x: torch.Tensor, wkv: torch.Tensor, shift: torch.Tensor, slots: torch.Tensor, starts: torch.Tensor
    ) -> None:
        """Advance everything in place."""
        team = self._operators.team
        team.library.sostenuto_rwkv7(
            team.handle,
            byref(library.batch(slots, starts, len(x))),
            self._layers,
            len(self._layers),
            self._width,
            library.floats(x),
            byref(library.states(wkv, layers=True)),
            byref(library.states(shift, layers=True)),
        )


def can_fuse(operators: Operators, layers: Sequence[Layer]) -> bool:
    """Say whether the library can run `layers`: packed by it, formats as it expects them, heads not too large."""

    def kinds(layer: Layer) -> list[torch.dtype]:
        return [tensor.dtype for tensor in _packed(layer)]

    first, *others = layers
    return (
        operators.enabled
        and all(is_packed_here(tensor) for layer in layers for tensor in _packed(layer))
        and all(kinds(layer) == kinds(others[0]) for layer in others)
        and all(layer.time_mixing.value_mix is not None for layer in others)
        and first.time_mixing.value_mix is None
        and first.time_mixing.r_k.shape[1] <= operators.team.max_head_size
    )


def _packed(layer: Layer) -> list[torch.Tensor]:
    """Return the layer's packed weights."""
    p, f = layer.time_mixing, layer.channel_mixing
    linears = (p.receptance, p.key, p.value, p.output, f.key, f.value)
    low_ranks = [low_rank for low_rank in (p.decay, p.rate, p.gate, p.value_mix) if low_rank is not None]
    return [linear.packed for linear in linears] + [w for low_rank in low_ranks for w in (low_rank.down, low_rank.up)]


def _layer(layer: Layer) -> library.Rwkv7Layer:
    p, f = layer.time_mixing, layer.channel_mixing
    width = p.mix.shape[1]
    return library.Rwkv7Layer(
        _norm(p.norm),
        _norm(f.norm),
        library.floats(p.mix),
        library.floats(f.mix),
        *(_matrix(linear) for linear in (p.receptance, p.key, p.value, p.output)),
        *(_low_rank(low_rank, width) for low_rank in (p.decay, p.rate, p.gate, p.value_mix)),
        library.Wkv7Parameters(*p.r_k.shape, *map(library.floats, (p.k_k, p.k_a, p.r_k)), _norm(p.head_norm)),
        _matrix(f.key),
        _matrix(f.value),
    )


def _norm(norm: Norm) -> library.Norm:
    return library.norm(norm.weight, norm.bias, norm.eps)


def _matrix(linear: kernels.Linear) -> library.Matrix:
    return as_matrix(linear.packed, linear.out_features, linear.in_features)


def _low_rank(low_rank: kernels.LowRank | None, width: int) -> library.LowRank:
    if low_rank is None:
        return library.LowRank()
    return library.LowRank(
        as_matrix(low_rank.down, low_rank.rank, width),
        as_matrix(low_rank.up, low_rank.out_features, low_rank.rank),
        None if low_rank.bias is None else library.floats(low_rank.bias),
        ACTIVATIONS[low_rank.activation],
        ACTIVATIONS[low_rank.output_activation],
    )

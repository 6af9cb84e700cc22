"""An RWKV-7 model as one or two calls of the compiled library."""

from __future__ import annotations

import sys
from collections.abc import Callable
from ctypes import byref
from typing import TYPE_CHECKING

import torch

import kernels
from kernels.cpu import library
from kernels.cpu.library import ACTIVATIONS, FORMATS
from kernels.cpu.operators import Operators, as_matrix, is_packed_here
from kernels.rwkv7 import Rwkv7

if TYPE_CHECKING:
    from kernels.rwkv7 import Layer, Norm, Weights

_ALIGNMENT = 64


class FusedRwkv7(Rwkv7):
    """Activations between two operators have the format of the weights that read them, or are float32: products of
    bfloat16 weights round their inputs, nothing else is rounded.
    """

    def __init__(self, operators: Operators, weights: Weights) -> None:
        self._operators = operators
        self._weights = weights  # the structures below point into these
        self._logits = Memory()
        self._layers = (library.Rwkv7Layer * len(weights.layers))(*map(_layer, weights.layers))
        self._vocab_size, self._width = weights.embedding.shape
        self._model = library.Rwkv7Model(
            len(weights.layers),
            self._width,
            self._vocab_size,
            library.rows(weights.embedding),
            _norm(weights.ln0),
            _norm(weights.ln_out),
            self._layers,
            _matrix(weights.head),
        )

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
        """Consume tokens, advance states, return hidden rows; raises `IndexError` before anything is changed."""
        num_outputs = output_rows.shape[0]
        hidden = torch.empty(num_outputs, self._width)
        run = self._operators.team.library.sostenuto_rwkv7_forward
        self._consume(run, token_ids, wkv, shift, slots, starts, num_outputs, output_rows.data_ptr(), hidden.data_ptr())
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits for hidden rows."""
        team = self._operators.team
        num_rows = hidden.shape[0]
        logits = self._logits.take(num_rows, self._vocab_size)
        team.library.sostenuto_rwkv7_logits(
            team.handle, byref(self._model), num_rows, byref(library.rows(hidden)), logits.data_ptr()
        )
        return logits

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
        """Consume tokens, advance states, draw tokens; raises `IndexError` before anything is changed."""
        num_rows = slots.shape[0]
        sampled = torch.empty(num_rows, dtype=torch.int64)
        forbidden = forbidden_ids.shape[0], forbidden_ids.data_ptr()
        rules_at = library.sampling_rules(rules, num_rows)
        run = self._operators.team.library.sostenuto_rwkv7_step
        self._consume(run, token_ids, wkv, shift, slots, starts, *forbidden, rules_at, sampled.data_ptr())
        return sampled

    def _consume(
        self,
        run: Callable[..., int],
        token_ids: torch.Tensor,
        wkv: torch.Tensor,
        shift: torch.Tensor,
        slots: torch.Tensor,
        starts: torch.Tensor,
        *more: int,
    ) -> None:
        """Call `run` with what both functions that consume tokens take first, and `more`."""
        failed = run(
            self._operators.team.handle,
            byref(self._model),
            byref(library.batch(slots, starts, token_ids.shape[0])),
            token_ids.data_ptr(),
            byref(library.states(wkv, layers=True)),
            byref(library.states(shift, layers=True)),
            *more,
        )
        if failed:
            raise IndexError("a token id, slot, output row or forbidden id is out of range")


class Memory:
    """Memory for one large tensor a step, used again as soon as nobody holds the last one or a view of it.

    The allocator gives so much back to the system, which hands it out again page by page.
    """

    def __init__(self) -> None:
        self._bytes = bytearray(1)

    def take(self, rows: int, columns: int) -> torch.Tensor:
        """Return a float32 tensor of this shape, 64-byte aligned, its contents undefined."""
        num_bytes = 4 * rows * columns
        # Two references: ours and the argument's. A tensor is a third for as long as its storage lives.
        if len(self._bytes) < num_bytes + _ALIGNMENT or sys.getrefcount(self._bytes) > 2:
            self._bytes = bytearray(num_bytes + _ALIGNMENT)
        memory = torch.frombuffer(self._bytes, dtype=torch.uint8)
        begin = -memory.data_ptr() % _ALIGNMENT
        return memory[begin : begin + num_bytes].view(torch.float32).view(rows, columns)


def can_fuse(operators: Operators, weights: Weights) -> bool:
    """Say whether the library can run a model: packed by it, formats as it expects them, heads not too large."""

    def kinds(layer: Layer) -> list[torch.dtype]:
        return [tensor.dtype for tensor in _packed(layer)]

    def value_rows_agree(layer: Layer) -> bool:
        p = layer.time_mixing
        return p.value_mix is None or p.value.packed.dtype in (torch.int8, p.value_mix.down.dtype)

    first, *others = weights.layers
    return (
        operators.enabled
        and weights.embedding.dtype in FORMATS
        and is_packed_here(weights.head.packed)
        and all(is_packed_here(tensor) for layer in weights.layers for tensor in _packed(layer))
        and all(kinds(layer) == kinds(others[0]) for layer in others)
        and all(kinds(first) == kinds(layer)[: len(kinds(first))] for layer in others)
        and all(layer.time_mixing.value_mix is not None and value_rows_agree(layer) for layer in others)
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

"""An RWKV-7 model in eight launches a layer for a step, each beginning while the one before it still runs.

    add_and_shift_mix    the sums of the layer before, layer norm, token shift, six mixes
    project              receptance, key, value, and the four low-rank products' first halves
    raise                their second halves
    wkv7                 the recurrence, group norm, bonus, gate
    linear_sums          output, as sums that the next launch adds to the residual stream
    add_and_shift_mix    these, layer norm, token shift, one mix
    linear               key, squared ReLU
    linear_sums          value, as sums

Prompts take four more for the recurrence. Their launches fill the card, and each begins only when the one before it
ends.

The large matrices have the activations' dtype or, beside bfloat16, are int8 (`int8.py`): not run on a card yet.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from kernels.rwkv7 import Rwkv7
from kernels.triton import linear as products
from kernels.triton import packed, residual, shift_mix
from kernels.triton import wkv7 as recurrence
from kernels.triton.overlap import PROMPT, STEP
from kernels.triton.projections import Projections

if TYPE_CHECKING:
    from kernels import Linear
    from kernels.rwkv7 import Layer, Norm, Weights


class FusedRwkv7(Rwkv7):
    """The joint matrices replace the packed ones, which are views of them then."""

    def __init__(self, weights: Weights, dtype: torch.dtype) -> None:
        self._weights = weights
        self._dtype = dtype
        self._projections = [_joined(layer, dtype) for layer in weights.layers]

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
        """Consume tokens, advance states, return hidden rows. A slot of -1 is a padding row."""
        launch = STEP if len(slots) == len(token_ids) else PROMPT
        stream = self._consume(token_ids, wkv, shift, slots, starts, num_long, launch)
        return residual.gather(*stream, output_rows, **launch)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits for hidden rows."""
        return self._head(hidden, None, STEP)

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
        """Consume tokens, advance states, return logits, with a launch less than there are in the two."""
        launch = STEP if len(slots) == len(token_ids) else PROMPT
        x, sums = self._consume(token_ids, wkv, shift, slots, starts, num_long, launch)
        return self._head(x, (sums, output_rows), launch)

    def _head(
        self, x: torch.Tensor, gathered: tuple[torch.Tensor, torch.Tensor] | None, launch: dict[str, Any]
    ) -> torch.Tensor:
        """Return logits of the rows `x[R, C]`, or of those that are gathered from the residual stream (`norm`)."""
        ln_out, head = self._weights.ln_out, self._weights.head
        rows = residual.norm(x, ln_out.weight, ln_out.bias, ln_out.eps, self._dtype, gathered, **launch)
        return products.linear(rows, head.packed, head.out_features, dtype=torch.float32, is_whole=True, **STEP)

    def _consume(
        self,
        token_ids: torch.Tensor,
        wkv: torch.Tensor,
        shift: torch.Tensor,
        slots: torch.Tensor,
        starts: torch.Tensor,
        num_long: int | None,
        launch: dict[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Advance states; return the residual stream before the last product, and that one's sums."""
        # Waits for all that came before, so that the launches after it may read slots before they wait for it.
        ln0 = self._weights.ln0
        x = residual.embed(token_ids, self._weights.embedding, ln0.weight, ln0.bias, ln0.eps)
        sums: torch.Tensor | None = None
        v_first: torch.Tensor | None = None
        for i, (layer, project) in enumerate(zip(self._weights.layers, self._projections, strict=True)):
            p, f = layer.time_mixing, layer.channel_mixing
            mixes, x = self._shift_mix(x, sums, p.norm, shift[:, i, 0], p.mix, slots, starts, launch)
            projected = project(mixes, **launch)
            r, k, v = projected.rkv
            rate, gate, value_mix = projected.others
            y = recurrence.wkv7(
                r, k, v, projected.decay, rate, gate, v_first, None if v_first is None else value_mix,
                p.k_k, p.k_a, p.r_k, p.head_norm.weight, p.head_norm.bias, p.head_norm.eps,
                wkv[:, i], slots, starts, num_long, **launch,
            )  # fmt: skip
            sums = products.linear_sums(y, p.output.packed, p.output.out_features, **launch)
            (mix,), x = self._shift_mix(x, sums, f.norm, shift[:, i, 1], f.mix, slots, starts, launch)
            key = products.linear(
                mix, f.key.packed, f.key.out_features, activation="relu_squared", is_whole=True, **launch
            )
            sums = products.linear_sums(key, f.value.packed, f.value.out_features, **launch)
            v_first = v if v_first is None else v_first
        assert sums is not None
        return x, sums

    def _shift_mix(
        self,
        x: torch.Tensor,
        sums: torch.Tensor | None,
        norm: Norm,
        shift: torch.Tensor,
        mix: torch.Tensor,
        slots: torch.Tensor,
        starts: torch.Tensor,
        launch: dict[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return shift_mix.add_and_shift_mix(
            x, sums, norm.weight, norm.bias, norm.eps, shift, mix, slots, starts, self._dtype, **launch
        )


def can_fuse(weights: Weights, dtype: torch.dtype) -> bool:
    """Say whether the launches take a model: sizes of theirs, each large matrix of `dtype`, or int8 beside bfloat16."""
    width = weights.embedding.shape[1]
    return (
        width % 16 == 0
        and width <= shift_mix.MAX_WIDTH
        and _can_multiply(weights.head, dtype)
        and all(_is_taken(layer, dtype) for layer in weights.layers)
    )


def _can_multiply(linear: Linear, dtype: torch.dtype) -> bool:
    is_int8 = linear.packed.dtype == torch.int8
    return packed.is_packed(linear.packed) and dtype == (torch.bfloat16 if is_int8 else linear.packed.dtype)


def _is_taken(layer: Layer, dtype: torch.dtype) -> bool:
    p, f = layer.time_mixing, layer.channel_mixing
    return (
        p.r_k.shape[1] in recurrence.HEAD_SIZES
        and all(_can_multiply(linear, dtype) for linear in (p.receptance, p.key, p.value, p.output, f.key, f.value))
        and (p.decay.activation, p.decay.output_activation) == ("tanh", "none")
        and (p.rate.activation, p.rate.output_activation) == ("none", "sigmoid")
        and (p.gate.activation, p.gate.output_activation) == ("sigmoid", "none")
        and (p.value_mix is None or (p.value_mix.activation, p.value_mix.output_activation) == ("none", "sigmoid"))
    )


def _joined(layer: Layer, dtype: torch.dtype) -> Projections:
    p = layer.time_mixing
    return Projections((p.receptance, p.key, p.value), (p.decay, p.rate, p.gate, p.value_mix), dtype)

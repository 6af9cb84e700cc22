"""RWKV-7 over packed tokens and a state pool: tokens in, hidden rows out, states advanced in place by slot.

Knows tensors and slots; requests, sampling and files are others' business. The formulas are in `kernels.reference`,
the operators' contracts in `kernels`; dimension letters as in `kernels/README.md`.

The residual stream is float32: it is a sum over all layers, and costs nothing beside the weights. Between a token
shift and the projection that ends the half-block, activations have the weights' dtype.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

import kernels
from engine.models.config import ModelConfig
from engine.runner.input_batch import InputBatch
from engine.state.pool import StatePool

LN_EPS = 1e-5

Weights = Callable[[str], torch.Tensor]  # the prepared tensor of a name


class RWKV7:
    """A model with its weights on one device. Not thread-safe in what concerns one pool."""

    def __init__(self, config: ModelConfig, weights: Weights, dtype: torch.dtype) -> None:
        self.config = config
        self.dtype = dtype
        self.embedding = weights("emb.weight")  # [V, C]
        self.device = self.embedding.device
        self._ln0 = _LayerNorm(weights, "blocks.0.ln0.")
        self._blocks = [_Block(config, weights, layer, dtype) for layer in range(config.num_layers)]
        self._ln_out = _LayerNorm(weights, "ln_out.")
        self._head = kernels.Linear(weights("head.weight"))

    def forward(self, batch: InputBatch, pool: StatePool) -> torch.Tensor:
        """Consume the batch, advance its slots in `pool`, and return the hidden rows it asks for, `[R, C]` float32."""
        x = self._ln0(self.embedding.index_select(0, batch.token_ids).float())
        v_first: torch.Tensor | None = None
        for layer, block in enumerate(self._blocks):
            v_first = block.forward(x, v_first, pool.wkv[:, layer], pool.shift[:, layer], batch)
        return x.index_select(0, batch.output_rows)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return `[R, V]` float32 for hidden rows `[R, C]`."""
        return self._head(self._ln_out(hidden))


class _Block:
    """One layer: time mixing, then channel mixing, each added to the residual stream."""

    def __init__(self, config: ModelConfig, weights: Weights, layer: int, dtype: torch.dtype) -> None:
        self._time_mixing = _TimeMixing(config, weights, layer, dtype)
        self._channel_mixing = _ChannelMixing(weights, layer, dtype)

    def forward(
        self,
        x: torch.Tensor,
        v_first: torch.Tensor | None,
        wkv: torch.Tensor,
        shift: torch.Tensor,
        batch: InputBatch,
    ) -> torch.Tensor:
        """Add the layer's output to `x` in place; returns the first layer's value for the layers above."""
        out, v_first = self._time_mixing.forward(x, v_first, wkv, shift[:, 0], batch)
        x += out
        x += self._channel_mixing.forward(x, shift[:, 1], batch)
        return v_first


class _TimeMixing:
    """The recurrent half of a layer."""

    def __init__(self, config: ModelConfig, weights: Weights, layer: int, dtype: torch.dtype) -> None:
        def w(name: str) -> torch.Tensor:
            return weights(f"blocks.{layer}.att.{name}")

        self._dtype = dtype
        self._eps = config.head_norm_eps
        self._norm = _LayerNorm(weights, f"blocks.{layer}.ln1.")
        self._mix = torch.stack([w(f"x_{name}") for name in "rwkvag"])
        self._receptance = kernels.Linear(w("receptance.weight"))
        self._key = kernels.Linear(w("key.weight"))
        self._value = kernels.Linear(w("value.weight"))
        self._output = kernels.Linear(w("output.weight"))
        self._decay = kernels.LowRank(w("w1"), w("w2"), w("w0"), torch.float32, activation="tanh")
        self._rate = kernels.LowRank(w("a1"), w("a2"), w("a0"), dtype, output_activation="sigmoid")
        self._gate = kernels.LowRank(w("g1"), w("g2"), None, dtype, activation="sigmoid")
        self._value_mix = (
            kernels.LowRank(w("v1"), w("v2"), w("v0"), dtype, output_activation="sigmoid") if layer > 0 else None
        )
        self._k_k, self._k_a, self._r_k = w("k_k"), w("k_a"), w("r_k")
        self._ln_x_weight, self._ln_x_bias = w("ln_x.weight"), w("ln_x.bias")

    def forward(
        self, x: torch.Tensor, v_first: torch.Tensor | None, wkv: torch.Tensor, shift: torch.Tensor, batch: InputBatch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return this half's output `[T, C]`, and the value that later layers mix in."""
        norm = self._norm
        m_r, m_w, m_k, m_v, m_a, m_g = kernels.shift_mix(
            x, norm.weight, norm.bias, LN_EPS, shift, self._mix, batch.slots, batch.starts, self._dtype
        )
        v = self._value(m_v)
        y = kernels.wkv7(
            self._receptance(m_r),
            self._key(m_k),
            v,
            self._decay(m_w),
            self._rate(m_a),
            self._gate(m_g),
            v_first if self._value_mix else None,
            self._value_mix(m_v) if self._value_mix else None,
            self._k_k,
            self._k_a,
            self._r_k,
            self._ln_x_weight,
            self._ln_x_bias,
            self._eps,
            wkv,
            batch.slots,
            batch.starts,
        )
        return self._output(y), v if v_first is None else v_first


class _ChannelMixing:
    """The feed-forward half of a layer."""

    def __init__(self, weights: Weights, layer: int, dtype: torch.dtype) -> None:
        prefix = f"blocks.{layer}.ffn."
        self._dtype = dtype
        self._norm = _LayerNorm(weights, f"blocks.{layer}.ln2.")
        self._mix = weights(prefix + "x_k")[None]
        self._key = kernels.Linear(weights(prefix + "key.weight"))
        self._value = kernels.Linear(weights(prefix + "value.weight"))

    def forward(self, x: torch.Tensor, shift: torch.Tensor, batch: InputBatch) -> torch.Tensor:
        """Return this half's output `[T, C]`."""
        norm = self._norm
        (m,) = kernels.shift_mix(
            x, norm.weight, norm.bias, LN_EPS, shift, self._mix, batch.slots, batch.starts, self._dtype
        )
        return self._value(kernels.relu_squared(self._key(m)))


class _LayerNorm:
    """Scale and shift of a layer norm, float32."""

    def __init__(self, weights: Weights, prefix: str) -> None:
        self.weight, self.bias = weights(prefix + "weight"), weights(prefix + "bias")

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.layer_norm(x, self.weight.shape, self.weight, self.bias, LN_EPS)

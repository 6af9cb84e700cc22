"""RWKV-7 over packed tokens and a state pool: tokens in, hidden rows out, states advanced in place by slot.

Knows tensors and slots; requests, sampling and files are others' business. The formulas are in `kernels.reference`,
the operators' contracts in `kernels`; dimension letters as in `kernels/README.md`.

The residual stream is float32: it is a sum over all layers, and costs nothing beside the weights. Between a token
shift and the projection that ends the half-block, activations have the weights' dtype.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from engine.models.config import ModelConfig
from engine.runner.input_batch import InputBatch
from engine.state.pool import StatePool
from kernels import Linear, LowRank
from kernels import rwkv7 as operators

LN_EPS = 1e-5

Weights = Callable[[str], torch.Tensor]  # the prepared tensor of a name


class RWKV7:
    """A model with its weights on one device. Not thread-safe in what concerns one pool."""

    def __init__(self, config: ModelConfig, weights: Weights, dtype: torch.dtype, int8: bool = False) -> None:
        """Take weights of `dtype`; `int8` quantises the large matrices where that is faster."""
        self.config = config
        self.dtype = dtype
        self.embedding = weights("emb.weight")  # [V, C]
        self.device = self.embedding.device
        head = Linear(weights("head.weight"), int8)
        self.is_int8 = head.packed.dtype == torch.int8  # not every backend has int8 operators
        self._rwkv7 = operators.runnable(
            operators.Weights(
                embedding=self.embedding,
                ln0=_norm(weights, "blocks.0.ln0."),
                layers=[_layer(config, weights, index, dtype, int8) for index in range(config.num_layers)],
                ln_out=_norm(weights, "ln_out."),
                head=head,
            ),
            dtype,
        )

    def forward(self, batch: InputBatch, pool: StatePool) -> torch.Tensor:
        """Consume the batch, advance its slots in `pool`, and return the hidden rows it asks for, `[R, C]` float32."""
        b = batch
        return self._rwkv7.forward(b.token_ids, pool.wkv, pool.shift, b.slots, b.starts, b.output_rows, b.num_long)

    def next_logits(self, batch: InputBatch, pool: StatePool) -> torch.Tensor:
        """Return the `logits` of what `forward` returns."""
        b = batch
        return self._rwkv7.next_logits(b.token_ids, pool.wkv, pool.shift, b.slots, b.starts, b.output_rows, b.num_long)

    def step(
        self, batch: InputBatch, pool: StatePool, forbidden_ids: torch.Tensor, rules: torch.Tensor
    ) -> torch.Tensor:
        """Consume the batch, advance its slots in `pool`, and return a token for each sequence, as `kernels.sample`.

        `forbidden_ids[N]` int64 are on the model's device, `rules[B, 5]` is the host's. Bit for bit what `forward`,
        `logits` and the operator give.
        """
        return self._rwkv7.step(batch.token_ids, pool.wkv, pool.shift, batch.slots, batch.starts, forbidden_ids, rules)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return `[R, V]` float32 for hidden rows `[R, C]`."""
        return self._rwkv7.logits(hidden)


def _layer(config: ModelConfig, weights: Weights, index: int, dtype: torch.dtype, int8: bool) -> operators.Layer:
    return operators.Layer(
        _time_mixing(config, weights, index, dtype, int8),
        operators.ChannelMixing(
            norm=_norm(weights, f"blocks.{index}.ln2."),
            mix=weights(f"blocks.{index}.ffn.x_k")[None],
            key=Linear(weights(f"blocks.{index}.ffn.key.weight"), int8),
            value=Linear(weights(f"blocks.{index}.ffn.value.weight"), int8),
        ),
    )


def _time_mixing(
    config: ModelConfig, weights: Weights, index: int, dtype: torch.dtype, int8: bool
) -> operators.TimeMixing:
    def w(name: str) -> torch.Tensor:
        return weights(f"blocks.{index}.att.{name}")

    return operators.TimeMixing(
        norm=_norm(weights, f"blocks.{index}.ln1."),
        mix=torch.stack([w(f"x_{name}") for name in "rwkvag"]),
        receptance=Linear(w("receptance.weight"), int8),
        key=Linear(w("key.weight"), int8),
        value=Linear(w("value.weight"), int8),
        output=Linear(w("output.weight"), int8),
        decay=LowRank(w("w1"), w("w2"), w("w0"), torch.float32, activation="tanh"),
        rate=LowRank(w("a1"), w("a2"), w("a0"), dtype, output_activation="sigmoid"),
        gate=LowRank(w("g1"), w("g2"), None, dtype, activation="sigmoid"),
        value_mix=LowRank(w("v1"), w("v2"), w("v0"), dtype, output_activation="sigmoid") if index > 0 else None,
        k_k=w("k_k"),
        k_a=w("k_a"),
        r_k=w("r_k"),
        head_norm=_norm(weights, f"blocks.{index}.att.ln_x.", config.head_norm_eps),
    )


def _norm(weights: Weights, prefix: str, eps: float = LN_EPS) -> operators.Norm:
    return operators.Norm(weights(prefix + "weight"), weights(prefix + "bias"), eps)

"""The dimensions of a model, as inferred from its weights. Nothing here is read from a file's name."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.state.spec import StateSpec, TensorSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """What a model is, apart from its values."""

    generation: str  # "7"
    num_layers: int
    width: int
    num_heads: int
    head_size: int
    ffn_width: int
    vocab_size: int
    num_parameters: int
    fingerprint: str  # of the weights, hex; see engine.weights.fingerprint
    head_norm_eps: float  # of the group norm over heads: 1e-5 x head size in official models

    @property
    def state_spec(self) -> StateSpec:
        """The state this model reads and writes, all of it float32."""
        return self.state_spec_in(torch.float32)

    def state_spec_in(self, dtype: torch.dtype) -> StateSpec:
        """Return the state with its matrices `[value, key]` in `dtype`, float32 or float16; the rest is float32."""
        L, C, H, N = self.num_layers, self.width, self.num_heads, self.head_size
        return StateSpec(
            fingerprint=self.fingerprint,
            generation=self.generation,
            layout="value_key",
            tensors=(
                TensorSpec("wkv", (L, H, N, N), dtype),
                TensorSpec("shift", (L, 2, C), torch.float32),  # 0: before time mixing, 1: before channel mixing
            ),
        )

"""The float64 reference run on a model file: what logits and states should be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from engine.weights.open import open_weights
from kernels import reference


def reference_logits(model_path: Path, token_ids: list[int], head_norm_eps: float | None = None) -> np.ndarray:
    """Return the logits after each token, `[T, V]` float64, from the zero state."""
    return reference_run(open_weights(model_path), token_ids, head_norm_eps)[0].numpy()


def reference_run(
    weights: dict[str, torch.Tensor], token_ids: list[int], head_norm_eps: float | None = None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the logits `[T, V]`, and the state afterwards as a pool names its tensors, all float64."""
    exact = {name: tensor.double() for name, tensor in weights.items()}
    layers = reference.zero_state(exact)
    logits = reference.forward(exact, token_ids, layers, head_norm_eps)
    state = {
        "wkv": torch.stack([layer.wkv for layer in layers]),
        "shift": torch.stack([torch.stack([layer.att_shift, layer.ffn_shift]) for layer in layers]),
    }
    return logits, state

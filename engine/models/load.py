"""From a weights file to a model on a device: open, check, fingerprint, choose a dtype, prepare."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import torch

import kernels
from engine.models.config import ModelConfig
from engine.models.rwkv7 import RWKV7
from engine.weights.fingerprint import fingerprint
from engine.weights.open import open_weights
from engine.weights.tables import CheckedWeights, check_weights

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

logger = logging.getLogger(__name__)

INT8 = "int8"  # large matrices only, where the device is faster so; the rest as for a 16-bit file

# Below this size a model is read in float32 whatever its file holds: exact, and the memory it takes does not matter.
SMALL_MODEL_PARAMETERS = 32_000_000


def load_model(
    path: str | Path, device: torch.device, dtype: str = "auto", head_norm_eps: float | None = None
) -> RWKV7:
    """Return the model in the file at `path`; raises `ModelFileError` with everything that is wrong with it."""
    weights = check_weights(str(path), open_weights(path))
    config = model_config(weights, head_norm_eps)
    chosen = choose_dtype(dtype, weights.tensors["head.weight"].dtype, config.num_parameters, device)
    model = RWKV7(config, lambda name: weights.prepared(name, device, chosen), chosen, int8=dtype == INT8)
    if dtype == INT8 and not model.is_int8:
        logger.warning("no int8 operators on this device: the weights stay what they are", extra={"dtype": str(chosen)})
    return model


def model_config(weights: CheckedWeights, head_norm_eps: float | None = None) -> ModelConfig:
    """Return what the weights say about their model."""
    size = weights.dimensions
    return ModelConfig(
        generation=weights.generation,
        num_layers=weights.num_layers,
        width=size["C"],
        num_heads=size["H"],
        head_size=size["N"],
        ffn_width=size["F"],
        vocab_size=size["V"],
        num_parameters=sum(tensor.numel() for tensor in weights.tensors.values()),
        fingerprint=fingerprint(weights.tensors),
        head_norm_eps=1e-5 * size["N"] if head_norm_eps is None else head_norm_eps,
    )


def choose_dtype(name: str, stored: torch.dtype, num_parameters: int, device: torch.device) -> torch.dtype:
    """Return the dtype of weights and activations that `name` means; `auto` chooses.

    `auto` is bfloat16 for a 16-bit file where the device's operators are as fast with it, and float32 otherwise:
    float16 is never chosen, being slow on CPUs. Small models are float32 always. With `int8` it is the dtype of what is
    not int8.
    """
    if name == INT8:
        return torch.bfloat16 if kernels.is_fast_in_bfloat16(device) else torch.float32
    if name != "auto":
        return DTYPES[name]
    if stored == torch.float32 or num_parameters < SMALL_MODEL_PARAMETERS or not kernels.is_fast_in_bfloat16(device):
        return torch.float32
    return torch.bfloat16

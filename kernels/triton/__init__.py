"""The operators in Triton, for CUDA.

Importing this package imports no Triton. `register` hands the operators to PyTorch's dispatcher, which prefers them on
CUDA from then on. What they cost as compiled, and the budgets they are held to: `python -m kernels.triton.compile`.
"""

from __future__ import annotations

import logging
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from kernels.rwkv7 import Weights
    from kernels.triton.fused import FusedRwkv7

logger = logging.getLogger(__name__)

NAME = "Triton"

NAMES = ("pack_linear", "linear", "low_rank", "shift_mix", "wkv7", "sample")


def is_available() -> bool:
    """Say whether Triton is installed."""
    return find_spec("triton") is not None


@cache
def register() -> str | None:
    """Make these operators CUDA's, and return their name; None without Triton, which is logged, once."""
    if not is_available():
        logger.warning("Triton is not installed: PyTorch's operators will do the work, several times slower")
        return None
    from kernels.triton import operators

    binding = torch.library.Library("sostenuto", "IMPL")  # type: ignore[no-untyped-call]
    for name in NAMES:
        binding.impl(name, getattr(operators, name), "CUDA")  # type: ignore[no-untyped-call]
    _bindings.append(binding)
    return NAME


def fuse_rwkv7(weights: Weights, dtype: torch.dtype) -> FusedRwkv7 | None:
    """Return the model of these weights in few launches; None where they are not these kernels' to run."""
    if not (_bindings and weights.embedding.is_cuda):
        return None
    from kernels.triton.fused import FusedRwkv7, can_fuse

    return FusedRwkv7(weights, dtype) if can_fuse(weights, dtype) else None


_bindings: list[torch.library.Library] = []  # a binding ends with its object

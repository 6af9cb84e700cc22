"""Random RWKV-7 weights with the official names and shapes, for tests and benchmarks: speed does not depend on values.

The values are drawn so that a model behaves like a trained one where it matters: decays spread over (0.545, 1) with
most of them close to 1, every path moves the logits, activations stay of order one over thousands of tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class SyntheticShape:
    """The dimensions of a model to make up. The defaults are small, with several heads."""

    num_layers: int = 3
    width: int = 64
    head_size: int = 16
    vocab_size: int = 256
    ffn_width: int | None = None  # 4 x width
    decay_rank: int = 16
    rate_rank: int = 16
    value_rank: int = 8
    gate_rank: int = 24


RWKV7_0_1B = SyntheticShape(
    num_layers=12,
    width=768,
    head_size=64,
    vocab_size=65536,
    decay_rank=64,
    rate_rank=64,
    value_rank=32,
    gate_rank=128,
)


def synthetic_weights(
    shape: SyntheticShape | None = None,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> dict[str, torch.Tensor]:
    """Return the tensors of a random model on `device`; equal arguments give equal tensors."""
    shape = shape or SyntheticShape()
    draw = _Draw(seed, dtype, torch.device(device))
    C, V = shape.width, shape.vocab_size
    tensors = {"emb.weight": draw.matrix(V, C, scale=math.sqrt(C)), **draw.norm("blocks.0.ln0.", C)}
    for layer in range(shape.num_layers):
        tensors |= _block(draw, shape, layer)
    return tensors | draw.norm("ln_out.", C) | {"head.weight": draw.matrix(V, C, scale=1.5)}


def save_synthetic(
    path: Path,
    shape: SyntheticShape | None = None,
    *,
    seed: int = 0,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
) -> Path:
    """Write a random model to `path`, whose suffix (.pth or .safetensors) says in which format; returns `path`."""
    save_weights(path, synthetic_weights(shape, seed=seed, dtype=dtype, device=device))
    return path


def save_weights(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write `tensors` as .pth or .safetensors, by the suffix of `path`."""
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(tensors, path)
    else:
        torch.save(tensors, path)


def _block(draw: _Draw, shape: SyntheticShape, layer: int) -> dict[str, torch.Tensor]:
    C, F, N = shape.width, shape.ffn_width or 4 * shape.width, shape.head_size
    att, ffn = f"blocks.{layer}.att.", f"blocks.{layer}.ffn."
    ranks = {"w": shape.decay_rank, "a": shape.rate_rank, "v": shape.value_rank, "g": shape.gate_rank}
    if layer == 0:
        del ranks["v"]  # the first layer's value is the one that later layers mix in
    tensors = draw.norm(f"blocks.{layer}.ln1.", C) | draw.norm(f"blocks.{layer}.ln2.", C)
    tensors |= {f"{att}x_{letter}": draw.vector(C, 0.5, 0.25) for letter in "rwkvag"}
    # w = exp(-0.607 sigmoid(dw)): dw around -3 +- 2 spreads 1 - w from 0.0005 to 0.3
    offsets = {"w": (-3.0, 2.0), "a": (-0.2, 0.5), "v": (0.5, 0.3)}
    tensors |= {f"{att}{letter}0": draw.vector(C, *offsets[letter]) for letter in ranks if letter in offsets}
    for letter, rank in ranks.items():
        tensors[f"{att}{letter}1"] = draw.matrix(rank, C).t().contiguous()
        tensors[f"{att}{letter}2"] = draw.matrix(C, rank).t().contiguous()
    tensors |= {f"{att}{name}.weight": draw.matrix(C, C) for name in ("receptance", "key", "value", "output")}
    tensors |= {f"{att}k_k": draw.vector(C, 0.7, 0.1), f"{att}k_a": draw.vector(C, 1.0, 0.1)}
    tensors |= {f"{att}r_k": draw.vector(C, 0.0, 0.1).view(C // N, N)} | draw.norm(f"{att}ln_x.", C)
    tensors |= {f"{ffn}x_k": draw.vector(C, 0.5, 0.25)}
    return tensors | {f"{ffn}key.weight": draw.matrix(F, C), f"{ffn}value.weight": draw.matrix(C, F, scale=0.7)}


class _Draw:
    """Random tensors from one seed, in the order they are asked for."""

    def __init__(self, seed: int, dtype: torch.dtype, device: torch.device) -> None:
        self._random = torch.Generator(device).manual_seed(seed)
        self._dtype = dtype
        self._device = device

    def matrix(self, out_features: int, in_features: int, scale: float = 1.0) -> torch.Tensor:
        """`[out, in]`, which turns inputs of variance 1 into outputs of variance `scale ** 2`."""
        values = torch.randn(out_features, in_features, generator=self._random, device=self._device)
        return values.mul_(scale / math.sqrt(in_features)).to(self._dtype)

    def vector(self, size: int, mean: float, deviation: float) -> torch.Tensor:
        """`[1, 1, size]`, as official files keep their vectors."""
        values = torch.randn(1, 1, size, generator=self._random, device=self._device)
        return (values * deviation + mean).to(self._dtype)

    def norm(self, prefix: str, size: int) -> dict[str, torch.Tensor]:
        """Scale and shift of a normalisation, `[size]` each."""
        return {
            f"{prefix}weight": self.vector(size, 1.0, 0.1).view(size),
            f"{prefix}bias": self.vector(size, 0.0, 0.1).view(size),
        }

"""The generated checkpoint that benchmarks run on."""

from __future__ import annotations

from pathlib import Path

import torch

from engine.weights.synthetic import RWKV7_0_1B, save_synthetic


def ensure_model(directory: Path) -> Path:
    """Return a bfloat16 checkpoint of the 0.1B shape (12 x 768, vocabulary 65,536), made on first use: 382 MB."""
    path = directory / "rwkv7-0.1b-shaped.safetensors"
    if not path.exists():
        directory.mkdir(parents=True, exist_ok=True)
        partial = path.with_name("partial-" + path.name)
        save_synthetic(partial, RWKV7_0_1B, seed=0, dtype=torch.bfloat16)
        partial.rename(path)
    return path

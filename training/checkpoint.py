"""Checkpoints of a run: the model as any RWKV-7 loader reads it, and apart from it what resuming needs.

    RUN/step-00000200/model.safetensors      what is trained: all weights by their official names, or the adapter
                     /trainer.safetensors    optimizer moments, random number generators
                     /trainer.json           step, counters, scaler, best loss, configuration

A directory is written under another name and renamed when it is complete, so what bears a step's name is whole.
"""

from __future__ import annotations

import math
import os
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from training.adapters import load_trained_weights
from training.config import TrainConfig
from training.model import TrainingState

_MODEL, _TRAINER, _FACTS = "model.safetensors", "trainer.safetensors", "trainer.json"


class Progress(msgspec.Struct, kw_only=True):
    """What a run has done."""

    step: int = 0  # optimizer steps taken, skipped ones included: the next one's number
    num_tokens: int = 0
    num_skipped: int = 0  # steps whose gradients were not finite
    best_loss: float | None = None
    seconds: float = 0.0

    def add(self, num_tokens: int, grad_norm: float, seconds: float) -> None:
        """Count a step."""
        self.step += 1
        self.num_tokens += num_tokens
        self.seconds += seconds
        self.num_skipped += not math.isfinite(grad_norm)


class TrainerFacts(msgspec.Struct, kw_only=True):
    """The part of a checkpoint that is not tensors."""

    progress: Progress
    optimizer_groups: list[dict[str, Any]]
    scaler: dict[str, float] | None
    python_random: tuple[int, list[int], float | None]
    numpy_random: tuple[str, list[int], int, int, float]
    config: TrainConfig


def save_weights(weights: Mapping[str, Tensor], path: Path, dtype: torch.dtype | None = None) -> None:
    """Write weights as safetensors, atomically."""
    tensors = {name: tensor.detach().to("cpu", dtype or tensor.dtype).contiguous() for name, tensor in weights.items()}
    partial = path.with_name(path.name + ".partial")
    save_file(tensors, partial, metadata={"format": "pt"})
    _sync(partial)
    partial.replace(path)


def save_checkpoint(
    run_dir: Path,
    weights: Mapping[str, Tensor],
    optimizer_state: Mapping[str, Any],
    scaler: torch.amp.GradScaler | None,
    progress: Progress,
    carried: TrainingState | None,
    config: TrainConfig,
    keep: int,
) -> Path:
    """Write `RUN/step-N` and remove all but the newest `keep`. Returns its path.

    `weights` are those that are trained, `optimizer_state` is its `state_dict`; both whole.
    """
    path = run_dir / f"step-{progress.step:08d}"
    partial = run_dir / f".{path.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_weights(weights, partial / _MODEL)
    slots_of = optimizer_state["state"].items()
    tensors = {f"{index}.{key}": value for index, slots in slots_of for key, value in slots.items()}
    tensors["torch_random"] = torch.get_rng_state()
    if carried is not None:
        tensors |= {"carried_wkv": carried.wkv, "carried_shift": carried.shift}
    if torch.cuda.is_available():
        tensors["cuda_random"] = torch.cuda.get_rng_state()
    save_weights(tensors, partial / _TRAINER)
    version, internal, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    facts = TrainerFacts(
        progress=progress,
        optimizer_groups=optimizer_state["param_groups"],
        scaler=scaler.state_dict() if scaler is not None and scaler.is_enabled() else None,
        python_random=(version, list(internal), gauss),
        numpy_random=(str(kind), [int(key) for key in keys], int(position), int(has_gauss), float(cached)),
        config=config,
    )
    (partial / _FACTS).write_bytes(msgspec.json.format(msgspec.json.encode(facts)))
    _sync(partial / _FACTS)
    shutil.rmtree(path, ignore_errors=True)
    partial.rename(path)
    _sync(run_dir)
    for old in checkpoints(run_dir)[:-keep]:
        shutil.rmtree(old)
    return path


def load_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None
) -> tuple[Progress, TrainingState | None]:
    """Put model, optimizer, scaler and random number generators into the state that was saved.

    Returns what the run has done, and the recurrent states that its rows carry on with, if they do.
    """
    facts = msgspec.json.decode((path / _FACTS).read_bytes(), type=TrainerFacts)
    load_trained_weights(model, load_file(path / _MODEL))
    tensors = load_file(path / _TRAINER)
    torch.set_rng_state(tensors.pop("torch_random"))
    cuda_random = tensors.pop("cuda_random", None)
    if cuda_random is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(cuda_random)
    carried = None
    if "carried_wkv" in tensors:
        device = next(model.parameters()).device
        carried = TrainingState(tensors.pop("carried_wkv").to(device), tensors.pop("carried_shift").to(device))
    slots: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, key = name.split(".", 1)
        slots.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": slots, "param_groups": facts.optimizer_groups})
    if scaler is not None and facts.scaler is not None:
        scaler.load_state_dict(facts.scaler)
    version, internal, gauss = facts.python_random
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(facts.numpy_random)  # type: ignore[arg-type]
    return facts.progress, carried


def saved_config(path: Path) -> TrainConfig:
    """The configuration that a checkpoint was made with."""
    return msgspec.json.decode((path / _FACTS).read_bytes(), type=TrainerFacts).config


def checkpoints(run_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(run_dir.glob("step-*"))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

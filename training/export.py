"""From a run to a directory that a server can open, and back."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from training.adapters import adapt, load_trained_weights, merge
from training.checkpoint import checkpoints, save_weights, saved_config
from training.model import ModelShape, Rwkv7

_MODEL, _STATE, _TOKENIZER = "model.safetensors", "time_state.safetensors", "tokenizer.json"


def export(run_dir: Path, directory: Path, *, dtype: torch.dtype = torch.bfloat16, best: bool = False) -> Path:
    """Write the newest weights of a run, or its best, with its tokenizer into `directory`; returns the weights' path.

    A LoRA run is merged with its base. Of a state-tuned run only the states are written, as `time_state.safetensors` in
    float32: its model is the base. `sostenuto.json`, which names the chat template, is written where there is none.
    """
    directory.mkdir(parents=True, exist_ok=True)
    saved = checkpoints(run_dir)
    if not saved:
        raise FileNotFoundError(f"{run_dir} holds no checkpoint")
    tune = saved_config(saved[-1]).tune
    weights = load_file(run_dir / "best.safetensors" if best else saved[-1] / _MODEL)
    if tune.method == "state":
        save_weights(weights, directory / _STATE)
        return directory / _STATE
    if tune.method == "lora":
        model = load_model(Path(tune.base))
        adapt(model, tune)
        load_trained_weights(model, weights)
        merge(model)
        weights = model.state_dict()
    save_weights(weights, directory / _MODEL, dtype)
    _copy_tokenizer(run_dir, directory, saved_config(saved[-1]).data.tokenizer)
    notes = directory / "sostenuto.json"
    if not notes.exists():
        notes.write_text('{"chat_template": "world"}\n')
    return directory / _MODEL


def _copy_tokenizer(run_dir: Path, directory: Path, tokenizer: str) -> None:
    """Put the run's vocabulary beside the weights; bytes and World have no file, and are known by their sizes."""
    if tokenizer in ("bytes", "world"):
        return
    source = run_dir if tokenizer == "auto" else Path(tokenizer)
    shutil.copyfile(source / _TOKENIZER if source.is_dir() else source, directory / _TOKENIZER)


def load_model(path: Path) -> Rwkv7:
    """Open weights with official names as a model that computes in float32. `path`: a file, or a directory with one."""
    weights = load_file(path / _MODEL if path.is_dir() else path)
    model = Rwkv7(shape_of(weights))
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    return model.eval()


def shape_of(weights: dict[str, Tensor]) -> ModelShape:
    """The shape that these weights have."""
    vocab_size, width = weights["emb.weight"].shape
    num_layers = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
    return ModelShape(vocab_size, width, num_layers, weights["blocks.0.att.r_k"].shape[1])

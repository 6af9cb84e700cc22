"""Weights files as named tensors: `.pth`, `.safetensors`, or a directory that holds one. Knows no model.

Nothing in a file is executed: `.pth` is unpickled with `weights_only`. Both formats are mapped, not read, so opening
costs nothing until a tensor is used.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch

from engine.errors import ModelFileError

SUFFIXES = (".safetensors", ".pth")


def open_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """Return the tensors of the model file at `path` by name, on the CPU; raises `ModelFileError`."""
    file = find_weights_file(path)
    try:
        tensors = _open_safetensors(file) if file.suffix == ".safetensors" else _open_pth(file)
    except Exception as error:  # a file of something else can break its reader in any way
        raise ModelFileError(str(file), [f"it cannot be read as {file.suffix}: {_first_line(error)}"]) from error
    if not tensors:
        raise ModelFileError(str(file), ["it holds no tensors"])
    return tensors


def find_weights_file(path: str | Path) -> Path:
    """Return the one weights file that `path` means; raises `ModelFileError`."""
    path = Path(path)
    if path.is_dir():
        found = sorted(child for child in path.iterdir() if child.suffix in SUFFIXES)
        if len(found) == 1:
            return found[0]
        names = ", ".join(child.name for child in found) or "none"
        raise ModelFileError(
            str(path), [f"a model directory must hold exactly one .pth or .safetensors; found: {names}"]
        )
    if not path.is_file():
        raise ModelFileError(str(path), ["there is no such file"])
    if path.suffix not in SUFFIXES:
        raise ModelFileError(str(path), [f"its name must end in {' or '.join(SUFFIXES)}, not {path.suffix!r}"])
    return path


def _open_safetensors(file: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = safetensors.torch.load_file(file)
    return tensors


def _open_pth(file: Path) -> dict[str, torch.Tensor]:
    # Only the zip form of `torch.save` can be mapped; files written by very old versions are read whole.
    content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    if not isinstance(content, Mapping):
        raise ValueError(f"it holds a {type(content).__name__}, not a dictionary of tensors")
    odd = [str(name) for name, value in content.items() if not isinstance(value, torch.Tensor)]
    if odd and not any(isinstance(value, torch.Tensor) for value in content.values()):
        raise ValueError(f"it holds no tensors, but {', '.join(odd[:5])}")
    # Keys with other values are kept as empty tensors, so that whoever knows the model can name them.
    return {str(name): value if isinstance(value, torch.Tensor) else torch.empty(0) for name, value in content.items()}


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__

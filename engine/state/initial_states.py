"""Tuned states that histories may begin from instead of the zero state, as files of a directory.

`NAME.safetensors`, or `NAME.pth` as published state-tuned files are, holds one `blocks.i.att.time_state`
[H, N(value), N(key)] a layer; what precedes the first token is zero in both mixings. They are few, read once when the
engine starts, and stay in host memory. Other files in the directory mean nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch

from engine.errors import ModelFileError
from engine.messages import InitialStateRef
from engine.state.spec import RecurrentState, StateSpec
from engine.token_chain import root_digest
from engine.weights.fingerprint import fingerprint
from engine.weights.open import SUFFIXES, open_weights

NAME = r"[A-Za-z0-9_.:@-]{1,128}"


def load_initial_states(directory: str | Path, spec: StateSpec) -> dict[InitialStateRef, RecurrentState]:
    """Return the states in `directory`, in the order of their names.

    Raises `ModelFileError`, which names the file, for one that is not a state of the model behind `spec`, and for two
    files of one name.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ModelFileError(str(directory), ["initial_states must name a directory, and there is none"])
    states: dict[InitialStateRef, RecurrentState] = {}
    names: set[str] = set()
    for path in sorted(path for path in directory.iterdir() if path.suffix in SUFFIXES):
        if re.fullmatch(NAME, path.stem) is None:
            raise ModelFileError(str(path), [f"an initial state's name must match {NAME}"])
        if path.stem in names:
            raise ModelFileError(str(path), [f"another file of this directory is named {path.stem}, too"])
        names.add(path.stem)
        tensors = _state_tensors(path, spec)
        ref = InitialStateRef(path.stem, fingerprint(tensors))  # of what was tuned, however it is kept
        states[ref] = RecurrentState(0, root_digest(initial_state=ref.fingerprint), _kept(path, tensors, spec))
    return states


def _state_tensors(path: Path, spec: StateSpec) -> dict[str, torch.Tensor]:
    """Return the file's states as a state of the model in float32: `wkv` as tuned, everything else zero."""
    found = open_weights(path)
    shapes = {tensor.name: tensor.shape for tensor in spec.tensors}
    num_layers, *shape = shapes["wkv"]
    expected = [f"blocks.{layer}.att.time_state" for layer in range(num_layers)]
    if problems := _problems(found, expected, shape):
        raise ModelFileError(str(path), ["it is no initial state of the served model", *problems])
    tensors = {tensor.name: torch.zeros(tensor.shape) for tensor in spec.tensors}
    tensors["wkv"] = torch.stack([found[name].float() for name in expected])
    return tensors


def _kept(path: Path, tensors: Mapping[str, torch.Tensor], spec: StateSpec) -> dict[str, torch.Tensor]:
    """Return `tensors` in the dtypes of `spec`."""
    kept = {tensor.name: tensors[tensor.name].to(tensor.dtype) for tensor in spec.tensors}
    if not all(bool(tensor.isfinite().all()) for tensor in kept.values()):
        raise ModelFileError(str(path), ["it holds numbers too large for state_dtype float16: serve it with float32"])
    return kept


def _problems(found: Mapping[str, torch.Tensor], expected: list[str], shape: list[int]) -> list[str]:
    problems = [f"{name} is missing" for name in expected if name not in found]
    for name, tensor in found.items():
        if name not in expected:
            problems.append(f"{name} is not expected: the file must hold time_state of {len(expected)} layers only")
        elif list(tensor.shape) != shape:
            problems.append(f"{name} has the shape {list(tensor.shape)}, expected {shape} (heads, value, key)")
        elif not tensor.is_floating_point() or not bool(tensor.float().isfinite().all()):
            problems.append(f"{name} must hold finite floating-point numbers")
    return problems

"""The operators in C++ for the machine's own processor: fixed order of every sum, weights packed so that they stream.

Results are bitwise equal for any batch, any cut of a prompt and any number of threads. `register` compiles the library
on first use (`build`), binds it (`library`) and hands its operators to PyTorch's dispatcher (`operators`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from kernels.cpu import build
from kernels.cpu.library import Team, load
from kernels.cpu.operators import Operators

if TYPE_CHECKING:
    from kernels.cpu.fused import FusedRwkv7
    from kernels.rwkv7 import Weights

logger = logging.getLogger(__name__)

_NAMES = ("pack_linear", "linear", "low_rank", "relu_squared", "shift_mix", "wkv7", "sample", "logprobs")

_DEFAULT_THREADS = torch.get_num_threads()  # physical cores, unless the process was told otherwise


def is_available() -> bool:
    """Say whether the operators can run here; builds the library if need be."""
    return _library_path(None) is not None


def register(num_threads: int | None = None, cache_directory: Path | None = None) -> str | None:
    """Make these operators the CPU's, and return the name of their instruction set; None where they cannot be built.

    `num_threads` None is as many as PyTorch started with. Called again with another number, later calls run on so many
    threads; what was packed stays good. What went wrong with a build is logged, once.
    """
    path = _library_path(cache_directory)
    if path is None:
        return None
    operators = _operators(path)
    num_threads = num_threads or _DEFAULT_THREADS
    if operators.team.num_threads != num_threads:
        operators.team = Team(operators.team.library, num_threads)
    return operators.team.target


def is_registered() -> bool:
    """Say whether these operators are the CPU's."""
    return any(operators.enabled for operators in _registered)


def fuse_rwkv7(weights: Weights) -> FusedRwkv7 | None:
    """Return the model of these weights as one or two calls; None where they are not these operators' to run."""
    from kernels.cpu.fused import FusedRwkv7, can_fuse

    for operators in _registered:
        if can_fuse(operators, weights):
            return FusedRwkv7(operators, weights)
    return None


@contextmanager
def eager() -> Iterator[None]:
    """Within the block, weights are packed and operators run as on a machine without a compiler; for tests."""
    registered = [operators for operators in _registered if operators.enabled]
    for operators in registered:
        operators.enabled = False
    try:
        yield
    finally:
        for operators in registered:
            operators.enabled = True


_registered: list[Operators] = []


@cache
def _library_path(cache_directory: Path | None) -> Path | None:
    try:
        return build.build(cache_directory)
    except (build.CompileError, OSError) as error:
        logger.warning("no compiled CPU operators, PyTorch's will do the work several times slower: %s", error)
        return None


@cache
def _operators(path: Path) -> Operators:
    operators = Operators(Team(load(path), 1))
    binding = torch.library.Library("sostenuto", "IMPL")  # type: ignore[no-untyped-call]
    for name in _NAMES:
        binding.impl(name, getattr(operators, name), "CPU")  # type: ignore[no-untyped-call]
    _bindings.append(binding)
    _registered.append(operators)
    return operators


_bindings: list[torch.library.Library] = []  # a binding ends with its object

"""The compiled operators by themselves, not through PyTorch's dispatcher."""

from __future__ import annotations

import pytest
import torch

from kernels.cpu.build import CompileError, build, find_compiler
from kernels.cpu.library import Team, load
from kernels.cpu.operators import Operators

# What the compiler is told instead of `native`: paths that this machine would not take.
OTHER_TARGETS = ("cooperlake", "x86-64-v4", "x86-64-v3", "x86-64")  # the first: bfloat16 and bytes, without tiles


@pytest.fixture(
    scope="session", params=["native", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHER_TARGETS)]
)
def operators(request: pytest.FixtureRequest) -> Operators:
    """The operators on two threads, compiled for a target that this machine can run."""
    target: str = request.param
    try:
        find_compiler()
    except CompileError:
        pytest.skip("no C++ compiler")
    if target != "native" and not _runs_here(target):
        pytest.skip(f"this machine does not run {target}")
    return Operators(Team(load(build(target=target)), 2))


def _runs_here(target: str) -> bool:
    capabilities = torch.cpu.get_capabilities()
    needed = {"cooperlake": "avx512_bf16", "x86-64-v4": "avx512_bw", "x86-64-v3": "avx2"}.get(target, "sse4_2")
    return capabilities.get("architecture") == "x86_64" and bool(capabilities.get(needed))

"""Models for parity tests: random, several heads, several layers, run in poisoned memory, on every implementation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engine.models.load import load_model
from engine.models.rwkv7 import RWKV7
from engine.weights.synthetic import SyntheticShape, save_synthetic
from tests.implementations import IMPLEMENTATIONS, running_on
from tests.poisoned_memory import poisoned_memory

__all__ = ["poisoned_memory"]

SHAPE = SyntheticShape(num_layers=3, width=96, head_size=32, vocab_size=131, decay_rank=24, gate_rank=40)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors this small are not worth a second thread, and waiting for one costs more than the work."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="session")
def synthetic_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of random weights in float32: three layers, three heads."""
    return save_synthetic(tmp_path_factory.mktemp("model") / "synthetic.pth", SHAPE, seed=5, dtype=torch.float32)


@pytest.fixture(scope="session", params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest) -> str:
    """Each implementation of the operators."""
    name: str = request.param
    return name


@pytest.fixture(autouse=True)
def _on_that_implementation(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run every test that has an implementation on it."""
    if "implementation" in request.fixturenames:
        with running_on(request.getfixturevalue("implementation")):
            yield
    else:
        yield


@pytest.fixture(scope="session", params=["float32", "bfloat16"])
def model(request: pytest.FixtureRequest, synthetic_file: Path, implementation: str) -> RWKV7:
    """That model in each dtype whose results must be bitwise reproducible, packed by each implementation."""
    with running_on(implementation):
        return load_model(synthetic_file, torch.device("cpu"), request.param)

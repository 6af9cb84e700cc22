"""Fixtures that every part of the suite may use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from engine.weights.synthetic import save_synthetic
from tests.redis_server import RedisServer

ROOT = Path(__file__).resolve().parent.parent

# No test is about time: a busy machine is not a defect.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

# The tests' tensors are small: threads that wait for each other on a busy machine cost more than they bring.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of real tiny models and texts beside the checkout; skips the test where it is absent."""
    for parent in ROOT.parents:
        if (parent / "shared" / "models").is_dir():
            return parent / "shared"
    pytest.skip("no shared/models beside the checkout: comparisons with published logits need it")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random RWKV-7 model over bytes, three layers with four heads each, in float32."""
    return save_synthetic(tmp_path_factory.mktemp("model") / "tiny.safetensors", dtype=torch.float32)


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    """A real Redis with its append-only file on, on a free loopback port; the test may kill and restart it."""
    with RedisServer(tmp_path / "redis") as server:
        yield server

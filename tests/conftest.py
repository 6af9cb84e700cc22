"""Fixtures that every part of the suite may use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.redis_server import RedisServer

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of real tiny models and texts beside the checkout; skips the test where it is absent."""
    for parent in ROOT.parents:
        if (parent / "shared" / "models").is_dir():
            return parent / "shared"
    pytest.skip("no shared/models beside the checkout: comparisons with published logits need it")


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    """A real Redis with its append-only file on, on a free loopback port; the test may kill and restart it."""
    with RedisServer(tmp_path / "redis") as server:
        yield server

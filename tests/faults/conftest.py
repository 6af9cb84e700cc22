"""A small real model, and servers that keep their conversations in either kind of store."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.redis_server import RedisServer
from tests.server_process import ServerProcess, redis_options

ServerMaker = Callable[[str], ServerProcess]


@pytest.fixture(params=["embedded", "redis"])
def store_options(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Sequence[str]]:
    """Options that choose where conversations live: in the data directory, or in a real Redis."""
    if request.param == "embedded":
        yield ()
        return
    with RedisServer(tmp_path / "redis") as redis:
        yield redis_options(redis.url)


@pytest.fixture
def server(tiny_model: Path, store_options: Sequence[str], tmp_path: Path) -> Iterator[ServerProcess]:
    """A running server."""
    with ServerProcess(tiny_model, tmp_path / "data", *store_options) as process:
        yield process

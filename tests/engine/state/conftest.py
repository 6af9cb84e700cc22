from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.engine.state.stores import FileUnderTest, MemoryUnderTest, RedisUnderTest, StoreUnderTest
from tests.redis_server import RedisServer


@pytest.fixture(scope="session")
def lasting_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One Redis, set as the shipped one for states, for all tests that leave it running."""
    settings = ("--include", str(ROOT / "deploy/redis/state.conf"), "--appendonly", "no")
    with RedisServer(tmp_path_factory.mktemp("redis"), *settings) as server:
        yield server


@pytest.fixture
def redis(lasting_redis: RedisServer) -> Iterator[RedisUnderTest]:
    """A store on an empty Redis."""
    under_test = RedisUnderTest(lasting_redis)
    yield under_test
    under_test.store.close()
    under_test.raw.close()


@pytest.fixture(params=["memory", "file", "redis"])
def tested(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[StoreUnderTest]:
    """Each implementation in turn, empty."""
    if request.param == "redis":
        yield request.getfixturevalue("redis")  # asked for by name: tests of the others start no server
    elif request.param == "file":
        yield FileUnderTest(tmp_path / "states")
    else:
        yield MemoryUnderTest()

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.redis_server import RedisServer
from tests.server.conversations.ledgers import LedgerUnderTest, RedisUnderTest, SqliteUnderTest


@pytest.fixture(scope="session")
def lasting_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One Redis for all tests that leave it running."""
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
async def redis_ledger(lasting_redis: RedisServer) -> AsyncIterator[RedisUnderTest]:
    """An open ledger on an empty Redis."""
    under_test = RedisUnderTest(lasting_redis)
    await under_test.raw.flushall()
    await under_test.ledger.open()
    yield under_test
    await under_test.close()


@pytest.fixture(params=["sqlite", "memory", "redis"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[LedgerUnderTest]:
    """Each implementation of the ledger in turn, open and empty."""
    if request.param == "redis":
        # Asked for by name, so that tests of the others start no server.
        under_test: LedgerUnderTest = RedisUnderTest(request.getfixturevalue("lasting_redis"))
        assert isinstance(under_test, RedisUnderTest)
        await under_test.raw.flushall()
    else:
        under_test = SqliteUnderTest(tmp_path / "ledger" / "ledger.sqlite" if request.param == "sqlite" else None)
    await under_test.ledger.open()
    yield under_test
    await under_test.close()

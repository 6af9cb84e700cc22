from __future__ import annotations

from pathlib import Path

import pytest

from server.conversations.ledger import Durability
from server.conversations.open_ledger import open_ledger
from server.conversations.redis_ledger import RedisLedger
from server.conversations.sqlite_ledger import SqliteLedger
from tests.server.conversations.ledgers import new_conversation


async def test_sqlite_takes_any_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What follows `sqlite:///` is the path, absolute or relative, taken as it is."""
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / "an absolute %20 one.sqlite", Path("relative/ledger.sqlite")):
        ledger = open_ledger(f"sqlite:///{path}")
        assert isinstance(ledger, SqliteLedger)
        await ledger.open()
        await ledger.create(new_conversation())
        await ledger.close()
        assert path.is_file()


async def test_memory_keeps_nothing() -> None:
    """`memory:` is a ledger that says what it is worth."""
    ledger = open_ledger("memory:")
    await ledger.open()
    await ledger.create(new_conversation())
    assert ledger.durability is Durability.MEMORY
    await ledger.close()


@pytest.mark.parametrize("url", ["redis://host:6380/2", "rediss://user:secret@host", "unix:///run/redis.sock?db=1"])
async def test_redis_is_chosen_by_scheme(url: str) -> None:
    """Plain, TLS and socket addresses are Redis; nothing connects before `open`, and no password is shown."""
    ledger = open_ledger(url)
    assert isinstance(ledger, RedisLedger)
    assert "secret" not in repr(ledger)
    await ledger.close()


NO_ADDRESSES = ("", "ledger.sqlite", "/var/lib/ledger.sqlite", "sqlite:///", "sqlite://ledger", "sqlite:ledger")
NO_REDIS = (
    "redis:",
    "redis",
    "redis://host:port",
    "redis://host:0x/1",
    "redis://host/prod",
    "redis://user:secret#@host",
)


@pytest.mark.parametrize("url", [*NO_ADDRESSES, *NO_REDIS, "memory", "http://somebody:secret@host", "postgres://db"])
def test_anything_else_is_refused(url: str) -> None:
    """A bad address is a `ValueError` that says what would be one, and repeats no password."""
    with pytest.raises(ValueError, match="address") as refusal:
        open_ledger(url)
    assert "secret" not in str(refusal.value)

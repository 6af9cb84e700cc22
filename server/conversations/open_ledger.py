"""From a ledger's address to the ledger."""

from __future__ import annotations

from pathlib import Path

from server.conversations.ledger import Ledger
from server.conversations.redis_ledger import RedisLedger
from server.conversations.sqlite_ledger import SqliteLedger

SQLITE_PREFIX = "sqlite:///"
REDIS_SCHEMES = ("redis", "rediss", "unix")


def open_ledger(url: str) -> Ledger:
    """Return the ledger at `url`, not yet opened; raises `ValueError` for what is no address of a ledger.

    `sqlite:///` + a path, relative or absolute; `redis://` (`rediss://` over TLS, `unix://` over a socket); `memory:`.
    """
    scheme, separator, _ = url.partition(":")
    if url == "memory:":
        return SqliteLedger(None)
    if url.startswith(SQLITE_PREFIX) and url != SQLITE_PREFIX:
        return SqliteLedger(Path(url.removeprefix(SQLITE_PREFIX)))
    if separator and scheme in REDIS_SCHEMES:
        return RedisLedger(url)
    raise ValueError(
        f"a ledger's address begins with sqlite:///PATH, redis://, rediss:// or unix://, or is memory:; got {scheme!r}"
    )

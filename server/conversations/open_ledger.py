"""From a ledger's address to the ledger."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

from server.conversations.ledger import Ledger
from server.conversations.sqlite_ledger import SqliteLedger

SQLITE_PREFIX = "sqlite:///"
REDIS_PREFIXES = ("redis://", "rediss://", "unix://")


def open_ledger(url: str) -> Ledger:
    """Return the ledger at `url`, not yet opened; raises `ValueError` for what is no address of a ledger.

    `sqlite:///` + a path, relative or absolute; `redis://` (`rediss://` over TLS, `unix://` over a socket); `memory:`.
    """
    if url == "memory:":
        return SqliteLedger(None)
    if url.startswith(SQLITE_PREFIX) and url != SQLITE_PREFIX:
        return SqliteLedger(Path(url.removeprefix(SQLITE_PREFIX)))
    if not url.startswith(REDIS_PREFIXES):
        raise ValueError(
            "the address of a ledger is memory:, or begins with sqlite:///, redis://, rediss:// or unix://"
        )
    from server.conversations.redis_ledger import RedisLedger  # a tenth of a second for those who need it

    try:
        database = "" if url.startswith("unix://") else urlsplit(url).path.strip("/")
        int(database or 0)  # redis-py would take anything else for database 0
        return RedisLedger(url)
    except ValueError:  # its message may repeat a piece of the password
        raise ValueError(
            "the address of a Redis ledger is redis://[USER:PASSWORD@]HOST[:PORT][/DATABASE], "
            "with %XX for special characters in a password"
        ) from None

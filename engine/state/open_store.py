"""From a state store's address to the store."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from engine.state.file_store import FileStore
from engine.state.memory_store import MemoryStore
from engine.state.store import StateStore

REDIS_PREFIXES = ("redis://", "rediss://", "unix://")


def open_store(url: str) -> StateStore:
    """Return the state store at `url`; raises `ValueError` for what is no address of one.

    `file:///` + an absolute path (`Path.as_uri()`); `redis://` (`rediss://` over TLS, `unix://` over a socket);
    `memory:`.
    """
    if url == "memory:":
        return MemoryStore()
    if url.startswith("file:///") and url.strip("/") != "file:":
        return FileStore(Path(unquote(urlsplit(url).path)))
    if not url.startswith(REDIS_PREFIXES):
        raise ValueError(
            "the address of a state store is memory:, or begins with file:/// (an absolute path), redis://, rediss:// "
            "or unix://"
        )
    from engine.state.redis_store import RedisStateStore  # a tenth of a second for those who need it

    try:
        database = "" if url.startswith("unix://") else urlsplit(url).path.strip("/")
        int(database or 0)  # redis-py would take anything else for database 0
        return RedisStateStore(url)
    except ValueError:  # its message may repeat a piece of the password
        raise ValueError(
            "the address of a Redis state store is redis://[USER:PASSWORD@]HOST[:PORT][/DATABASE], "
            "with %XX for special characters in a password"
        ) from None

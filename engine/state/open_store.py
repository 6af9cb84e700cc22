"""From a state store's address to the store."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from engine.state.file_store import FileStore
from engine.state.memory_store import MemoryStore
from engine.state.redis_store import RedisStateStore
from engine.state.store import StateStore

REDIS_SCHEMES = ("redis", "rediss", "unix")


def open_store(url: str) -> StateStore:
    """Return the state store at `url`; raises `ValueError` for what is no address of one.

    `file:///` + an absolute path (`Path.as_uri()`); `redis://` (`rediss://` over TLS, `unix://` over a socket);
    `memory:`.
    """
    parts = urlsplit(url)
    if url == "memory:":
        return MemoryStore()
    if parts.scheme == "file" and parts.netloc in ("", "localhost") and parts.path.strip("/"):
        return FileStore(Path(unquote(parts.path)))
    if parts.scheme in REDIS_SCHEMES:
        return RedisStateStore(url)
    raise ValueError(
        "a state store's address is memory:, or begins with file:///DIRECTORY (an absolute path), redis://, rediss:// "
        f"or unix://; got {parts.scheme!r}"
    )

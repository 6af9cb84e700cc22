"""State stores for tests: real ones, with time that a test moves by hand."""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from pathlib import Path

from redis import Redis

from engine.state.file_store import FileStore
from engine.state.memory_store import MemoryStore
from engine.state.redis_store import RedisStateStore
from engine.state.store import StateStore
from tests.redis_server import RedisServer

HOUR = 3600.0


def new_id() -> str:
    """Return a name that no test has used."""
    return secrets.token_hex(16)


class StoreUnderTest(ABC):
    """A state store, and what a test does to it behind its back."""

    store: StateStore

    @abstractmethod
    def travel(self, seconds: float) -> None:
        """Let time pass."""

    @abstractmethod
    def names(self) -> set[str]:
        """Return the ids that take up room, quarantine apart."""

    @abstractmethod
    def quarantined(self) -> dict[str, bytes]:
        """Return what an operator finds in quarantine."""


class MemoryUnderTest(StoreUnderTest):
    """The store in memory, on a clock of its own."""

    def __init__(self) -> None:
        self.time = 0.0
        self.memory = MemoryStore(clock=lambda: self.time)
        self.store = self.memory

    def travel(self, seconds: float) -> None:
        """Set the clock forward."""
        self.time += seconds

    def names(self) -> set[str]:
        """The dictionary's keys."""
        return set(self.memory._blobs)

    def quarantined(self) -> dict[str, bytes]:
        """The other dictionary."""
        return self.memory.quarantined


class FileUnderTest(StoreUnderTest):
    """Files, on a clock of their own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.time = 1_700_000_000.0
        self.store = FileStore(directory, clock=lambda: self.time)

    def travel(self, seconds: float) -> None:
        """Set the clock forward."""
        self.time += seconds

    def names(self) -> set[str]:
        """All files' names."""
        return {path.name for path in self.directory.glob("[0-9a-f][0-9a-f]/*")}

    def quarantined(self) -> dict[str, bytes]:
        """The folder's files."""
        return {path.name: path.read_bytes() for path in (self.directory / "quarantine").iterdir()}


class RedisUnderTest(StoreUnderTest):
    """Redis, whose times to live are shortened from outside."""

    def __init__(self, server: RedisServer) -> None:
        self.raw = Redis.from_url(server.url)
        self.raw.flushall()
        self.store = RedisStateStore(server.url)

    def travel(self, seconds: float) -> None:
        """Let every key live for less long."""
        for key in self.raw.keys("rk:*"):
            assert self.raw.pttl(key) > 0, "nothing may live for ever"
            self.raw.pexpire(key, self.raw.pttl(key) - round(seconds * 1000))

    def names(self) -> set[str]:
        """The keys of blobs."""
        return {key.decode().removeprefix("rk:b:") for key in self.raw.keys("rk:b:*")}

    def quarantined(self) -> dict[str, bytes]:
        """The keys of the quarantine, their chunks joined."""
        return {
            key.decode().removeprefix("rk:q:"): b"".join(
                chunk for field, chunk in sorted(self.raw.hgetall(key).items()) if field != b"size"
            )
            for key in self.raw.keys("rk:q:*")
        }

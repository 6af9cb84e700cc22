"""How a server ends: it takes nothing new, lets what runs finish for a while, and tells the rest (promise P19)."""

from __future__ import annotations

import asyncio
from typing import Protocol

from server.errors import ServerDraining


class Interruptible(Protocol):
    """Something a client waits for that can be ended with an error it is told."""

    def interrupt(self, error: Exception) -> None:
        """End with `error`, unless the end is already being written."""
        ...


class Drain:
    """Who is being served, and whether anybody still may come. Belongs to the event loop."""

    def __init__(self) -> None:
        self.has_begun = False
        self.is_forced = False
        self._num_requests = 0
        self._running: set[Interruptible] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    def enter(self) -> None:
        """Count a request in; raises `ServerDraining` once the drain has begun."""
        if self.has_begun:
            raise ServerDraining
        self._num_requests += 1
        self._idle.clear()

    def keep(self) -> None:
        """Count once more what is counted already, because it goes on without its request; `leave` ends it."""
        self._num_requests += 1

    def leave(self) -> None:
        """Count a request out, when its answer is complete."""
        self._num_requests -= 1
        if self._num_requests == 0:
            self._idle.set()

    @property
    def num_running(self) -> int:
        """How many are being generated for."""
        return len(self._running)

    def add(self, running: Interruptible) -> None:
        """Tell `running` when its time is over."""
        self._running.add(running)

    def discard(self, running: Interruptible) -> None:
        """Forget `running`: it has ended."""
        self._running.discard(running)

    def begin(self) -> None:
        """Refuse requests from now on."""
        self.has_begun = True

    def force(self) -> None:
        """Wait for nothing any more: whoever asked for the drain has asked again."""
        self.is_forced = True

    async def wait(self, timeout_seconds: float, farewell_seconds: float = 5.0) -> None:
        """Wait until every answer is complete; interrupt what still runs after `timeout_seconds`.

        Answers that cannot be delivered within `farewell_seconds` more (a client that does not read) are given up.
        """
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_seconds)
        except TimeoutError:
            for running in tuple(self._running):
                running.interrupt(ServerDraining())
            try:
                await asyncio.wait_for(self._idle.wait(), farewell_seconds)
            except TimeoutError:
                return

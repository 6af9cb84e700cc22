"""Calls that run to their end even if the request that made them goes away. Knows no store."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

Result = TypeVar("Result")

logger = logging.getLogger(__name__)


class UninterruptedCalls:
    """The calls of one store that are under way.

    A call that is cut short when its client disconnects can leave its reply on a pooled connection, for the next
    caller to read (CVE-2023-28858), or a lease that nobody knows of. Here, cancelling the caller leaves the call alone.
    """

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    async def run(
        self,
        call: Coroutine[Any, Any, Result],
        undo: Callable[[Result], Awaitable[None]] | None = None,
    ) -> Result:
        """Return what `call` returns. If the caller is cancelled first, `call` goes on and `undo` gets its result."""
        task = self._start(call)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            self._start(self._abandon(task, undo))
            raise

    async def wait(self) -> None:
        """Wait until no call is under way."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _start(self, call: Coroutine[Any, Any, Result]) -> asyncio.Task[Result]:
        task = asyncio.create_task(call)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _abandon(self, task: asyncio.Task[Result], undo: Callable[[Result], Awaitable[None]] | None) -> None:
        try:
            result = await task
            if undo is not None:
                await undo(result)
        except Exception as error:
            logger.info("a store call whose caller had gone failed: %s", error)

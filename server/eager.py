"""Coroutines begun at once, without a task: most have nothing to wait for. Python 3.12 has tasks that begin so."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Generator
from typing import Any


def begin(work: Awaitable[None]) -> asyncio.Task[None] | None:
    """Run `work` up to where it waits; returns the task that waits and goes on, or nothing if it is done.

    Until it waits it must not ask which task it runs in.
    """
    steps = work.__await__()
    try:
        awaited = next(steps)
    except StopIteration:
        return None
    return asyncio.get_running_loop().create_task(_finish(_Rest(steps, awaited)))


async def _finish(rest: _Rest) -> None:
    await rest


class _Rest:
    """What is left of a coroutine that waits for `awaited`."""

    def __init__(self, steps: Generator[Any, Any, None], awaited: object) -> None:
        self._steps = steps
        self._awaited = awaited

    def __await__(self) -> Generator[Any, Any, None]:
        try:
            yield self._awaited
        except BaseException:
            self._steps.close()
            raise
        yield from self._steps

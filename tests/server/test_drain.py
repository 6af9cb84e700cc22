"""The drain: who is waited for, for how long, and who is told."""

from __future__ import annotations

import asyncio

import pytest

from server.drain import Drain
from server.errors import ServerDraining


class Turn:
    """Something that runs until it is interrupted."""

    def __init__(self, drain: Drain) -> None:
        self.error: Exception | None = None
        self._drain = drain
        drain.enter()
        drain.add(self)

    def interrupt(self, error: Exception) -> None:
        """End with `error`."""
        self.error = error
        self.end()

    def end(self) -> None:
        """End."""
        self._drain.discard(self)
        self._drain.leave()


async def test_nobody_comes_in_after_it_has_begun() -> None:
    """A drain refuses whoever comes, and waits for nobody if nobody is in."""
    drain = Drain()
    drain.begin()
    with pytest.raises(ServerDraining):
        drain.enter()
    await drain.wait(timeout_seconds=0)


async def test_what_ends_in_time_is_not_interrupted() -> None:
    """The wait is over when the last answer is complete."""
    drain = Drain()
    turns = [Turn(drain), Turn(drain)]
    drain.begin()
    waiting = asyncio.create_task(drain.wait(timeout_seconds=60))
    turns[0].end()
    await asyncio.sleep(0)
    assert not waiting.done()
    turns[1].end()
    await waiting
    assert [turn.error for turn in turns] == [None, None]


async def test_what_takes_too_long_is_interrupted() -> None:
    """After the timeout every running turn hears `ServerDraining`."""
    drain = Drain()
    turns = [Turn(drain), Turn(drain)]
    drain.begin()
    await drain.wait(timeout_seconds=0)
    assert [type(turn.error) for turn in turns] == [ServerDraining, ServerDraining]


async def test_an_answer_nobody_reads_is_given_up() -> None:
    """A request that does not end even then does not keep the server."""
    drain = Drain()
    drain.enter()
    drain.begin()
    await drain.wait(timeout_seconds=0, farewell_seconds=0)

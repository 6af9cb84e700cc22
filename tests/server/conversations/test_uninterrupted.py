from __future__ import annotations

import asyncio
import logging

import pytest

from server.conversations.uninterrupted import UninterruptedCalls


class Call:
    """A call that begins, waits to be let on, and ends."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.may_end = asyncio.Event()
        self.has_ended = False

    async def run(self) -> str:
        """Wait, then return or raise."""
        await self.may_end.wait()
        self.has_ended = True
        if self.error is not None:
            raise self.error
        return "result"


async def abandon(calls: UninterruptedCalls, call: Call, undone: list[str]) -> None:
    """Make a call, and cancel its caller before it ends."""

    async def undo(result: str) -> None:
        undone.append(result)

    caller = asyncio.create_task(calls.run(call.run(), undo=undo))
    await asyncio.sleep(0)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller


async def test_a_call_returns_its_result_and_undoes_nothing() -> None:
    """While nobody is cancelled a call is just a call."""
    calls, call, undone = UninterruptedCalls(), Call(), []

    async def undo(result: str) -> None:
        undone.append(result)

    call.may_end.set()
    assert await calls.run(call.run(), undo=undo) == "result"
    await calls.wait()
    assert undone == []


async def test_a_call_outlives_its_caller_and_is_undone() -> None:
    """Cancelling the caller lets the call end, and hands what it brought to `undo`."""
    calls, call, undone = UninterruptedCalls(), Call(), list[str]()
    await abandon(calls, call, undone)
    assert not call.has_ended
    call.may_end.set()
    await calls.wait()
    assert call.has_ended
    assert undone == ["result"]


async def test_the_failure_of_an_abandoned_call_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """An error that nobody waits for is not lost, and there is nothing to undo."""
    caplog.set_level(logging.INFO)
    calls, call, undone = UninterruptedCalls(), Call(OSError("no route")), list[str]()
    await abandon(calls, call, undone)
    call.may_end.set()
    await calls.wait()
    assert "no route" in caplog.text
    assert undone == []


async def test_an_error_reaches_the_caller() -> None:
    """What a call raises is raised."""
    calls, call = UninterruptedCalls(), Call(OSError("no route"))
    call.may_end.set()
    with pytest.raises(OSError, match="no route"):
        await calls.run(call.run())

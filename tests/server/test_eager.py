"""Coroutines that are begun without a task."""

from __future__ import annotations

import asyncio

import pytest

from server.eager import begin


async def test_what_need_not_wait_is_done_at_once() -> None:
    """No task is made, and nothing is left to be done."""
    done: list[int] = []

    async def work() -> None:
        done.append(1)

    assert begin(work()) is None
    assert done == [1]


async def test_what_waits_is_gone_on_with() -> None:
    """However often it waits, and it gets what it waited for."""
    got: list[int] = []
    first: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def work() -> None:
        got.append(await first)
        await asyncio.sleep(0)
        got.append(2)

    task = begin(work())
    assert task is not None
    first.set_result(1)
    await task
    assert got == [1, 2]


async def test_an_error_before_the_first_wait_is_the_callers() -> None:
    """One after it is the task's."""
    first: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def fail() -> None:
        raise KeyError("at once")

    async def fail_later() -> None:
        await first
        raise KeyError("later")

    with pytest.raises(KeyError, match="at once"):
        begin(fail())
    task = begin(fail_later())
    assert task is not None
    first.set_exception(ValueError("what it waited for"))
    with pytest.raises(ValueError, match="what it waited for"):
        await task


async def test_what_is_cancelled_cleans_up() -> None:
    """Also while it waits for the first time, which no task began."""
    has_ended: list[bool] = []

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            has_ended.append(True)

    task = begin(work())
    assert task is not None
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert has_ended == [True]

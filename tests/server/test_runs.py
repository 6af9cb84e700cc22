"""Runs: generations that are recorded, whoever reads them."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

import pytest

from server.drain import Drain
from server.generation import Generation, Started
from server.metrics import Metrics
from server.rate_limits import Budget, Limits
from server.runs import Run, Runs
from tests.server.test_event_stream import Writer


async def three_events(generation: Generation) -> None:
    """Work that has something to say."""
    for index in range(3):
        generation.emit(Started(index))


async def stumble(generation: Generation) -> None:
    """Work with a defect."""
    raise RuntimeError("an attribute is missing")


async def read(run: Run, start: int = 0) -> bytes:
    """Return the frames from number `start` on."""
    return b"".join([data async for data in run.read(start)])


async def start(runs: Runs, drain: Drain, work: Callable[[Generation], Awaitable[None]]) -> Run:
    """Begin a run of `work`, called `a`."""

    async def generate() -> Generation:
        return Generation(drain, Budget(Limits()), work)

    return await runs.start("a", generate, Writer())


def make_runs() -> tuple[Drain, Metrics, Runs]:
    """Return runs, and what they report to."""
    drain, metrics = Drain(), Metrics(state_tier="file")
    return drain, metrics, Runs(drain, metrics.http)


async def test_a_run_is_read_from_any_frame_by_anybody() -> None:
    """While it goes on, and when it has ended; its size is that of what is read."""
    drain, _, runs = make_runs()
    run = await start(runs, drain, three_events)
    assert runs.find("a") is run
    whole = await read(run)
    assert whole == b"opening\n\n0\n\n1\n\n2\n\nclosing\n\n"
    assert await read(run, start=3) == b"2\n\nclosing\n\n"
    assert run.num_bytes == len(whole)
    await drain.wait(timeout_seconds=60)


async def test_a_defect_is_told_counted_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    """With its traceback: nobody may be there to complain."""
    drain, metrics, runs = make_runs()
    with caplog.at_level(logging.ERROR):
        run = await start(runs, drain, stumble)
        assert b"internal_error" in await read(run)
    (record,) = caplog.records
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], RuntimeError)
    assert 'rwkv_errors_total{code="internal_error"} 1.0' in metrics.render().decode()

"""One load test from several processes: a single one cannot read what a fast server sends to many users.

Each holds its share of the conversations, and all begin together. What they see comes to this process as it happens,
so that progress and statistics are those of one run.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from threading import BrokenBarrierError
from typing import Any

from loadtest.client import ChatClient
from loadtest.generator import LoadGenerator, LoadRun
from loadtest.options import Options
from loadtest.reply import TurnRecord
from loadtest.share import Share, shares_of

READY_SECONDS = 60.0  # all processes have started by then
STOP = b"stop"

OnTurn = Callable[[LoadRun, TurnRecord], None]


class ProcessLost(Exception):
    """A process of the load test ended before its share was over."""


class ProcessGroup:
    """Runs the shares of one load test; looks like a `LoadGenerator`."""

    def __init__(self, options: Options, on_turn: OnTurn | None = None) -> None:
        self._options = options
        self._on_turn = on_turn
        self._members: list[_Member] = []
        self._began: float | None = None

    def clock(self) -> float:
        """Return the seconds since the run began; 0 before it has."""
        return 0.0 if self._began is None else time.perf_counter() - self._began

    def stop(self) -> None:
        """Begin no more turns."""
        for member in self._members:
            member.stop()

    async def run(self) -> LoadRun:
        """Run to the end and return what was seen; raises `ServerUnusable` before the first turn, `ProcessLost`."""
        # Asked once, by this process: then the others cannot fail before they have begun.
        async with ChatClient(self._options, self.clock) as client:
            options = replace(self._options, model=await client.find_model())
        run = LoadRun(self._options, str(options.model))
        context = multiprocessing.get_context("spawn")
        shares = shares_of(options)
        barrier = context.Barrier(len(shares) + 1)
        try:
            for share in shares:
                self._members.append(_Member(context, options, share, barrier))
            following = [member.follow(run, self._note) for member in self._members]
            await asyncio.gather(self._begin(barrier), *following)
        finally:
            barrier.abort()
            for member in self._members:
                member.end()
        return run

    async def _begin(self, barrier: Barrier) -> None:
        with suppress(BrokenBarrierError):  # who broke it says so
            await asyncio.to_thread(barrier.wait, READY_SECONDS)
        self._began = time.perf_counter()

    def _note(self, run: LoadRun, record: TurnRecord) -> None:
        run.records.append(record)
        run.in_flight = sum(member.in_flight for member in self._members)
        if self._on_turn is not None:
            self._on_turn(run, record)


class _Member:
    """A process, as the one that started it sees it."""

    def __init__(self, context: Any, options: Options, share: Share, barrier: Barrier) -> None:
        self.in_flight = 0
        self._connection, there = context.Pipe()
        self._process = context.Process(target=_hold, args=(options, share, barrier, there), daemon=True)
        self._process.start()
        there.close()

    def stop(self) -> None:
        with suppress(OSError):  # it has ended by itself
            self._connection.send_bytes(STOP)

    def end(self) -> None:
        self._process.terminate()
        self._process.join()
        self._connection.close()

    async def follow(self, run: LoadRun, note: OnTurn) -> None:
        """Read what the process sees until its share is over."""
        loop = asyncio.get_running_loop()
        is_over = loop.create_future()

        def read() -> None:
            try:
                message = self._connection.recv()
            except EOFError:
                loop.remove_reader(self._connection.fileno())
                is_over.set_exception(ProcessLost("a process of the load test ended before its share was over"))
                return
            if isinstance(message, LoadRun):
                loop.remove_reader(self._connection.fileno())
                self._add(run, message)
                is_over.set_result(None)
            else:
                record, self.in_flight = message
                note(run, record)

        loop.add_reader(self._connection.fileno(), read)
        await is_over

    def _add(self, run: LoadRun, share: LoadRun) -> None:
        run.elapsed_seconds = max(run.elapsed_seconds, share.elapsed_seconds)
        run.num_conversations += share.num_conversations
        run.lags += share.lags


def _hold(options: Options, share: Share, barrier: Barrier, connection: Connection) -> None:
    """Hold one share, in a process of its own, and report it: each turn, then the run without them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started this one says when to stop
    run = asyncio.run(_generate(options, share, barrier, connection))
    run.records.clear()
    connection.send(run)


async def _generate(options: Options, share: Share, barrier: Barrier, connection: Connection) -> LoadRun:
    def tell(run: LoadRun, record: TurnRecord) -> None:
        connection.send((record, run.in_flight))

    def stop() -> None:
        loop.remove_reader(connection.fileno())
        generator.stop()

    generator = LoadGenerator(share.options(options), tell, share)
    loop = asyncio.get_running_loop()
    loop.add_reader(connection.fileno(), stop)
    await asyncio.to_thread(barrier.wait, READY_SECONDS)
    try:
        return await generator.run()
    finally:
        loop.remove_reader(connection.fileno())

"""Generations that outlive whoever asked for them: their frames are recorded, to be read from anywhere, by several.

A run counts as a request until it has ended, so a drain waits for it. Afterwards its frames stay for a while, for
readers whose connection broke; they live in this process only.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

from server.drain import Drain
from server.generation import Generation
from server.metrics import HttpMetrics
from server.responses.errors import ResponseCancelled
from server.streaming import ReplyWriter, told_of

KEEP_SECONDS = 300.0
MAX_KEPT_BYTES = 64 << 20  # of ended runs; the oldest go first

END_OF_FRAME = b"\n\n"


class Run:
    """One generation, recorded frame by frame."""

    def __init__(self, generation: Generation, writer: ReplyWriter, metrics: HttpMetrics) -> None:
        self.frames: list[bytes] = []
        self.num_bytes = 0  # of the frames
        self.has_ended = False
        self._writer = writer
        self._generation = generation
        self._metrics = metrics
        self._news = asyncio.Event()

    async def record(self) -> None:
        """Follow the generation to its end."""
        try:
            self._add(self._writer.opening())
            while events := await self._generation.take():
                for event in events:
                    self._add(self._writer.frames(event))
            self._add(self._writer.closing())
        except Exception as error:
            self._add(self._writer.failure(told_of(error, self._metrics)))
        finally:
            await self._generation.aclose()
            self.has_ended = True
            self._news.set()

    def cancel(self) -> None:
        """End the generation, unless its turn is being committed already."""
        self._generation.interrupt(ResponseCancelled())

    async def wait(self) -> None:
        """Return when it has ended."""
        async for _ in self.read():
            pass

    async def read(self, start: int = 0) -> AsyncIterator[bytes]:
        """Yield the frames from number `start` on, as many at once as there are, until the last."""
        while True:
            if start < len(self.frames):
                yield b"".join(self.frames[start:])
                start = len(self.frames)
            elif self.has_ended:
                return
            else:
                await self._news.wait()

    def _add(self, data: bytes) -> None:
        self.frames += [part + END_OF_FRAME for part in data.split(END_OF_FRAME)[:-1]]
        self.num_bytes += len(data)
        news, self._news = self._news, asyncio.Event()
        news.set()


class Runs:
    """The runs of one server, by id. Belongs to its event loop."""

    def __init__(self, drain: Drain, metrics: HttpMetrics) -> None:
        self._drain = drain
        self._metrics = metrics
        self._runs: dict[str, Run] = {}  # oldest first
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self, run_id: str, generate: Callable[[], Awaitable[Generation]], writer: ReplyWriter) -> Run:
        """Begin a run; raises `ServerDraining`, and what `generate` raises."""
        self._drain.enter()
        try:
            run = Run(await generate(), writer, self._metrics)
        except BaseException:
            self._drain.leave()
            raise
        self._runs[run_id] = run
        task = asyncio.create_task(self._follow(run_id, run))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return run

    def find(self, run_id: str) -> Run | None:
        """Return a run that has not ended, or not long ago."""
        return self._runs.get(run_id)

    async def _follow(self, run_id: str, run: Run) -> None:
        try:
            await run.record()
        finally:
            self._drain.leave()
            self._make_room()
            asyncio.get_running_loop().call_later(KEEP_SECONDS, self._forget, run_id, run)

    def _make_room(self) -> None:
        ended = [(run_id, run) for run_id, run in self._runs.items() if run.has_ended]
        excess = sum(run.num_bytes for _, run in ended) - MAX_KEPT_BYTES
        for run_id, run in ended:
            if excess <= 0:
                return
            excess -= run.num_bytes
            self._forget(run_id, run)

    def _forget(self, run_id: str, run: Run) -> None:
        if self._runs.get(run_id) is run:
            del self._runs[run_id]

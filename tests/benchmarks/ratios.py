"""What each layer leaves of the speed below it: the engine of its kernels, the server of its engine. Side by side."""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from pathlib import Path

from tqdm import tqdm

from engine.client import AsyncEngine
from tests.benchmarks import DEFAULT_THREADS
from tests.benchmarks.engine_bench import ZERO, EngineBench, Settings
from tests.benchmarks.peers.compare import PeerProcess
from tests.benchmarks.sse_bench import Clients
from tests.conftest import ROOT
from tests.server_process import ServerProcess

STEP_BATCH = 16
STEP_ROUNDS = 7  # as many as others take one of: they are short, and scatter by a tenth
STREAM_ROUNDS = 3  # likewise
NUM_STREAMS = 64
POLL_SECONDS = 0.01  # a reader that looks more often takes the engine's processors from it


class RatioBench:
    """Runs both sections; everything measured against each other is loaded at once and takes turns."""

    def __init__(self, model: Path, directory: Path, num_threads: int, settings: Settings) -> None:
        self._bench = EngineBench(model, directory, num_threads, settings)
        self._settings = settings
        self._threads = str(num_threads or DEFAULT_THREADS)

    async def run(self) -> dict[str, object]:
        """Return `engine_over_kernels` and `served_over_engine`, medians of the rounds' ratios."""
        engine, _ = await self._bench.start(self._bench.config())
        model = str(self._bench.model.resolve())
        kernels = PeerProcess(
            [sys.executable, "-m", "tests.benchmarks.peers.ours", model, self._threads], ROOT, {"PYTHONPATH": str(ROOT)}
        )
        steps, streams = [], []
        try:
            for _ in tqdm(range(STEP_ROUNDS * self._settings.rounds), desc="engine over kernels"):
                bare = await asyncio.to_thread(self._kernels_rate, kernels)
                steps.append(await self._bench.decode_rate(engine, STEP_BATCH) / bare)
            kernels.close()
            options = ("--num-threads", self._threads, "--tokenizer", "world")
            with ServerProcess(self._bench.model.resolve(), self._bench.directory / "served", *options) as server:
                await asyncio.to_thread(self._served_seconds, server)  # not counted
                for _ in tqdm(range(STREAM_ROUNDS * self._settings.rounds), desc="served over engine"):
                    bare_seconds = await self._engine_seconds(engine)
                    streams.append(bare_seconds / await asyncio.to_thread(self._served_seconds, server))
        finally:
            await engine.close()
        return {
            "engine_over_kernels": {str(STEP_BATCH): round(statistics.median(steps), 3)},
            "served_over_engine": {str(NUM_STREAMS): round(statistics.median(streams), 3)},
        }

    def _kernels_rate(self, kernels: PeerProcess) -> float:
        """Return tokens a second of forward passes and logits alone."""
        token_ids = self._bench.tokens(self._settings.decode_tokens)
        return len(token_ids) * STEP_BATCH / float(kernels.ask("decode", token_ids, STEP_BATCH))

    async def _engine_seconds(self, engine: AsyncEngine) -> float:
        """Return how long all streams take, from the first request to the last token."""
        started_at = time.perf_counter()
        await asyncio.gather(
            *(self._bench.generate(engine, ZERO, self._bench.tokens(1), self._num_tokens) for _ in range(NUM_STREAMS))
        )
        return time.perf_counter() - started_at

    def _served_seconds(self, server: ServerProcess) -> float:
        """The same over HTTP, from the first byte of a request to the last `[DONE]`."""
        started_at = time.perf_counter()
        clients = Clients(server.port, NUM_STREAMS, "/v1/completions", self._num_tokens, temperature=0)
        clients.count_until(0, num_done=NUM_STREAMS, poll_seconds=POLL_SECONDS)
        clients.close()
        return time.perf_counter() - started_at

    @property
    def _num_tokens(self) -> int:
        return self._settings.decode_tokens

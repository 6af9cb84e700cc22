"""What the engine's process costs a row and step, beside a device that costs nothing. The last line is one JSON object.

The whole loop runs as it does for a card: commands, scheduler, tables of rows, tokens, chains of kept states, events,
and a client in another process that reads them. Only the steps themselves are left out: every row samples the same.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import zmq

from engine import garbage
from engine.config import EngineConfig
from engine.loop import EngineLoop
from engine.messages import (
    GenerationRequest,
    Hello,
    SamplingParams,
    SequenceOutput,
    StateSource,
    StepReport,
    StopRules,
    Submit,
    decode_event,
    encode,
)
from engine.models.load import load_model
from engine.process import describe
from engine.runner.cuda_graphs import DecodeGraphs
from engine.runner.graph_runner import GraphModelRunner
from engine.state.memory_store import MemoryStore
from engine.token_chain import root_digest
from engine.tokenizer import load
from engine.weights.synthetic import SyntheticShape, save_synthetic
from tests.engine.runner.host_graphs import CPU, RunAgain

SHAPE = SyntheticShape(num_layers=1, width=32, head_size=8, vocab_size=256)
SAMPLED = 65
STOP_ID = 0


class FreeRunner(GraphModelRunner):
    """The runner for a card, whose steps cost nothing; notes what the process had used when each began."""

    def _record(self, max_rows: int, max_tokens: int) -> DecodeGraphs:
        self.seconds: dict[int, list[float]] = {}  # by number of rows, padding included

        def step(fields: dict[str, torch.Tensor], sampled: torch.Tensor) -> None:
            num_rows = len(fields["slots"])
            self.seconds.setdefault(num_rows, []).append(time.process_time())
            sampled[:num_rows] = SAMPLED

        return DecodeGraphs(step, max_rows, CPU, RunAgain(), max_tokens)


def read_all(endpoint: str, num_sequences: int, max_tokens: int, keep_state: bool) -> None:
    """Be the client: submit, and read until every sequence has ended."""
    socket = zmq.Context[zmq.Socket[bytes]]().socket(zmq.DEALER)
    socket.connect(endpoint)
    socket.send(encode(Hello()))
    for number in range(num_sequences):
        request = GenerationRequest(
            request_id=f"request-{number:028}",
            prompt_ids=[1 + number % 100, 2, 3, 4],
            sampling=SamplingParams(seed=number, temperature=1.0, top_p=0.9),
            stop=StopRules(max_tokens=max_tokens, stop_token_ids=(STOP_ID,)),
            source=StateSource(num_tokens=0, chain=root_digest()),
            keep_state=keep_state,
        )
        socket.send(encode(Submit(request)))
    num_running = num_sequences
    while num_running:
        report = decode_event(socket.recv())
        if isinstance(report, StepReport):
            num_running -= sum(isinstance(e, SequenceOutput) and e.finish_reason is not None for e in report.events)


def measure(runner: FreeRunner, config: EngineConfig, num_rows: int, num_steps: int, keep_state: bool) -> list[float]:
    """Return the CPU seconds of the engine's process that each step of `num_rows` rows took."""
    runner.seconds.clear()
    with tempfile.TemporaryDirectory(prefix="sostenuto-bench-") as directory:
        endpoint = f"ipc://{directory}/engine"
        arguments = (endpoint, num_rows, num_steps, keep_state)
        client = multiprocessing.get_context("spawn").Process(target=read_all, args=arguments)
        client.start()
        loop = EngineLoop(
            config, runner, load("bytes", config.model_path, 256), MemoryStore(), describe(config, runner, ()),
            zmq.Context[zmq.Socket[bytes]](), endpoint,
        )  # fmt: skip
        while client.is_alive():
            loop.step()
        client.join()
    moments = runner.seconds[num_rows][num_steps // 8 :]  # without the first: caches are cold
    return [after - before for before, after in itertools.pairwise(moments)]


def run(sizes: Sequence[int], num_steps: int) -> dict[str, dict[str, float]]:
    """Return microseconds a step and a row, by number of rows, without and with states that are kept."""
    results = {}
    with tempfile.TemporaryDirectory(prefix="sostenuto-bench-") as directory:
        path = save_synthetic(Path(directory) / "model.pth", SHAPE, seed=0, dtype=torch.float32)
        config = EngineConfig(model_path=str(path), max_num_seqs=max(sizes), max_num_batched_tokens=4096)
        runner = FreeRunner(load_model(path, CPU, "float32"), 2 * config.max_num_seqs + 1)
        garbage.settle()  # as an engine does that has loaded its model
        for keep_state in (False, True):
            for num_rows in sizes:
                taken = [seconds * 1e6 for seconds in measure(runner, config, num_rows, num_steps, keep_state)]
                median, best = statistics.median(taken), statistics.quantiles(taken, n=10)[0]
                figures = {"step_us": median, "row_us": median / num_rows, "row_us_of_best_tenth": best / num_rows}
                name = f"{num_rows} rows" + (", states kept" if keep_state else "")
                results[name] = {key: round(value, 2) for key, value in figures.items()}
                print(f"{name}: {json.dumps(results[name])}", flush=True)
    return results


def main() -> int:
    """Measure, print a line a size, print one JSON line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.loop_bench", description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 64, 384])
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args()
    torch.set_num_threads(1)  # a table that is copied on the host would be by all of them; a card does it itself
    print(json.dumps(run(options.rows, options.steps)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

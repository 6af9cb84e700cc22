"""`python -m tests.benchmarks.kernels_cpu`: the CPU operators beside PyTorch's, in one run. The last line is JSON.

Each figure is the median of interleaved rounds, so that a busy machine slows all alike: trust the ratios. Weights are
streamed from memory, as in decoding: products go round matrices that no cache holds. Bytes counted are the weights'.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

import kernels
from kernels import cpu, eager

C, F, H, N, V = 768, 3072, 12, 64, 65536  # the 0.1B model
BATCH_SIZES = (1, 4, 16, 64)
STREAMED_BYTES = 256 << 20
STATE_LAYERS = 12


def main() -> None:
    """Measure every section and print it."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.kernels_cpu", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=0, help="0: PyTorch's choice")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    num_threads = torch.get_num_threads()
    backend = kernels.select_backend(torch.device("cpu"), num_threads)
    with torch.inference_mode():
        results: dict[str, object] = {
            "backend": backend,
            "threads": num_threads,
            "linear_bf16": linear(torch.bfloat16, options.rounds),
            "linear_fp32": linear(torch.float32, options.rounds),
            "int8_over_bf16": int8(options.rounds),
            "wkv7": wkv7(options.rounds),
            "sampling": sampling(options.rounds),
        }
    print(json.dumps(results))


@dataclass(frozen=True, slots=True)
class Way:
    """One way of doing the work: called with the number of the round trip, so that it can go round its data."""

    run: Callable[[int], object]
    is_compiled: bool = False


def side_by_side(ways: Mapping[str, Way], rounds: int, calls: int) -> dict[str, float]:
    """Return the median seconds a call takes in each way, rounds interleaved, the first one not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for round_number in range(rounds + 1):
        for name, way in ways.items():
            time.sleep(0.002)  # both teams of threads go to sleep: neither is measured against the other's spinning
            if not way.is_compiled:
                with cpu.eager():
                    elapsed = timed(way.run, calls)
            else:
                elapsed = timed(way.run, calls)
            if round_number:
                seconds[name].append(elapsed / calls)
    return {name: statistics.median(values) for name, values in seconds.items()}


def timed(run: Callable[[int], object], calls: int) -> float:
    """Return the seconds that `calls` calls take."""
    run(0)
    started_at = time.perf_counter()
    for i in range(calls):
        run(i)
    return time.perf_counter() - started_at


def linear(dtype: torch.dtype, rounds: int) -> dict[str, dict[str, float]]:
    """Return GB/s of weights for a product of the feed-forward's shape, and the ratio to PyTorch's."""
    num_matrices = STREAMED_BYTES // (F * C * dtype.itemsize)
    plain = [torch.randn(F, C).to(dtype) for _ in range(num_matrices)]
    compiled = [kernels.Linear(weight).packed for weight in plain]
    with cpu.eager():
        prepacked = [kernels.Linear(weight).packed for weight in plain]
    found = {}
    for size in BATCH_SIZES:
        x = torch.randn(size, C).to(dtype)
        ways = {
            "compiled": Way(lambda i, x=x: torch.ops.sostenuto.linear(x, compiled[i % num_matrices], F), True),
            "onednn_prepacked": Way(lambda i, x=x: eager.linear(x, prepacked[i % num_matrices], F)),
            "pytorch": Way(lambda i, x=x: nn.functional.linear(x, plain[i % num_matrices])),
        }
        seconds = side_by_side(ways, rounds, max(4, num_matrices // max(1, size // 4)))
        rates = {name: round(F * C * dtype.itemsize / value / 1e9, 2) for name, value in seconds.items()}
        found[str(size)] = rates | {"ratio": round(seconds["pytorch"] / seconds["compiled"], 2)}
        print(f"linear {dtype} B={size:3} GB/s of weights {found[str(size)]}")
    return found


def int8(rounds: int) -> dict[str, float]:
    """Return how many times faster a product is with int8 weights than with bfloat16 ones."""
    num_matrices = STREAMED_BYTES // (F * C)
    plain = torch.randn(F, C).bfloat16()
    packed = {
        name: [kernels.Linear(plain, name == "int8").packed for _ in range(num_matrices)] for name in ("bf16", "int8")
    }
    found = {}
    for size in BATCH_SIZES:
        x = torch.randn(size, C).bfloat16()
        ways = {
            name: Way(lambda i, x=x, them=them: torch.ops.sostenuto.linear(x, them[i % num_matrices], F), True)
            for name, them in packed.items()
        }
        seconds = side_by_side(ways, rounds, max(4, num_matrices // max(1, size // 4)))
        found[str(size)] = round(seconds["bf16"] / seconds["int8"], 2)
    print(f"int8 over bf16 {found}")
    return found


def wkv7(rounds: int) -> dict[str, dict[str, float]]:
    """Return microseconds a token and layer for decoding B sequences, states from memory, and for a prompt."""
    pool = torch.randn(max(BATCH_SIZES), STATE_LAYERS, H, N, N) * 0.1
    parameters = [torch.ones(C), torch.ones(C), torch.randn(H, N) * 0.1, torch.ones(C), torch.zeros(C)]
    found = {}
    for num_sequences, length in [*((size, 1) for size in BATCH_SIZES), (1, 256)]:
        T = num_sequences * length
        rows = [torch.randn(T, C) for _ in range(6)]
        slots, starts = torch.arange(num_sequences), torch.arange(num_sequences + 1) * length

        def run(
            i: int, rows: list[torch.Tensor] = rows, slots: torch.Tensor = slots, at: torch.Tensor = starts
        ) -> None:
            kernels.wkv7(*rows, None, None, *parameters, 64e-5, pool[:, i % STATE_LAYERS], slots, at)

        ways = {"compiled": Way(run, True), "pytorch": Way(run)}
        seconds = side_by_side(ways, rounds, STATE_LAYERS if length == 1 else 1)
        name = f"decode {num_sequences}" if length == 1 else f"prompt of {length}"
        found[name] = {way: round(value / T * 1e6, 2) for way, value in seconds.items()}
        found[name]["ratio"] = round(seconds["pytorch"] / seconds["compiled"], 2)
        print(f"wkv7 {name}: us a token and layer {found[name]}")
    return found


def sampling(rounds: int) -> dict[str, dict[str, float]]:
    """Return milliseconds a step for B rows of logits as peaked as a trained model's."""
    found = {}
    for size in BATCH_SIZES:
        logits = torch.randn(size, V) * 3
        rules = torch.tensor([[0.96, 32, 0.76, 0.0, 0.5]] * size, dtype=torch.float64)

        def run(i: int, logits: torch.Tensor = logits, rules: torch.Tensor = rules) -> None:
            kernels.sample(logits, rules)

        seconds = side_by_side({"compiled": Way(run, True), "pytorch": Way(run)}, rounds, 3)
        found[str(size)] = {way: round(value * 1e3, 3) for way, value in seconds.items()}
        found[str(size)]["ratio"] = round(seconds["pytorch"] / seconds["compiled"], 2)
        print(f"sampling B={size}: ms a step {found[str(size)]}")
    return found


if __name__ == "__main__":
    main()

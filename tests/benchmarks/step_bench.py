"""`python -m tests.benchmarks.step_bench`: a step of the model alone, with states in float32 and in float16, in turn.

The generated 0.1B-shaped checkpoint, bfloat16 weights; logits included, sampling and engine not. Medians of rounds, in
milliseconds, and what float16 states leave of the time. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from tqdm import tqdm

import kernels
from engine.models.load import load_model
from engine.models.rwkv7 import RWKV7
from engine.runner.input_batch import InputBatch
from engine.runner.plan import Chunk
from engine.state.pool import StatePool
from tests.benchmarks import DEFAULT_THREADS
from tests.benchmarks.synthetic_model import ensure_model

STEPS = {"decode_1": (1, 1), "decode_4": (4, 1), "decode_16": (16, 1), "decode_64": (64, 1), "decode_256": (256, 1),
         "prefill_512": (1, 512)}  # sequences, tokens of each  # fmt: skip
CALLS = 5  # in a row, the first one not counted


def main() -> None:
    """Measure every step and print it."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.step_bench", description=__doc__)
    parser.add_argument("--cache", type=Path, default=Path("build/bench"), help="where the checkpoint is kept")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    device = torch.device("cpu")
    backend = kernels.select_backend(device, DEFAULT_THREADS)
    torch.set_num_threads(1)  # the operators bring their own
    model = load_model(ensure_model(options.cache), device, "bfloat16")
    num_slots = max(num_rows for num_rows, _ in STEPS.values()) + 1
    dtypes = {"float32": torch.float32, "float16": torch.float16}
    pools = {name: StatePool(model.config.state_spec_in(dtype), num_slots, device) for name, dtype in dtypes.items()}
    found: dict[str, dict[str, float]] = {}
    with torch.inference_mode():
        for name, shape in STEPS.items():
            found[name] = measure(model, pools, *shape, options.rounds)
            print(f"{name:12} {found[name]}")
    print(json.dumps({"backend": backend, "threads": DEFAULT_THREADS, "step_ms": found}))


def measure(model: RWKV7, pools: dict[str, StatePool], num_rows: int, num_tokens: int, rounds: int) -> dict[str, float]:
    """Return the median milliseconds of a step by the dtype of its states, and the ratio."""
    chunks = [Chunk(row, [(7 * row + t) % 60_000 + 1 for t in range(num_tokens)]) for row in range(num_rows)]
    batch = InputBatch.from_chunks(chunks, model.device)
    seconds: dict[str, list[float]] = {name: [] for name in pools}
    for number in tqdm(range(rounds), leave=False):
        for name in list(pools)[:: 1 if number % 2 else -1]:
            for call in range(CALLS):
                started_at = time.perf_counter()
                model.logits(model.forward(batch, pools[name]))
                if call:
                    seconds[name].append(time.perf_counter() - started_at)
    medians = {name: 1e3 * statistics.median(values) for name, values in seconds.items()}
    ratio = medians["float16"] / medians["float32"]
    return {name: round(value, 2) for name, value in medians.items()} | {"float16_over_float32": round(ratio, 3)}


if __name__ == "__main__":
    main()

"""`make bench`: what the engine does on this machine with a model of the 0.1B shape. The last line is one JSON object.

The checkpoint is generated (12 layers of width 768, vocabulary 65,536, random weights in bfloat16): speed does not
depend on the values. Sections measured against each other are interleaved in rounds and reported as medians, because
machines are shared. Everything runs through the engine as the server uses it: scheduler, messages, sampling, state
store.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from tests.benchmarks.engine_bench import EngineBench, Settings
from tests.benchmarks.peers.compare import Settings as PeerSettings
from tests.benchmarks.peers.compare import compare
from tests.benchmarks.ratios import RatioBench
from tests.benchmarks.sse_bench import Settings as SseSettings
from tests.benchmarks.sse_bench import SseBench
from tests.benchmarks.start_bench import StartBench
from tests.benchmarks.synthetic_model import ensure_model
from tests.benchmarks.turns_bench import TurnBench

SECTIONS = ("engine", "ratios", "sse", "turns", "start", "peers")


def main() -> None:
    """Measure, print a table, print one JSON line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument(
        "--cache", type=Path, default=Path("build/bench"), help="where the generated checkpoint is kept"
    )
    parser.add_argument("--threads", type=int, default=0, help="engine threads; 0: PyTorch's choice")
    parser.add_argument("--quick", action="store_true", help="short contexts and few rounds: to see that it works")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, help="only these")
    options = parser.parse_args()
    settings = Settings.quick() if options.quick else Settings()
    model = ensure_model(options.cache)
    with tempfile.TemporaryDirectory(prefix="sostenuto-bench-") as name:
        directory = Path(name)
        sections: dict[str, Callable[[], Mapping[str, object]]] = {
            "engine": lambda: asyncio.run(EngineBench(model, directory, options.threads, settings).run()),
            "ratios": lambda: asyncio.run(RatioBench(model, directory, options.threads, settings).run()),
            "sse": SseBench(SseSettings(rounds=settings.rounds)).run,
            "turns": TurnBench(directory, settings.rounds).run,
            "start": StartBench(directory, settings.rounds).run,
            "peers": lambda: {
                "peers": compare(model, PeerSettings(rounds=settings.rounds, num_threads=options.threads))
            },
        }
        results: dict[str, object] = {}
        seconds: dict[str, float] = {}
        for section in options.sections or sections:
            run = sections[section]
            started_at = time.perf_counter()
            results |= run()
            seconds[section] = round(time.perf_counter() - started_at, 1)
    results["bench_seconds"] = seconds | {"total": round(sum(seconds.values()), 1)}
    print_table(results)
    print(json.dumps(results))


def print_table(results: dict[str, object]) -> None:
    """Print every figure on a line of its own."""
    for name, value in results.items():
        rows = value if isinstance(value, dict) else {"": value}
        for key, figure in rows.items():
            print(f"{name:32} {key:>10} {json.dumps(figure)}")


if __name__ == "__main__":
    sys.exit(main())

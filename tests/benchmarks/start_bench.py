"""How long the default model's server takes from the start of its process to its first streamed token.

On a machine that has started it before: files are in memory, the operators are compiled. Part of `make bench`; alone:
`python -m tests.benchmarks.start_bench`.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path

import httpx
from tqdm import tqdm

from server.settings import DEFAULT_MODEL
from tests.server_process import ServerProcess

MOST_SECONDS = 90.0
REQUEST = {"prompt": "Once upon a time", "max_tokens": 2, "temperature": 0, "stream": True}


class StartBench:
    """Starts one server after the other, each on data of its own."""

    def __init__(self, directory: Path, rounds: int) -> None:
        self._directory = directory
        self._rounds = rounds

    def run(self) -> dict[str, float]:
        """Return `start_to_first_token_seconds`, the median of the rounds; one more goes before them."""
        seconds = [self._start(number) for number in tqdm(range(self._rounds + 1), desc="start")]
        return {"start_to_first_token_seconds": round(statistics.median(seconds[1:]), 3)}

    def _start(self, number: int) -> float:
        server = ServerProcess(DEFAULT_MODEL, self._directory / f"start-{number}")
        started_at = time.perf_counter()
        server.launch()
        try:
            while not has_first_token(server.http):
                if time.perf_counter() - started_at > MOST_SECONDS:
                    raise RuntimeError(f"no token:\n{server.log_path.read_text()[-4000:]}")
                time.sleep(0.01)
            return time.perf_counter() - started_at
        finally:
            server.kill()
            server.http.close()


def has_first_token(http: httpx.Client) -> bool:
    """Say whether a stream begins; False as long as nobody listens, or the model is not loaded."""
    try:
        with http.stream("POST", "/v1/completions", json=REQUEST) as response:
            if response.status_code == 503:
                return False
            if response.status_code != 200:
                raise RuntimeError(response.read().decode())
            return any(line.startswith("data: {") for line in response.iter_lines())
    except httpx.ConnectError:
        return False


def main() -> None:
    """Measure in five rounds, and print one JSON line."""
    with tempfile.TemporaryDirectory(prefix="sostenuto-bench-") as directory:
        print(json.dumps(StartBench(Path(directory), rounds=5).run()))


if __name__ == "__main__":
    main()

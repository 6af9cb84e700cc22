"""`python -m tests.benchmarks.peers.compare`: ours beside other implementations, in interleaved rounds. JSON last.

The `rwkv` package and a plain PyTorch step always; with `--llama-cpp` (`make bench-peers`) llama.cpp too, built from
source for this machine once, which takes a quarter of an hour on two cores; then the whole takes a few minutes. All
read the same generated weights, and none is timed whose logits do not agree with ours, of a prompt and of sequences
that decode together. Environments are made on first use in `--environments`, outside of the repository: our package
`kernels` would shadow another of that name.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from tests.benchmarks import DEFAULT_THREADS
from tests.benchmarks.synthetic_model import ensure_model
from tests.conftest import ROOT

HERE = Path(__file__).parent
ENVIRONMENTS = Path(tempfile.gettempdir()) / "sostenuto-bench-peers"
DECODE_STEPS = {1: 16, 4: 8, 16: 4, 64: 2}  # by batch size: a second or so each for whoever is slow
PREFILL = "prefill_512"
CHECKED_TOKENS = 24
CHECKED_BATCH = 4
SETTLE_SECONDS = 0.5
# The library alone: what is built beside it takes most of the time.
LLAMA_CPP_OPTIONS = (
    "-DGGML_NATIVE=ON", "-DLLAVA_BUILD=OFF", "-DMTMD_BUILD=OFF", "-DLLAMA_CURL=OFF", "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_TOOLS=OFF", "-DLLAMA_BUILD_SERVER=OFF",
)  # fmt: skip

# Correlation with our logits. Implementations in bfloat16 differ by a few hundredths of a percent of a row's variance,
# those whose weights have 8 bits by the rounding of the weights, ours and theirs.
MIN_CORRELATION = 0.9995
MIN_CORRELATION_ROUNDED = 0.998  # the `rwkv` package, whose activations have 16 bits, too, where its weights do
MIN_CORRELATION_8_BITS = 0.995


@dataclass(frozen=True, slots=True)
class Settings:
    """How much is measured."""

    rounds: int = 3
    with_llama_cpp: bool = False
    num_threads: int = 0
    environments: Path = ENVIRONMENTS

    @property
    def threads(self) -> int:
        """How many threads everybody gets."""
        return self.num_threads or DEFAULT_THREADS


class PeerProcess:
    """One implementation in a process, asked over pipes."""

    def __init__(self, command: Sequence[str], directory: Path, environment: dict[str, str]) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed with the process
        self._process = subprocess.Popen(
            command, cwd=directory, env={**os.environ, **environment}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._errors, text=True, bufsize=1,
        )  # fmt: skip
        limits = self._read()
        self.max_batch: int = limits["max_batch"]
        self.max_prompt: int = limits["max_prompt"]

    def ask(self, what: str, token_ids: list[int], batch_size: int = 1) -> Any:
        """Return the answer to one question."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"what": what, "token_ids": token_ids, "batch_size": batch_size}) + "\n")
        return self._read()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        if not (line := self._process.stdout.readline()):
            self._errors.seek(0)
            raise RuntimeError(f"a peer ended:\n{self._errors.read()[-4000:]}")
        return json.loads(line)

    def close(self) -> None:
        """End it."""
        self._process.communicate()
        self._errors.close()


def borrow_torch(python: Path) -> None:
    """Let an environment see this one's packages behind its own: PyTorch is large."""
    site = next((python.parents[1] / "lib").glob("python*/site-packages"))
    (site / "borrowed.pth").write_text(str(Path(torch.__file__).parents[1]) + "\n")


def ensure_environment(directory: Path, install: Callable[[Path], None]) -> Path:
    """Return the Python of an environment, made on first use."""
    python = directory / "bin" / "python"
    if not (directory / "complete").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", directory], check=True)
        install(python)
        (directory / "complete").touch()
    return python


def pip_install(python: Path, *arguments: str, **environment: str) -> None:
    """Install packages into an environment."""
    command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
    subprocess.run(command, check=True, env={**os.environ, **environment})


def install_rwkv(python: Path) -> None:
    """The `rwkv` package beside this environment's PyTorch."""
    pip_install(python, "--no-deps", "rwkv")
    borrow_torch(python)


def install_llama_cpp(python: Path) -> None:
    """llama.cpp, compiled for this machine, and what writes its files."""
    pip_install(
        python, "--no-binary", "llama-cpp-python", "llama-cpp-python", "gguf",
        CMAKE_ARGS=" ".join(LLAMA_CPP_OPTIONS), CMAKE_BUILD_PARALLEL_LEVEL=str(os.cpu_count() or 1),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Entry:
    """One implementation among those compared."""

    peer: PeerProcess
    ours: str = "ours"  # which of ours it is compared with
    min_correlation: float = MIN_CORRELATION  # how well its logits agree with those of our model in 16 bits
    decodes_one: bool = False  # measured and checked so only: that is what 8 bits are for

    @property
    def checked(self) -> dict[str, int]:
        """The logits that are compared with ours, and of how many sequences at once."""
        # llama.cpp 0.3.36 with tile registers crashes on several tokens at once in 8 bits.
        if self.decodes_one:
            return {"decode_logits": 1}
        return dict.fromkeys(("prompt_logits", "decode_logits"), min(CHECKED_BATCH, self.peer.max_batch))

    @property
    def batch_sizes(self) -> list[int]:
        """What it is measured with."""
        return [1] if self.decodes_one else [size for size in DECODE_STEPS if size <= self.peer.max_batch]


def start_peers(model: Path, settings: Settings) -> dict[str, Entry]:
    """Start ours and all peers."""
    arguments = [str(model.resolve()), str(settings.threads)]
    directory = settings.environments
    directory.mkdir(parents=True, exist_ok=True)

    def ours(*dtype: str) -> PeerProcess:
        command = [sys.executable, "-m", "tests.benchmarks.peers.ours", *arguments, *dtype]
        return PeerProcess(command, ROOT, {"PYTHONPATH": str(ROOT)})

    def other(python: Path, script: str, *options: str) -> PeerProcess:
        return PeerProcess([str(python), str(HERE / script), *arguments, *options], directory, {"PYTHONPATH": ""})

    entries = {"ours": Entry(ours())}
    rwkv = other(ensure_environment(directory / "rwkv", install_rwkv), "rwkv_package.py")
    entries["rwkv"] = Entry(rwkv, min_correlation=MIN_CORRELATION_ROUNDED)
    entries["torch"] = Entry(other(Path(sys.executable), "plain_torch.py"))
    if settings.with_llama_cpp:
        python = ensure_environment(directory / "llama.cpp", install_llama_cpp)
        entries["llama.cpp"] = Entry(other(python, "llama_cpp_peer.py"))
        eight_bits = partial(Entry, ours="ours int8", min_correlation=MIN_CORRELATION_8_BITS, decodes_one=True)
        entries["ours int8"] = eight_bits(ours("int8"))
        entries["llama.cpp Q8_0"] = eight_bits(other(python, "llama_cpp_peer.py", "Q8_0"))
    return entries


def compare(model: Path, settings: Settings) -> dict[str, object]:
    """Return `peers`: tokens a second by implementation and batch size, and ours over theirs."""
    entries = start_peers(model, settings)
    try:
        numbers = random.Random(0)
        prompt = [numbers.randrange(1, 65_529) for _ in range(512)]
        agreements = check(entries, prompt[:CHECKED_TOKENS])
        rounds = [measure(entries, prompt, numbers) for _ in tqdm(range(settings.rounds), desc="peers")]
    finally:
        for entry in entries.values():
            entry.peer.close()
    return {name: summary(name, entry, rounds) | agreements[name] for name, entry in entries.items()}


def check(entries: dict[str, Entry], token_ids: list[int]) -> dict[str, dict[str, float]]:
    """Return the least correlation of everybody's logits with ours; raises `RuntimeError` where that is too little."""
    ours = entries["ours"].peer
    found = {}
    for name, entry in entries.items():
        correlation = min(
            statistics.correlation(ours.ask(what, token_ids), entry.peer.ask(what, token_ids, batch_size))
            for what, batch_size in entry.checked.items()
        )
        if not correlation >= entry.min_correlation:
            raise RuntimeError(f"{name} computes something else: its logits correlate with ours by {correlation:.5f}")
        found[name] = {"logits_correlation": round(correlation, 6)}
    return found


def measure(entries: dict[str, Entry], prompt: list[int], order: random.Random) -> dict[str, dict[str, float]]:
    """Return tokens a second by implementation and what was done, everybody in turn, in an order of the round's own."""
    rates: dict[str, dict[str, float]] = {name: {} for name in entries}
    names = order.sample(list(entries), len(entries))
    for batch_size, steps in DECODE_STEPS.items():
        for name in names:
            if batch_size in entries[name].batch_sizes:
                seconds = ask_alone(entries[name].peer, "decode", prompt[:steps], batch_size)
                rates[name][f"decode_{batch_size}"] = steps * batch_size / seconds
    for name in names:
        if not entries[name].decodes_one:
            count = min(len(prompt), entries[name].peer.max_prompt)
            rates[name][PREFILL] = count / ask_alone(entries[name].peer, "prefill", prompt[:count])
    return rates


def ask_alone(peer: PeerProcess, what: str, token_ids: list[int], batch_size: int = 1) -> float:
    """Return the seconds that something takes when the threads of whoever came before have gone to sleep."""
    time.sleep(SETTLE_SECONDS)
    return float(peer.ask(what, token_ids, batch_size))


def summary(name: str, entry: Entry, rounds: list[dict[str, dict[str, float]]]) -> dict[str, object]:
    """Return the medians of one implementation's rates, and of the rounds' ratios of ours to it."""

    def median(values: Iterator[float]) -> float:
        return statistics.median(values)

    return {
        "tokens_per_second": {what: round(median(r[name][what] for r in rounds), 1) for what in rounds[0][name]},
        "ours_over_it": {
            what: round(median(r[entry.ours][what] / r[name][what] for r in rounds), 2) for what in rounds[0][name]
        },
    }


def main() -> None:
    """Measure and print; the last line is JSON."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.peers.compare", description=__doc__)
    parser.add_argument("--cache", type=Path, default=Path("build/bench"), help="where generated weights are kept")
    parser.add_argument("--environments", type=Path, default=ENVIRONMENTS, help="where peers' environments are kept")
    parser.add_argument("--llama-cpp", action="store_true", help="build and measure llama.cpp as well")
    parser.add_argument("--rounds", type=int, default=Settings().rounds)
    parser.add_argument("--threads", type=int, default=0, help="0: PyTorch's choice")
    options = parser.parse_args()
    settings = Settings(
        rounds=options.rounds, with_llama_cpp=options.llama_cpp, num_threads=options.threads,
        environments=options.environments,
    )  # fmt: skip
    print(json.dumps({"peers": compare(ensure_model(options.cache), settings)}))


if __name__ == "__main__":
    main()

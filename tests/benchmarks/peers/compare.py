"""`python -m tests.benchmarks.peers.compare`: ours beside other implementations, in interleaved rounds. JSON last.

The `rwkv` package and a plain PyTorch step always; with `--llama-cpp` (`make bench-peers`) llama.cpp too, built from
source for this machine, which takes a while. All read the same generated weights, and none is timed whose logits do
not agree with ours. Environments are made on first use in `--environments`, outside of the repository: our package
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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from tests.benchmarks.synthetic_model import ensure_model
from tests.conftest import ROOT

HERE = Path(__file__).parent
ENVIRONMENTS = Path(tempfile.gettempdir()) / "sostenuto-bench-peers"
BATCH_SIZES = (1, 4, 16, 64)
PREFILL_TOKENS = 512
# The library alone: what is built beside it takes most of the time.
LLAMA_CPP_OPTIONS = (
    "-DGGML_NATIVE=ON", "-DLLAVA_BUILD=OFF", "-DMTMD_BUILD=OFF", "-DLLAMA_CURL=OFF", "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_TOOLS=OFF", "-DLLAMA_BUILD_SERVER=OFF",
)  # fmt: skip
# Ours differ from float64 by less; implementations in bfloat16 differ from each other by more than that.
MIN_CORRELATION = 0.99


def default_threads() -> int:
    """Return how many threads PyTorch would take."""
    return torch.get_num_threads()


@dataclass(frozen=True, slots=True)
class Settings:
    """How much is measured."""

    rounds: int = 3
    decode_tokens: int = 16
    with_llama_cpp: bool = False
    num_threads: int = 0
    environments: Path = ENVIRONMENTS

    @property
    def threads(self) -> int:
        """How many threads everybody gets."""
        return self.num_threads or default_threads()


class PeerProcess:
    """One implementation in a process, asked over pipes."""

    def __init__(self, command: Sequence[str], directory: Path, environment: dict[str, str]) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed with the process
        self._process = subprocess.Popen(
            command, cwd=directory, env={**os.environ, **environment}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._errors, text=True, bufsize=1,
        )  # fmt: skip
        self.max_batch: int = self._read()["max_batch"]

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


def start_peers(model: Path, settings: Settings) -> dict[str, PeerProcess]:
    """Start ours and all peers."""
    arguments = [str(model.resolve()), str(settings.threads)]
    ours = [sys.executable, "-m", "tests.benchmarks.peers.ours", *arguments]
    peers = {"ours": PeerProcess(ours, ROOT, {"PYTHONPATH": str(ROOT)})}
    pythons = {"torch": (Path(sys.executable), "plain_torch.py")}
    directory = settings.environments
    pythons["rwkv"] = (ensure_environment(directory / "rwkv", install_rwkv), "rwkv_package.py")
    if settings.with_llama_cpp:
        pythons["llama.cpp"] = (ensure_environment(directory / "llama.cpp", install_llama_cpp), "llama_cpp_peer.py")
    for name, (python, script) in pythons.items():
        peers[name] = PeerProcess([str(python), str(HERE / script), *arguments], directory, {"PYTHONPATH": ""})
    return peers


def agreement(first: list[float], second: list[float]) -> float:
    """Return the correlation of two rows of logits."""
    return statistics.correlation(first, second)


def compare(model: Path, settings: Settings) -> dict[str, object]:
    """Return `peers`: tokens a second by implementation and batch size, and ours over theirs."""
    peers = start_peers(model, settings)
    try:
        return measure(peers, settings)
    finally:
        for peer in peers.values():
            peer.close()


def measure(peers: dict[str, PeerProcess], settings: Settings) -> dict[str, object]:
    """Check every peer's logits, then measure all in interleaved rounds."""
    numbers = random.Random(0)
    prompt = [numbers.randrange(1, 65_529) for _ in range(PREFILL_TOKENS)]
    logits = {name: peer.ask("logits", prompt[:32]) for name, peer in peers.items()}
    agreements = {name: agreement(logits["ours"], row) for name, row in logits.items()}
    for name, value in agreements.items():
        if not value >= MIN_CORRELATION:
            raise RuntimeError(f"{name} computes something else: its logits correlate with ours by {value:.4f}")
    rates: dict[str, dict[str, list[float]]] = {name: {} for name in peers}
    for _ in tqdm(range(settings.rounds), desc="peers"):
        for batch_size in BATCH_SIZES:
            for name, peer in peers.items():
                if batch_size <= peer.max_batch:
                    seconds = peer.ask("decode", prompt[: settings.decode_tokens], batch_size)
                    rate = settings.decode_tokens * batch_size / seconds
                    rates[name].setdefault(f"decode_{batch_size}", []).append(rate)
        for name, peer in peers.items():
            rates[name].setdefault(f"prefill_{PREFILL_TOKENS}", []).append(PREFILL_TOKENS / peer.ask("prefill", prompt))
    medians = {
        name: {what: statistics.median(values) for what, values in found.items()} for name, found in rates.items()
    }
    ours = medians["ours"]
    return {
        name: {
            "tokens_per_second": {what: round(rate, 1) for what, rate in found.items()},
            "ours_over_it": {what: round(ours[what] / rate, 2) for what, rate in found.items()},
            "logits_correlation": round(agreements[name], 5),
        }
        for name, found in medians.items()
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

"""What float16 states cost in predictions, and how that grows with what was read.

`python -m tests.benchmarks.state_bench --text FILE`: one long text, read with float32 states, with float16 ones rounded
after every token (operators on the CPU, and steps on CUDA) and with float32 ones rounded to float16 every 32 tokens
(prompts on CUDA). The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import kernels
from engine import tokenizer
from engine.models.load import load_model
from engine.models.rwkv7 import RWKV7
from engine.runner.input_batch import InputBatch
from engine.state.pool import StatePool
from server.settings import DEFAULT_MODEL

PIECE = 32  # tokens that are read at once
BORDERS = (512, 2048, 8192, 32_768)  # of what is told together, in tokens read


@dataclass(slots=True)
class Loss:
    """Sums over tokens, in nats."""

    num_tokens: int = 0
    cross_entropy: float = 0.0
    divergence: float = 0.0  # of the distributions from those with float32 states
    num_others: int = 0  # another token is the most likely one

    def add(self, logprobs: torch.Tensor, exact: torch.Tensor, targets: torch.Tensor) -> None:
        """Count the predictions of `targets[T]`, both `[T, V]`."""
        self.num_tokens += len(targets)
        self.cross_entropy -= float(logprobs.gather(1, targets[:, None]).sum())
        self.divergence += float((exact.exp() * (exact - logprobs)).sum())
        self.num_others += int((logprobs.argmax(1) != exact.argmax(1)).sum())

    def means(self) -> dict[str, float]:
        """Return what a token costs, and what changes in a thousand of them."""
        return {
            "cross_entropy": round(self.cross_entropy / self.num_tokens, 4),
            "divergence": float(f"{self.divergence / self.num_tokens:.2g}"),
            "others_per_1000": round(1e3 * self.num_others / self.num_tokens, 1),
        }


def main() -> None:
    """Read, print."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.state_bench", description=__doc__)
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL)
    parser.add_argument("--text", type=Path, required=True)
    options = parser.parse_args()
    device = torch.device("cpu")
    kernels.select_backend(device)
    model = load_model(options.model, device, "float32")
    ids = tokenizer.load("auto", str(options.model), model.config.vocab_size).encode(options.text.read_text())
    with torch.inference_mode():
        print(json.dumps(measure(model, ids[: BORDERS[-1] + 1])))


def measure(model: RWKV7, ids: list[int]) -> dict[str, object]:
    """Return losses by the tokens read before, and the largest numbers that were seen in a state."""
    exact = StatePool(model.config.state_spec, 2, model.device)
    halves = StatePool(model.config.state_spec_in(torch.float16), 2, model.device)
    rounded = StatePool(model.config.state_spec, 2, model.device)
    pools = {"float32": exact, "float16": halves, "float16_every_32": rounded}
    losses: dict[int, dict[str, Loss]] = {border: defaultdict(Loss) for border in BORDERS}
    largest = dict.fromkeys(pools, 0.0)
    for begin in tqdm(range(0, len(ids) - 1, PIECE)):
        targets = torch.tensor(ids[begin + 1 : begin + PIECE + 1])
        logprobs = {name: _read(model, pool, ids[begin : begin + len(targets)]) for name, pool in pools.items()}
        rounded.wkv.copy_(rounded.wkv.half())
        of_here = losses[next(border for border in BORDERS if begin < border)]
        for name, found in logprobs.items():
            of_here[name].add(found, logprobs["float32"], targets)
            largest[name] = max(largest[name], float(pools[name].wkv[0].abs().max()))
    by_length = {
        f"up to {border}": {name: loss.means() for name, loss in of_these.items()}
        for border, of_these in losses.items()
        if of_these
    }
    return {"num_tokens": len(ids) - 1, **by_length, "largest": {name: round(x) for name, x in largest.items()}}


def _read(model: RWKV7, pool: StatePool, ids: list[int]) -> torch.Tensor:
    """Return the log-probabilities `[T, V]` after each token."""
    starts = torch.tensor([0, len(ids)])
    batch = InputBatch(torch.tensor(ids), torch.tensor([0]), starts, torch.arange(len(ids)))
    return model.logits(model.forward(batch, pool)).log_softmax(-1)


if __name__ == "__main__":
    main()

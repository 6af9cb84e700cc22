"""`python -m tests.benchmarks.chunked_bench`: WKV-7 in chunks beside its scan, forward and backward. Last line is JSON.

Rounds are interleaved. Wall time is the fastest round's: company on the cores can only add to it, and adds more to what
needs both at once. CPU time is the median's.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import normalize

from kernels.chunked import wkv7_chunked

B, T, H, N = 8, 256, 4, 64  # a micro-batch of the default model
LOG_DECAY_FLOOR = -math.exp(-0.5)


@dataclass
class Times:
    """What the rounds of one way took, in seconds."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


def main() -> None:
    """Measure both ways and print them."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.chunked_bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    inputs = make_inputs()
    ways: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {"scan": scan, "chunked": wkv7_chunked}
    outputs = {name: way(*inputs)[0].detach() for name, way in ways.items()}
    difference = (outputs["scan"] - outputs["chunked"]).abs().max() / outputs["scan"].abs().max()
    times = {name: Times() for name in ways}
    for _ in range(options.rounds):
        for name, way in ways.items():
            run_once(way, inputs, times[name])
    fastest = {name: min(found.wall) for name, found in times.items()}
    cpu = {name: statistics.median(found.cpu) for name, found in times.items()}
    results = {
        "shape": {"B": B, "T": T, "H": H, "N": N},
        "threads": options.threads,
        "relative_difference": float(difference),
        "fastest_wall_seconds": fastest,
        "median_cpu_seconds": cpu,
        "speedup": {
            "fastest_wall": round(fastest["scan"] / fastest["chunked"], 1),
            "median_cpu": round(cpu["scan"] / cpu["chunked"], 1),
        },
    }
    print(json.dumps(results))


def make_inputs() -> list[Tensor]:
    """Return r, w, k, v, a, b [B, T, H, N] as a layer feeds them, and the state before, all wanting gradients."""
    generator = torch.Generator().manual_seed(0)
    r, w, k, v, removal, rate = torch.randn(6, B, T, H, N, generator=generator).unbind()
    removal = normalize(removal, dim=3)
    tensors = [
        r,
        LOG_DECAY_FLOOR * w.sigmoid(),
        0.1 * k,
        v,
        -removal,
        removal * rate.sigmoid(),
        torch.zeros(B, H, N, N),
    ]
    return [tensor.contiguous().requires_grad_() for tensor in tensors]


def scan(r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence token by token, with gradients."""
    outputs = []
    for r_t, w_t, k_t, v_t, a_t, b_t in zip(*(x.unbind(1) for x in (r, w.exp(), k, v, a, b)), strict=True):
        removed = state @ a_t.unsqueeze(3)
        state = state * w_t.unsqueeze(2) + removed * b_t.unsqueeze(2) + v_t.unsqueeze(3) * k_t.unsqueeze(2)
        outputs.append((state @ r_t.unsqueeze(3)).squeeze(3))
    return torch.stack(outputs, dim=1), state


def run_once(way: Callable[..., tuple[Tensor, Tensor]], inputs: list[Tensor], times: Times) -> None:
    """Run forward and backward, and note how long they took."""
    began, began_cpu = time.perf_counter(), time.process_time()
    outputs, state = way(*inputs)
    torch.autograd.backward([outputs.sum(), state.sum()])
    times.wall.append(time.perf_counter() - began)
    times.cpu.append(time.process_time() - began_cpu)
    for tensor in inputs:
        tensor.grad = None


if __name__ == "__main__":
    main()

"""Steps of prompts and decodes together, recorded at a size, against the same steps run as they are: bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import kernels
from engine.messages import SamplingParams
from engine.models.load import load_model
from engine.models.rwkv7 import RWKV7
from engine.runner import cuda_graphs
from engine.runner.cuda_graphs import CudaGraphs, DecodeGraphs, DecodeRow, triton_step
from engine.runner.input_batch import InputBatch
from engine.runner.plan import Chunk
from engine.runner.sampler import sample
from engine.state.pool import StatePool
from engine.weights.synthetic import SyntheticShape, save_synthetic
from tests.engine.runner.host_graphs import RunAgain
from tests.kernels.triton.conftest import HAS_CARD

pytest.importorskip("triton", reason="Triton is not installed: pip install sostenuto[cuda]")

V = 70
# Every product is the kernels' own: of ranks that are no multiples of 16, PyTorch's rounding depends on the rows.
RANKS = {"decay_rank": 16, "rate_rank": 16, "value_rank": 16, "gate_rank": 16}
NUM_LAYERS, MOST_TOKENS = (3, 512) if HAS_CARD else (1, 48)
WIDTHS = {"bfloat16": 256 if HAS_CARD else 32, "int8": 256 if HAS_CARD else 64}
NUM_SLOTS = 12


def load(dtype: str, directory: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> RWKV7:
    """Return a small model as a card loads it."""
    monkeypatch.setattr(kernels, "is_fast_in_bfloat16", lambda _: True)
    shape = SyntheticShape(num_layers=NUM_LAYERS, width=WIDTHS[dtype], head_size=16, vocab_size=V, **RANKS)
    path = save_synthetic(directory / "m.safetensors", shape, seed=3, dtype=torch.bfloat16)
    model = load_model(path, device, dtype)
    assert model.is_int8 == (dtype == "int8")
    return model


def chunks_of(lengths: dict[int, int], seed: int) -> list[Chunk]:
    """Return chunks of so many tokens for each slot, each with sampling of its own."""
    random = torch.Generator().manual_seed(seed)
    return [
        Chunk(
            slot,
            torch.randint(V, (length,), generator=random).tolist(),
            sampling=SamplingParams(seed=slot, temperature=(0.0, 1.0)[slot % 2], top_p=0.9),
            position=length,
        )
        for slot, length in lengths.items()
    ]


def rows_of(chunks: Sequence[Chunk]) -> list[DecodeRow]:
    """Return the chunks as rows of a graph."""
    return [
        DecodeRow(c.slot, c.sampling or SamplingParams(seed=0), c.position, c.token_ids[-1], c.token_ids[:-1])
        for c in chunks
    ]


def run(model: RWKV7, pool: StatePool, chunks: Sequence[Chunk]) -> list[int]:
    """Run a step as it is, without padding."""
    batch = InputBatch.from_chunks(chunks, model.device)
    logits = model.logits(model.forward(batch, pool))
    return sample(logits, [chunk.sampling or SamplingParams(seed=0) for chunk in chunks], [c.position for c in chunks])


@pytest.mark.usefixtures("ordered_products")
@pytest.mark.parametrize(
    ("operators", "dtype", "num_padding"),
    [("on_triton", "bfloat16", 9), ("on_triton", "bfloat16", 0), ("fused_on_triton", "int8", 9)],
)
@torch.inference_mode()
def test_a_mixed_step_equals_one_that_is_not_recorded(
    operators: str,
    dtype: str,
    num_padding: int,
    tmp_path: Path,
    device: torch.device,
    random: torch.Generator,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sampled ids and all states, untouched ones too; then a step that follows it, whose rows it gives their tokens."""
    request.getfixturevalue(operators)
    model = load(dtype, tmp_path, device, monkeypatch)
    monkeypatch.setattr(cuda_graphs, "MIXED_TOKENS", (MOST_TOKENS,))
    monkeypatch.setattr(cuda_graphs, "TOKENS_A_PROMPT", 16)  # exactly as many rows of several tokens as there are
    first = chunks_of({3: MOST_TOKENS - 23 - num_padding, 0: 1, 7: 20, 5: 1, 2: 1}, seed=1)
    new = chunks_of({9: 18, 10: 1}, seed=2)
    graphs_pool, plain_pool = (StatePool(model.config.state_spec, NUM_SLOTS, device) for _ in range(2))
    for pool in (graphs_pool, plain_pool):
        pool.wkv.copy_(0.1 * torch.randn(pool.wkv.shape, generator=random.manual_seed(1)))
        pool.shift.copy_(torch.randn(pool.shift.shape, generator=random))

    recorder = CudaGraphs() if device.type == "cuda" else RunAgain()
    step = triton_step(model, graphs_pool, torch.zeros(0, dtype=torch.int64, device=device))
    graphs = DecodeGraphs(step, 6, device, recorder, MOST_TOKENS)
    launches = [graphs.launch(rows_of(first)), graphs.follow([4, 0, 1], rows_of(new))]

    ids = run(model, plain_pool, first)
    going = [Chunk(first[row].slot, [ids[row]], first[row].sampling, first[row].position + 1) for row in (4, 0, 1)]
    assert [launch.token_ids() for launch in launches] == [ids, run(model, plain_pool, [*going, *new])]
    assert torch.equal(graphs_pool.wkv, plain_pool.wkv)
    assert torch.equal(graphs_pool.shift, plain_pool.shift)

"""Whole models whose pool keeps float16 states, as `--state-dtype float16` runs them on a card."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from engine.messages import StateSource
from engine.models.load import load_model
from engine.models.rwkv7 import RWKV7
from engine.runner.input_batch import InputBatch
from engine.state.checkpoint import decode_state, encode_state
from engine.state.pool import StatePool
from engine.weights.open import open_weights
from engine.weights.synthetic import SyntheticShape, save_synthetic
from tests.parity.float64_model import reference_run

wkv7 = pytest.importorskip("kernels.triton.wkv7", reason="Triton is not installed: pip install sostenuto[cuda]")

V, L = 50, wkv7.CHUNK_LEN
RANKS = {"decay_rank": 16, "rate_rank": 16, "value_rank": 16, "gate_rank": 16}
PROMPT = torch.randint(V, (L + 2,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A small model of one layer and two heads."""
    shape = SyntheticShape(num_layers=1, width=32, head_size=16, vocab_size=V, **RANKS)
    return save_synthetic(tmp_path / "m.safetensors", shape, seed=3, dtype=torch.float32)


@pytest.fixture
def model(path: Path, device: torch.device, fused_on_triton: None) -> RWKV7:
    """That model, fused, as a card runs it."""
    return load_model(path, device, "float32")


def new_pool(model: RWKV7, num_slots: int) -> StatePool:
    """Return a pool whose every slot holds rubbish, but the first two."""
    pool = StatePool(model.config.state_spec_in(torch.float16), num_slots, model.device)
    pool.wkv[2:] = 7.0
    pool.shift[2:] = -3.0
    return pool


def consume(model: RWKV7, pool: StatePool, slots: Sequence[int], chunks: Sequence[Sequence[int]]) -> torch.Tensor:
    """Return the logits after each slot's chunk of tokens."""
    starts = [0, *torch.tensor([len(chunk) for chunk in chunks]).cumsum(0).tolist()]
    ids = [token_id for chunk in chunks for token_id in chunk]
    last = [end - 1 for end in starts[1:]]
    batch = InputBatch(*(torch.tensor(x, device=model.device) for x in (ids, slots, starts, last)))
    return model.logits(model.forward(batch, pool))


def test_a_model_is_near_the_formulas(model: RWKV7, path: Path) -> None:
    """In float64: what is left is a rounding of 2^-11 a chunk and a token, not a mistake in strides or slots."""
    pool = new_pool(model, 4)
    logits = [consume(model, pool, [1], [PROMPT[:L]]), consume(model, pool, [1], [PROMPT[L : L + 1]])]
    expected, state = reference_run(open_weights(path), PROMPT[: L + 1])
    for found, row in zip(logits, (expected[L - 1], expected[L]), strict=True):
        torch.testing.assert_close(found[0].double().cpu(), row, rtol=5e-3, atol=5e-3)
    torch.testing.assert_close(pool.wkv[1].double().cpu(), state["wkv"], rtol=5e-3, atol=5e-3)
    torch.testing.assert_close(pool.shift[1].double().cpu(), state["shift"], rtol=5e-3, atol=5e-3)
    assert not pool.wkv[0].any()
    assert pool.wkv[2:].eq(7.0).all()


@pytest.mark.usefixtures("ordered_products")
def test_a_prompt_cut_where_a_chunk_ends_is_the_whole_prompt(model: RWKV7) -> None:
    """Bit for bit, last logits and state: the state was rounded there anyway."""
    whole, cut = new_pool(model, 1), new_pool(model, 1)
    expected = consume(model, whole, [0], [PROMPT])
    consume(model, cut, [0], [PROMPT[:L]])
    assert torch.equal(consume(model, cut, [0], [PROMPT[L:]]), expected)
    assert torch.equal(cut.wkv, whole.wkv)
    assert torch.equal(cut.shift, whole.shift)


@pytest.mark.usefixtures("ordered_products")
def test_a_row_is_the_same_alone_in_a_batch_and_beside_a_prompt(model: RWKV7) -> None:
    """Bit for bit, logits and states, of a decode and of a prompt."""
    chunks = {3: PROMPT[:1], 0: PROMPT[:5], 5: PROMPT[7:8]}
    together, alone = new_pool(model, 6), new_pool(model, 6)
    logits = consume(model, together, list(chunks), list(chunks.values()))
    for row, (slot, chunk) in zip(logits, chunks.items(), strict=True):
        assert torch.equal(row, consume(model, alone, [slot], [chunk])[0]), slot
    assert torch.equal(together.wkv, alone.wkv)
    assert torch.equal(together.shift, alone.shift)


def test_saved_and_restored_equals_uninterrupted(model: RWKV7) -> None:
    """Through the bytes of a checkpoint into another slot of another pool, then a prompt and a decode: bit for bit."""
    one, other = new_pool(model, 3), new_pool(model, 5)
    consume(model, one, [1], [PROMPT[:9]])
    blob = encode_state(one.save(1, 9, b"c" * 16), one.spec)
    other.load(4, decode_state(blob, other.spec, StateSource(num_tokens=9, chain=b"c" * 16)))
    for chunk in (PROMPT[9:20], PROMPT[20:21]):
        assert torch.equal(consume(model, one, [1], [chunk]), consume(model, other, [4], [chunk]))
    assert torch.equal(one.wkv[1], other.wkv[4])
    assert torch.equal(one.shift[1], other.shift[4])

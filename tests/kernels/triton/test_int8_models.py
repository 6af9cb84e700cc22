"""Whole models with int8 weights, as `--dtype int8` loads them on a card."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import kernels
from engine.models.load import load_model
from engine.models.rwkv7 import RWKV7
from engine.runner.input_batch import InputBatch
from engine.state.pool import StatePool
from engine.weights.open import open_weights
from engine.weights.synthetic import SyntheticShape, save_synthetic
from tests.parity.float64_model import reference_run

int8 = pytest.importorskip("kernels.triton.int8", reason="Triton is not installed: pip install sostenuto[cuda]")

V = 50
RANKS = {"decay_rank": 16, "rate_rank": 16, "value_rank": 16, "gate_rank": 32}
SHAPE = SyntheticShape(num_layers=2, width=64, head_size=16, vocab_size=V, **RANKS)
INT8 = ("att.receptance", "att.key", "att.value", "att.output", "ffn.key", "ffn.value", "head")
PROMPT = torch.randint(V, (21,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model file in bfloat16, and a device that is fast with it."""
    monkeypatch.setattr(kernels, "is_fast_in_bfloat16", lambda _: True)
    return save_synthetic(tmp_path / "m.safetensors", SHAPE, seed=3, dtype=torch.bfloat16)


def logits_of(
    model: RWKV7, pool: StatePool, ids: Sequence[int], slots: Sequence[int], starts: Sequence[int]
) -> torch.Tensor:
    """Return the logits after every token."""
    batch = InputBatch(*(torch.tensor(x, device=model.device) for x in (ids, slots, starts, range(len(ids)))))
    return model.logits(model.forward(batch, pool)).cpu()


def prompt_and_decode(model: RWKV7) -> tuple[torch.Tensor, StatePool]:
    """Return the logits of a prompt, then of a decode beside a padding row, in slot 2 of a pool."""
    pool = StatePool(model.config.state_spec, 4, model.device)
    logits = logits_of(model, pool, PROMPT[:20], [2], [0, 20])
    return torch.cat([logits, logits_of(model, pool, [PROMPT[20], 0], [2, -1], [0, 1, 2])[:1]]), pool


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return how far they are apart, relative to how large they are."""
    found, expected = found.cpu().double(), expected.cpu().double()
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("operators", ["on_triton", "fused_on_triton"])
def test_a_model_equals_the_formulas(
    path: Path, device: torch.device, request: pytest.FixtureRequest, operators: str
) -> None:
    """Of the quantised weights, in float64: what is left is activations in bfloat16, less than quantising moves."""
    request.getfixturevalue(operators)
    exact = open_weights(path)
    unquantised, _ = reference_run(exact, PROMPT)
    for name in exact:
        if name.removesuffix(".weight").endswith(INT8):
            values, scales = int8.quantise(exact[name])
            exact[name] = values.double() * scales.double()[:, None]
    expected, state = reference_run(exact, PROMPT)
    model = load_model(path, device, "int8")
    assert model.is_int8
    logits, pool = prompt_and_decode(model)
    assert distance(logits, expected) <= min(2e-2, distance(logits, unquantised))
    assert distance(pool.wkv[2], state["wkv"]) <= 2e-2
    assert distance(pool.shift[2], state["shift"]) <= 2e-2
    assert not pool.wkv[[0, 1, 3]].any()


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.usefixtures("fused_on_triton", "ordered_products")
def test_a_row_is_the_same_in_every_batch(
    path: Path, device: torch.device, random: torch.Generator, dtype: str
) -> None:
    """Bitwise, logits and states, in steps whose tiles differ."""
    model = load_model(path, device, dtype)
    pool = StatePool(model.config.state_spec, 66, device)
    before = 0.1 * torch.randn(pool.wkv.shape, generator=random).to(device)

    def step(num_rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        pool.wkv.copy_(before)
        pool.shift.zero_()
        rows = range(num_rows)
        logits = logits_of(model, pool, [row % V for row in rows], rows, range(num_rows + 1))
        return logits, pool.wkv.clone(), pool.shift.clone()

    most = step(66)
    for num_rows in (1, 18):
        for found, expected in zip(step(num_rows), most, strict=True):
            assert torch.equal(found[:num_rows], expected[:num_rows]), num_rows


@pytest.mark.usefixtures("fused_on_triton")
def test_prompts_and_steps_read_the_same_weights(path: Path, device: torch.device) -> None:
    """Token by token, a prompt leads to the same logits and states but for the rounding of a chunk's products."""
    model = load_model(path, device, "int8")
    at_once, alone = (StatePool(model.config.state_spec, 1, device) for _ in range(2))
    expected = logits_of(model, at_once, PROMPT[:8], [0], [0, 8])
    logits = torch.cat([logits_of(model, alone, [token_id], [0], [0, 1]) for token_id in PROMPT[:8]])
    assert distance(logits, expected) <= 2e-2
    assert distance(alone.wkv[0], at_once.wkv[0]) <= 2e-2

"""The engine's numbers against published logits and the float64 reference."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from engine.models.load import load_model
from engine.models.rwkv7 import RWKV7
from engine.runner.input_batch import InputBatch
from engine.runner.plan import Chunk
from engine.state.pool import StatePool
from engine.weights.open import open_weights
from tests.parity.float64_model import reference_logits, reference_run
from tests.parity.slots import prompt

pytestmark = pytest.mark.usefixtures("poisoned_memory", "implementation")

QUOTE_IN = [34, 105, 110]  # the prompt of the published logits


def logits_after(model: RWKV7, token_ids: list[int]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the logits after every token, and the state afterwards."""
    pool = StatePool(model.config.state_spec, 3, model.device)
    targets = Chunk(1, token_ids, target_ids=[0] * len(token_ids), num_prompt_logprobs=0)
    with torch.inference_mode():
        hidden = model.forward(InputBatch.from_chunks([targets], model.device), pool)
        return model.logits(hidden[1:]), pool.save(1, len(token_ids), b"").tensors


def test_the_reference_gives_the_published_logits(shared_dir: Path) -> None:
    """The float64 formulas agree with rwkv.cpp's float32 logits to within that program's own rounding."""
    expected = np.load(shared_dir / "models/tiny-rwkv-7v0.expected-logits.npy").reshape(-1)
    logits = reference_logits(shared_dir / "models/tiny-rwkv-7v0.pth", QUOTE_IN)
    assert np.abs(logits[-1] - expected).max() <= 1e-6


def test_the_engine_gives_the_published_logits(shared_dir: Path) -> None:
    """In float32, which `auto` chooses for a model this small, logits are within 2e-6 of the published ones."""
    expected = torch.from_numpy(np.load(shared_dir / "models/tiny-rwkv-7v0.expected-logits.npy")).reshape(-1)
    model = load_model(shared_dir / "models/tiny-rwkv-7v0.pth", torch.device("cpu"))
    logits, _ = logits_after(model, QUOTE_IN)
    assert model.dtype == torch.float32
    assert (logits[-1] - expected).abs().max() <= 2e-6


def test_a_multi_head_model_agrees_with_float64(synthetic_file: Path) -> None:
    """Logits at every position and the whole state agree, with several heads and every path carrying weight."""
    token_ids = prompt(80, seed=1)
    expected, expected_state = reference_run(open_weights(synthetic_file), token_ids)
    model = load_model(synthetic_file, torch.device("cpu"), "float32")
    logits, state = logits_after(model, token_ids)
    assert (logits - expected).abs().max() <= 2e-5 * expected.abs().max()
    for name, tensor in expected_state.items():
        assert (state[name] - tensor).abs().max() <= 2e-5 * tensor.abs().max()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_card_agrees_with_float64(synthetic_file: Path) -> None:
    """On CUDA too, prompts and the state come out as the reference says."""
    token_ids = prompt(80, seed=1)
    expected, expected_state = reference_run(open_weights(synthetic_file), token_ids)
    logits, state = logits_after(load_model(synthetic_file, torch.device("cuda"), "float32"), token_ids)
    assert (logits.cpu() - expected).abs().max() <= 2e-5 * expected.abs().max()
    for name, tensor in expected_state.items():
        assert (state[name] - tensor).abs().max() <= 2e-5 * tensor.abs().max()


def test_the_head_norm_eps_of_the_caller_is_used(synthetic_file: Path) -> None:
    """An epsilon other than the official one gives the reference's logits for that epsilon, and others than without."""
    token_ids = prompt(12, seed=2)
    model = load_model(synthetic_file, torch.device("cpu"), "float32", head_norm_eps=0.05)
    logits, _ = logits_after(model, token_ids)
    expected = reference_logits(synthetic_file, token_ids, head_norm_eps=0.05)
    assert np.abs(logits.numpy() - expected).max() <= 2e-5 * np.abs(expected).max()
    assert np.abs(logits.numpy() - reference_logits(synthetic_file, token_ids)).max() > 1e-2


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8"])
def test_fewer_bits_stay_close_to_float64(synthetic_file: Path, dtype: str) -> None:
    """With 16- or 8-bit weights the distribution moves a little, as 7 to 11 bits of mantissa make it."""
    token_ids = prompt(60, seed=3)
    expected = torch.from_numpy(reference_logits(synthetic_file, token_ids))
    logits, _ = logits_after(load_model(synthetic_file, torch.device("cpu"), dtype), token_ids)
    difference = (logits.double().log_softmax(-1).exp() - expected.log_softmax(-1).exp()).abs().sum(-1) / 2
    assert difference.mean() <= 0.05

"""Random models for tests and benchmarks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.models.load import load_model, model_config
from engine.runner.input_batch import InputBatch
from engine.runner.plan import Chunk
from engine.state.pool import StatePool
from engine.weights.open import open_weights
from engine.weights.synthetic import RWKV7_0_1B, SyntheticShape, save_synthetic, synthetic_weights
from engine.weights.tables import check_weights


def test_equal_seeds_give_equal_weights() -> None:
    """The weights depend on shape and seed, and on nothing else."""
    one, same, other = synthetic_weights(seed=1), synthetic_weights(seed=1), synthetic_weights(seed=2)
    assert all(torch.equal(tensor, same[name]) for name, tensor in one.items())
    assert not torch.equal(one["head.weight"], other["head.weight"])


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_saved_model_is_a_sound_rwkv7(tmp_path: Path, suffix: str) -> None:
    """What is written passes the checks of a real file, in bfloat16 too."""
    path = save_synthetic(tmp_path / f"m{suffix}", seed=3, dtype=torch.bfloat16)
    assert check_weights(str(path), open_weights(path)).dimensions["H"] == 4


def test_the_0_1b_shape_has_the_published_number_of_parameters() -> None:
    """Twelve layers and the vocabulary of 65536 count 191 million parameters, as the published 0.1B models do."""
    small = synthetic_weights(replace(RWKV7_0_1B, num_layers=2, vocab_size=1))
    sizes = {name: tensor.numel() for name, tensor in small.items()}
    layer = sum(size for name, size in sizes.items() if name.startswith("blocks.1."))
    total = sum(sizes.values()) + (RWKV7_0_1B.num_layers - 2) * layer + 2 * (RWKV7_0_1B.vocab_size - 1) * 768
    assert total == 191_034_624


def test_activations_stay_sane_over_a_thousand_tokens(tmp_path: Path) -> None:
    """Logits have a spread like a real model's, and the state does not run away."""
    path = save_synthetic(tmp_path / "m.pth", seed=4, dtype=torch.float32)
    model = load_model(path, torch.device("cpu"), "float32")
    pool = StatePool(model.config.state_spec, 2, model.device)
    token_ids = torch.randint(256, (1000,), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.inference_mode():
        hidden = model.forward(InputBatch.from_chunks([Chunk(0, token_ids)], model.device), pool)
        logits = model.logits(hidden)
    assert 0.5 < logits.std() < 5
    assert pool.wkv[0].abs().max() < 1000


def test_the_config_says_what_was_asked_for() -> None:
    """Shape in, shape out."""
    shape = SyntheticShape(num_layers=2, width=32, head_size=8, vocab_size=77, ffn_width=100)
    config = model_config(check_weights("m", synthetic_weights(shape)))
    assert (config.num_layers, config.width, config.head_size, config.num_heads) == (2, 32, 8, 4)
    assert (config.vocab_size, config.ffn_width) == (77, 100)
    assert config.head_norm_eps == pytest.approx(8e-5)

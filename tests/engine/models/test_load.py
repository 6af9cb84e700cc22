"""From a file to a model on a device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import kernels
from engine.errors import ModelFileError
from engine.models import load
from engine.models.load import choose_dtype, load_model
from engine.weights.synthetic import SyntheticShape, save_synthetic, save_weights, synthetic_weights

CPU = torch.device("cpu")
LARGE = load.SMALL_MODEL_PARAMETERS
SHAPE = SyntheticShape(num_layers=2, width=32, head_size=8, vocab_size=50)


@pytest.mark.parametrize(
    ("stored", "num_parameters", "is_fast", "chosen"),
    [
        (torch.bfloat16, LARGE, True, torch.bfloat16),
        (torch.float16, LARGE, True, torch.bfloat16),
        (torch.bfloat16, LARGE, False, torch.float32),
        (torch.float32, LARGE, True, torch.float32),
        (torch.bfloat16, LARGE - 1, True, torch.float32),
    ],
)
def test_auto_chooses_bfloat16_for_large_16_bit_models_where_it_is_fast(
    monkeypatch: pytest.MonkeyPatch,
    stored: torch.dtype,
    num_parameters: int,
    is_fast: bool,
    chosen: torch.dtype,
) -> None:
    """Everything else runs in float32."""
    monkeypatch.setattr(kernels, "is_fast_in_bfloat16", lambda device: is_fast)
    assert choose_dtype("auto", stored, num_parameters, CPU) == chosen


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_a_named_dtype_is_taken(name: str) -> None:
    """What the operator says goes before what `auto` would choose."""
    assert choose_dtype(name, torch.float32, 1, CPU) == getattr(torch, name)


def test_the_same_model_has_one_fingerprint_in_every_format(tmp_path: Path) -> None:
    """A conversation can move between servers that loaded the same weights from different files."""
    weights = synthetic_weights(SHAPE)
    for suffix in (".pth", ".safetensors"):
        save_weights(tmp_path / f"m{suffix}", dict(weights))
    weights["blocks.0.att.v0"] = torch.ones(1, 1, 32)  # unused, as in official files
    weights |= {"blocks.0.att.v1": torch.ones(32, 8), "blocks.0.att.v2": torch.ones(8, 32)}
    save_weights(tmp_path / "official.pth", weights)
    names = ("m.pth", "m.safetensors", "official.pth")
    assert len({load_model(tmp_path / name, CPU).config.fingerprint for name in names}) == 1


def test_the_model_does_not_change_with_its_file(tmp_path: Path) -> None:
    """Weights are copied out of the mapped file: writing over it does not reach a running model."""
    path = save_synthetic(tmp_path / "m.pth", SHAPE, dtype=torch.float32)
    model = load_model(path, CPU, "float32")
    before = model.embedding.clone()
    path.write_bytes(bytes(path.stat().st_size))
    assert torch.equal(model.embedding, before)


def test_a_broken_file_is_refused(tmp_path: Path) -> None:
    """Loading raises what checking found."""
    weights = synthetic_weights(SHAPE)
    del weights["head.weight"]
    save_weights(tmp_path / "m.pth", weights)
    with pytest.raises(ModelFileError, match=r"head\.weight: missing"):
        load_model(tmp_path / "m.pth", CPU)

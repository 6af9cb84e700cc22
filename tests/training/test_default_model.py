"""The model that is shipped does what it is shipped for."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.tokenizer.loading import load as load_tokenizer
from training.config import TrainConfig
from training.evaluate import recall
from training.export import load_model

DIRECTORY = Path(__file__).resolve().parents[2] / "models/default"


@pytest.mark.parametrize(("distance", "bar"), [(3, 0.8), (8, 0.6)])
def test_facts_it_was_not_trained_on_are_recalled(distance: int, bar: float) -> None:
    """Told a name, a color and a pet, it says what was asked for, turns later, at temperature 0."""
    model = load_model(DIRECTORY)
    tokenizer = load_tokenizer("auto", DIRECTORY, model.shape.vocab_size)
    share, answers = recall(model, tokenizer, distance, 30)
    assert share >= bar, answers


def test_the_recipe_beside_it_is_its_recipe() -> None:
    """The configuration makes a model of its shape, and the file is small enough for a repository."""
    config = TrainConfig.load(DIRECTORY / "train.toml")
    assert config.model.shape == load_model(DIRECTORY).shape
    assert (DIRECTORY / "model.safetensors").stat().st_size <= 16_000_000

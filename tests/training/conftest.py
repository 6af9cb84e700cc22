"""A tiny run: two made sources, a vocabulary of 300, one narrow layer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch

from training.__main__ import tokenize
from training.config import DataSection, ModelSection, OptimizerSection, RunSection, SourceSection, TrainConfig

TINY = TrainConfig(
    model=ModelSection(vocab_size=300, width=32, num_layers=2, head_size=16),
    data=DataSection(
        sources=[
            SourceSection(name="short", made="short", num_documents=40, weight=[1.0, 0.5]),
            SourceSection(name="medium", made="medium", num_documents=20, weight=[0.0, 0.5], user_loss=0.25),
        ],
        row_tokens=64,
        rows_per_step=4,
        curriculum_steps=10,
        held_out=0.1,
    ),
    optimizer=OptimizerSection(peak_lr=3e-3, warmup_steps=3),
    run=RunSection(
        num_steps=20, seed=3, eval_every=1000, checkpoint_every=1000, log_every=1, eval_rows=2, num_probes=0
    ),
)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's directory with vocabulary and tokens, and nothing trained."""
    directory = tmp_path_factory.mktemp("prepared")
    tokenize(TINY, directory, Path())
    return directory


@pytest.fixture
def config() -> TrainConfig:
    """The tiny run."""
    return msgspec.structs.replace(TINY)

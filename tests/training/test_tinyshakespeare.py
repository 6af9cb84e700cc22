"""The tutorial's first steps, against the curve that docs/training.md shows."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from training.__main__ import tokenize
from training.config import TrainConfig
from training.train import train

CONFIG = Path(__file__).resolve().parents[2] / "training/examples/tinyshakespeare.toml"
CURVE = {10: 3.604, 20: 2.649, 30: 2.418}  # nats a byte


@pytest.mark.slow
def test_first_steps(shared_dir: Path, tmp_path: Path) -> None:
    """Thirty steps give the published losses within 0.03 nats: recipe, data order and mathematics are the same."""
    config = TrainConfig.load(CONFIG)
    constant = msgspec.structs.replace(config.optimizer, schedule="constant")  # as the first steps of the tutorial's
    config = msgspec.structs.replace(config, optimizer=constant).with_run(num_steps=30)
    tokenize(config, tmp_path, shared_dir / "data")
    train(config, tmp_path, shared_dir / "data")
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = {record["step"]: record["loss"] for record in records if "loss" in record}
    assert losses == pytest.approx(CURVE, abs=0.03)

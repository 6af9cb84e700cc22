"""The tutorial's first steps, against the curve that docs/training.md shows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from training.__main__ import tokenize
from training.config import TrainConfig
from training.train import train

CONFIG = Path(__file__).resolve().parents[2] / "training/examples/tinyshakespeare.toml"
CURVE = {  # nats a byte
    10: 3.604,
    20: 2.649,
    30: 2.418,
    40: 2.319,
    50: 2.251,
    60: 2.227,
    70: 2.140,
    80: 2.095,
    90: 2.118,
    100: 2.057,
}


@pytest.mark.slow
@pytest.mark.timeout(900)  # half a minute of one core, however long it takes to get it
def test_first_steps(shared_dir: Path, tmp_path: Path) -> None:
    """A hundred steps give the published losses within 0.03 nats: recipe, data order and mathematics are the same."""
    config = TrainConfig.load(CONFIG).with_run(num_steps=100, eval_rows=1)
    tokenize(config, tmp_path, shared_dir / "data")
    train(config, tmp_path, shared_dir / "data")
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = {record["step"]: record["loss"] for record in records if "loss" in record}
    assert losses == pytest.approx(CURVE, abs=0.03)

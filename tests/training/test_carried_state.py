"""Truncated backpropagation through time: rows that go on where the rows before ended."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from training.checkpoint import checkpoints
from training.config import DataSection, SourceSection, TrainConfig
from training.data import Lanes, TokenTable
from training.model import Rwkv7, TrainingState
from training.optimizer import make_optimizer
from training.step import LanguageModelLoss, take_step
from training.train import prepare_data, train


@pytest.fixture
def carrying(config: TrainConfig) -> TrainConfig:
    """The tiny run with the state carried from row to row."""
    data = msgspec.structs.replace(config.data, carry_state=True, row_tokens=32)
    optimizer = msgspec.structs.replace(config.optimizer, schedule="constant")
    return msgspec.structs.replace(config, data=data, optimizer=optimizer)


def test_lanes_read_every_document_in_one_piece() -> None:
    """Put together again, a lane's rows are the documents in a shuffled order, each behind an end of text."""
    table = TokenTable(np.arange(1, 241, dtype=np.uint16), np.full(240, 100, np.uint8), np.arange(0, 241, 6))
    data = DataSection(sources=[SourceSection(name="a")], row_tokens=10, rows_per_step=2)
    lanes = Lanes([(table, range(40))], data, seed=1)
    batches = [lanes.batch(step) for step in range(lanes.num_steps)]
    for lane in (0, 1):
        inputs = torch.cat([batch.inputs[lane] for batch in batches])
        targets = torch.cat([batch.targets[lane] for batch in batches])
        resets = torch.cat([batch.resets[lane] for batch in batches])
        assert torch.equal(inputs[1:], targets[:-1])
        assert resets[0]
        assert torch.equal(resets[1:], inputs[1:] == 0)
        begins = (inputs == 0).nonzero().ravel().tolist()
        assert all(begin % 7 == begins[0] % 7 for begin in begins)
    assert torch.equal(lanes.batch(lanes.num_steps).inputs, batches[0].inputs)


def test_too_little_text_for_the_lanes_is_refused() -> None:
    """The error gives the sizes."""
    table = TokenTable(np.arange(1, 13, dtype=np.uint16), np.full(12, 100, np.uint8), np.array([0, 12]))
    data = DataSection(sources=[SourceSection(name="a")], row_tokens=10, rows_per_step=2)
    with pytest.raises(ValueError, match="13 tokens are too few for 2 lanes of 10"):
        Lanes([(table, [0])], data, seed=1)


def test_carried_rows_compute_what_one_long_row_computes(carrying: TrainConfig, prepared: Path) -> None:
    """The losses of two successive steps with the state carried are those of both rows read as one."""
    lanes = prepare_data(carrying, prepared, Path()).training
    torch.manual_seed(0)
    model = Rwkv7(carrying.model.shape).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    one, two = lanes.batch(0), lanes.batch(1)
    with torch.no_grad():
        first, state = model(one.inputs, None, one.resets)
        second, _ = model(two.inputs, state, two.resets)
        whole, _ = model(torch.cat((one.inputs, two.inputs), 1), None, torch.cat((one.resets, two.resets), 1))
    torch.testing.assert_close(torch.cat((first, second), 1), whole, atol=2e-5, rtol=1e-4)


def test_micro_batches_carry_their_own_rows_state(carrying: TrainConfig, prepared: Path) -> None:
    """Cut into micro-batches, a step has the states of the uncut step, and no gradient comes out of them."""
    lanes = prepare_data(carrying, prepared, Path()).training
    found: list[tuple[float, TrainingState]] = []
    for accumulate in (1, 2):
        torch.manual_seed(0)
        model = Rwkv7(carrying.model.shape)
        optimizer, scaler = make_optimizer(model, carrying.optimizer), torch.amp.GradScaler("cpu", enabled=False)
        torch.manual_seed(1)
        carried = TrainingState(torch.randn(2, 4, 2, 16, 16), torch.randn(2, 2, 4, 32))
        objective, cut = LanguageModelLoss(model, 0.0), carrying.with_run(accumulate=accumulate)
        result = take_step(objective, optimizer, scaler, lanes.batch(1), cut, carried=carried)
        assert not result.state.wkv.requires_grad
        found.append((result.loss, result.state))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    torch.testing.assert_close(found[0][1].wkv, found[1][1].wkv, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found[0][1].shift, found[1][1].shift, atol=1e-5, rtol=1e-4)


def test_resuming_carries_on_bit_exactly(carrying: TrainConfig, prepared: Path, tmp_path: Path) -> None:
    """Eight steps leave the same weights as four, an end, and four more: the carried states are in the checkpoint."""
    whole, parts = (Path(shutil.copytree(prepared, tmp_path / name)) for name in ("whole", "parts"))
    train(carrying.with_run(num_steps=8), whole, Path())
    train(carrying.with_run(num_steps=4), parts, Path())
    train(carrying.with_run(num_steps=8), parts, Path())
    one, two = (load_file(checkpoints(directory)[-1] / "model.safetensors") for directory in (whole, parts))
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())

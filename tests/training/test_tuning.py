from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file

from training.adapters import adapt, load_trained_weights, trained_weights
from training.checkpoint import checkpoints, save_weights
from training.config import TrainConfig, TuneSection
from training.export import export, load_model
from training.model import Rwkv7
from training.train import make_model, prepare_data, train

STEPS = 6


@pytest.fixture
def run_dir(prepared: Path, tmp_path: Path) -> Path:
    """A fresh run on the prepared tokens."""
    return Path(shutil.copytree(prepared, tmp_path / "run"))


@pytest.fixture
def base(config: TrainConfig, tmp_path: Path) -> Path:
    """A model whose states matter to its answers."""
    torch.manual_seed(0)
    model = Rwkv7(config.model.shape)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    (tmp_path / "base").mkdir()
    save_weights(model.state_dict(), tmp_path / "base" / "model.safetensors")
    return tmp_path / "base"


def test_a_tuned_state_is_learnt_and_nothing_else(config: TrainConfig, run_dir: Path, base: Path) -> None:
    """State tuning lowers the loss, leaves a [H, N, N] state a layer, and the model as it was."""
    tuned = _tuned(config, TuneSection(method="state", base=str(base)), peak_lr=1.0)
    train(tuned, run_dir, Path())
    path = export(run_dir, run_dir / "out")
    states = load_file(path)
    assert states.keys() == {f"blocks.{layer}.att.time_state" for layer in range(2)}
    assert all(state.shape == (2, 16, 16) and state.abs().max() > 0 for state in states.values())
    model = make_model(tuned)
    batch = prepare_data(tuned, run_dir, Path()).training.batch(0)
    before = _loss(model, batch.inputs, batch.targets, batch.weights)
    load_trained_weights(model, states)
    after = _loss(model, batch.inputs, batch.targets, batch.weights)
    assert after < before - 0.1
    frozen = load_model(base).state_dict()
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in model.state_dict().items() if name in frozen)


def test_state_tuning_gives_every_document_the_tuned_state(config: TrainConfig, prepared: Path) -> None:
    """Each row is one document from its beginning, and nothing resets the state it begins with."""
    tuned = _tuned(config, TuneSection(method="state"))
    batch = prepare_data(tuned, prepared, Path()).training.batch(0)
    assert not batch.resets.any()
    assert (batch.inputs[:, 0] == 0).all()
    assert (batch.inputs[:, 1] == batch.inputs[0, 1]).all()  # "User"


def test_lora_starts_as_the_base_and_merges_into_it(config: TrainConfig, run_dir: Path, base: Path) -> None:
    """Low-rank additions change nothing at first; merged, they compute what they computed beside the matrices."""
    tuned = _tuned(config, TuneSection(method="lora", base=str(base), rank=4), peak_lr=1e-2)
    ids = torch.randint(0, 300, (1, 20))
    torch.testing.assert_close(make_model(tuned).eval()(ids)[0], load_model(base)(ids)[0])
    train(tuned, run_dir, Path())
    beside = make_model(tuned).eval()
    load_trained_weights(beside, load_file(checkpoints(run_dir)[-1] / "model.safetensors"))
    assert all("lora_" in name for name in trained_weights(beside))
    export(run_dir, run_dir / "out", dtype=torch.float32)
    merged = load_model(run_dir / "out")
    assert merged.state_dict().keys() == load_model(base).state_dict().keys()
    assert not torch.allclose(merged(ids)[0], load_model(base)(ids)[0], atol=1e-3)
    torch.testing.assert_close(merged(ids)[0], beside(ids)[0], atol=1e-4, rtol=1e-4)


def test_lora_adds_to_the_targets_only(config: TrainConfig) -> None:
    """Targets name projections, of one half of a layer if they say which."""
    model = make_model(config)
    adapt(model, TuneSection(method="lora", targets=("receptance", "ffn.key")))
    names = {name.split(".parametrizations")[0] for name in trained_weights(model)}
    assert names == {f"blocks.{layer}.{target}" for layer in (0, 1) for target in ("att.receptance", "ffn.key")}


def test_weights_of_another_way_of_tuning_are_refused(config: TrainConfig) -> None:
    """The error names what does not fit."""
    model = make_model(_tuned(config, TuneSection(method="state")))
    with pytest.raises(ValueError, match=r"emb\.weight"):
        load_trained_weights(model, {"emb.weight": torch.zeros(1)})


def test_a_base_of_another_shape_is_refused(config: TrainConfig, base: Path) -> None:
    """The error says both shapes."""
    wider = msgspec.structs.replace(config.model, width=64)
    tuned = _tuned(msgspec.structs.replace(config, model=wider), TuneSection(method="lora", base=str(base)))
    with pytest.raises(ValueError, match=r"width=32.*width=64"):
        make_model(tuned)


def _tuned(config: TrainConfig, tune: TuneSection, peak_lr: float = 1e-3) -> TrainConfig:
    optimizer = msgspec.structs.replace(config.optimizer, schedule="constant", peak_lr=peak_lr, warmup_steps=0)
    return msgspec.structs.replace(config, tune=tune, optimizer=optimizer).with_run(num_steps=STEPS)


@torch.no_grad()
def _loss(model: torch.nn.Module, inputs: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> float:
    x, _ = model.eval()(inputs)
    losses = torch.nn.functional.cross_entropy(
        model.get_submodule("head")(x).transpose(1, 2), targets, reduction="none"
    )
    return float((losses * weights).sum() / weights.sum())

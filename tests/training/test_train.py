from __future__ import annotations

import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Literal

import msgspec
import pytest
import torch
from safetensors.torch import load_file

from training.checkpoint import checkpoints
from training.config import TrainConfig, TuneSection
from training.data import Batch
from training.model import Rwkv7
from training.optimizer import make_optimizer, set_learning_rate
from training.step import LanguageModelLoss, StepResult, take_step
from training.train import prepare_data, train

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run_dir(prepared: Path, tmp_path: Path) -> Path:
    """A fresh run on the prepared tokens."""
    return Path(shutil.copytree(prepared, tmp_path / "run"))


@pytest.fixture
def batch(config: TrainConfig, prepared: Path) -> Batch:
    """The rows of the first step."""
    return prepare_data(config, prepared, Path()).training.batch(0)


def test_training_learns(config: TrainConfig, run_dir: Path) -> None:
    """Twenty steps bring the loss well below a guess among all tokens."""
    train(config, run_dir, Path())
    losses = [values["loss"] for values in _log(run_dir) if "loss" in values]
    assert losses[0] == pytest.approx(5.7, abs=0.2)  # log 300
    assert min(losses) < 4.5


def test_resuming_is_bit_exact(config: TrainConfig, run_dir: Path, tmp_path: Path) -> None:
    """Twenty steps leave the same weights and moments as ten, an end, and ten more."""
    other = Path(shutil.copytree(run_dir, tmp_path / "other"))
    train(config, run_dir, Path())
    half = msgspec.structs.replace(config.optimizer, schedule="constant")
    constant = msgspec.structs.replace(config, optimizer=half)
    shutil.rmtree(checkpoints(run_dir)[-1])
    train(constant, run_dir, Path())
    train(constant.with_run(num_steps=10), other, Path())
    train(constant, other, Path())
    for name in ("model.safetensors", "trainer.safetensors"):
        one, two = (load_file(checkpoints(directory)[-1] / name) for directory in (run_dir, other))
        assert one.keys() == two.keys()
        for key, tensor in one.items():
            assert torch.equal(tensor, two[key]), f"{name}: {key}"


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulation_is_one_larger_batch(config: TrainConfig, batch: Batch, accumulate: int) -> None:
    """A step cut into micro-batches moves the parameters as the uncut step does, however unequal their tokens."""
    moved = []
    for parts in (1, accumulate):
        model, objective, optimizer = _made(config)
        cut = config.with_run(accumulate=parts)
        result = take_step(objective, optimizer, _no_scaler(), batch, cut)
        moved.append((result.loss, result.grad_norm, model.state_dict()))
    assert moved[0][0] == pytest.approx(moved[1][0], rel=1e-5)
    assert moved[0][1] == pytest.approx(moved[1][1], rel=1e-4)
    # Adam's first step divides each gradient by its own size, so compare where that is not noise.
    torch.testing.assert_close(moved[0][2]["head.weight"], moved[1][2]["head.weight"], atol=1e-4, rtol=0)


def test_a_step_that_is_not_finite_changes_nothing(config: TrainConfig, batch: Batch) -> None:
    """Neither parameters nor moments move when a gradient is not finite."""
    model, objective, optimizer = _made(config)
    take_step(objective, optimizer, _no_scaler(), batch, config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    moments = {id(p): slots["exp_avg"].clone() for p, slots in optimizer.state.items()}
    bad = Batch(batch.inputs, batch.targets, batch.weights.clone(), batch.resets)
    bad.weights[0, 5] = float("inf")
    result = take_step(objective, optimizer, _no_scaler(), bad, config)
    assert not math.isfinite(result.grad_norm)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    for p, slots in optimizer.state.items():
        assert torch.equal(slots["exp_avg"], moments[id(p)])


def test_half_precisions_train(config: TrainConfig, batch: Batch) -> None:
    """bfloat16 and float16 with a gradient scaler give about the loss and the gradient of float32."""
    results = []
    for precision in ("float32", "bfloat16", "float16"):
        _, objective, optimizer = _made(config)
        scaler = torch.amp.GradScaler("cpu", enabled=precision == "float16", init_scale=1024.0)
        result = take_step(objective, optimizer, scaler, batch, config.with_run(precision=precision))
        results.append((result.loss, result.grad_norm))
    assert results[1] == pytest.approx(results[0], rel=2e-2)
    assert results[2] == pytest.approx(results[0], rel=2e-2)


def test_logit_penalty_scales_with_the_loss(config: TrainConfig, batch: Batch) -> None:
    """L2Wrap follows the loss's factor, as under a gradient scaler: twice the loss, twice its gradient."""
    gradients = []
    for factor in (1.0, 2.0):
        model, objective, _ = _made(
            msgspec.structs.replace(config, optimizer=msgspec.structs.replace(config.optimizer, logit_penalty=1.0))
        )
        descent, _, _ = objective(batch, 100.0)
        (factor * descent).backward()
        gradients.append(model.head.weight.grad)
    assert gradients[0] is not None
    torch.testing.assert_close(gradients[1], 2 * gradients[0])


def test_logit_penalty_pulls_the_largest_logit_down() -> None:
    """The gradient it adds is `penalty x largest logit / tokens`, at that logit alone."""
    torch.manual_seed(0)
    logits = torch.randn(6, 9, requires_grad=True)
    (0.5 * 1e-4 * logits.amax(dim=-1).square().sum() / 6).backward()
    expected = torch.zeros(6, 9).scatter_(
        1, logits.argmax(1, keepdim=True), logits.amax(1, keepdim=True).detach() * 1e-4 / 6
    )
    torch.testing.assert_close(logits.grad, expected)


@pytest.mark.timeout(600)  # processes import torch, and on a busy machine wait for it
@pytest.mark.parametrize(("parallel", "accumulate"), [("ddp", 1), ("fsdp", 2)])
def test_two_processes_take_the_steps_of_one(
    config: TrainConfig, run_dir: Path, tmp_path: Path, parallel: Literal["ddp", "fsdp"], accumulate: int
) -> None:
    """Two processes as torchrun starts them, gloo on the CPU, end where one process ends, and only the first writes.

    Copies of the model or shares of it make no difference, to the loss or to what is written; what they wrote resumes
    in one process.
    """
    alone = Path(shutil.copytree(run_dir, tmp_path / "alone"))
    short = config.with_run(num_steps=3, eval_every=2, parallel=parallel, accumulate=accumulate)
    train(short, alone, Path())
    run_two(short, run_dir, tmp_path)
    one, two = _log(alone), _log(run_dir)
    assert [values["step"] for values in two] == [values["step"] for values in one]
    for name in ("loss", "grad_norm", "eval/loss"):
        expected = [values[name] for values in one if name in values]
        assert [values[name] for values in two if name in values] == pytest.approx(expected, rel=1e-4)
    for file in ("model.safetensors", "trainer.safetensors"):
        whole, others = (load_file(checkpoints(directory)[-1] / file) for directory in (alone, run_dir))
        assert {name: tensor.shape for name, tensor in others.items()} == {n: t.shape for n, t in whole.items()}
    best, other_best = (load_file(directory / "best.safetensors") for directory in (alone, run_dir))
    torch.testing.assert_close(other_best["head.weight"], best["head.weight"], atol=2e-4, rtol=0)
    longer = short.with_run(num_steps=5)
    train(longer, alone, Path())
    one_goes_on = Path(shutil.copytree(run_dir, tmp_path / "one_goes_on"))
    train(longer, one_goes_on, Path())
    run_two(longer, run_dir, tmp_path)
    for directory in (one_goes_on, run_dir):
        assert _log(directory)[-1]["eval/loss"] == pytest.approx(_log(alone)[-1]["eval/loss"], rel=1e-4)


def run_two(config: TrainConfig, run_dir: Path, tmp_path: Path) -> None:
    """Train in two processes."""
    path = tmp_path / "config.json"
    path.write_bytes(msgspec.json.encode(config))
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, msgspec; from pathlib import Path; from training.config import TrainConfig;"
        "from training.train import train;"
        "train(msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=TrainConfig), Path(sys.argv[2]), Path())"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1"}
    environment |= {"MASTER_PORT": str(_free_port()), "WORLD_SIZE": "2", "PYTHONWARNINGS": "default"}
    processes = [
        subprocess.Popen([sys.executable, script, path, run_dir], env={**environment, "RANK": str(rank)}, cwd=ROOT)
        for rank in (0, 1)
    ]
    assert [process.wait(timeout=280) for process in processes] == [0, 0]


def test_shares_of_a_tuned_part_are_refused(config: TrainConfig, run_dir: Path) -> None:
    """Sharding is for whole models; the error says what to use."""
    tuned = msgspec.structs.replace(config, tune=TuneSection(method="lora")).with_run(parallel="fsdp")
    with pytest.raises(ValueError, match=r"tune\.method must be full"):
        train(tuned, run_dir, Path())


def test_sigterm_ends_with_a_checkpoint(config: TrainConfig, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After SIGTERM the step under way is finished, and what it did is saved."""
    steps = []

    def step(*arguments: object) -> StepResult:
        steps.append(1)
        if len(steps) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return take_step(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("training.train.take_step", step)
    before = signal.getsignal(signal.SIGTERM)
    try:
        progress = train(config, run_dir, Path())
    finally:
        assert signal.getsignal(signal.SIGTERM) == before
    assert progress.step == 2
    assert checkpoints(run_dir)[-1].name == "step-00000002"


def test_time_limit(config: TrainConfig, run_dir: Path) -> None:
    """A run whose time is up takes no step and still leaves a checkpoint to go on from."""
    assert train(config, run_dir, Path(), max_minutes=0.0).step == 0
    assert train(config.with_run(num_steps=2), run_dir, Path()).step == 2


def test_optimizer_groups(config: TrainConfig) -> None:
    """Matrices named `weight` decay, the decay's bias moves twice as fast, nothing else does either."""
    model, _, optimizer = _made(config)
    set_learning_rate(optimizer, 0.5)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {
        names[id(parameter)]: (group["weight_decay"], group["lr"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert groups.keys() == dict(model.named_parameters()).keys()
    for name, settings in groups.items():
        if name.endswith("att.w0"):
            assert settings == (0.0, 1.0)
        elif name.endswith((*[f"{part}.weight" for part in ("emb", "head", "key", "value", "receptance", "output")],)):
            assert settings == (0.1, 0.5)
        else:
            assert settings == (0.0, 0.5), name


def _made(config: TrainConfig) -> tuple[Rwkv7, LanguageModelLoss, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Rwkv7(config.model.shape)
    optimizer = make_optimizer(model, config.optimizer)
    set_learning_rate(optimizer, 1e-3)
    return model, LanguageModelLoss(model, config.optimizer.logit_penalty), optimizer


def _no_scaler() -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", enabled=False)


def _log(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port

"""The training loop, from top to bottom.

A step is: the step's rows, cut among processes and micro-batches; forward and backward of each; one update. The loss
is the weighted mean over *all* tokens of the step that count, however they were cut, so accumulating and adding
processes change the speed and nothing else.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from tokenizers import Tokenizer
from torch import Tensor, distributed, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from training.checkpoint import Progress, checkpoints, load_checkpoint, save_checkpoint, save_weights
from training.config import OptimizerSection, TrainConfig
from training.data import Batch, Mixture, Rows, TokenTable, encode_documents, held_out, pack
from training.documents import read_documents
from training.evaluate import recall, score_rows
from training.logs import Sink, open_sinks
from training.model import Rwkv7
from training.optimizer import make_optimizer, set_learning_rate
from training.schedule import learning_rate
from training.tokenizer import bytes_per_token, load_tokenizer

_RECALL_DISTANCES = (1, 3, 8)


@dataclass(frozen=True, slots=True)
class Dataset:
    """Every source's rows: those to train on, and those of held-out documents."""

    training: dict[str, Rows]
    held_out: dict[str, Rows]


class LanguageModelLoss(nn.Module):
    """The share that some rows have in a step's loss."""

    def __init__(self, model: Rwkv7, logit_penalty: float) -> None:
        super().__init__()
        self.model, self.logit_penalty = model, logit_penalty

    def forward(self, inputs: Tensor, targets: Tensor, weights: Tensor, resets: Tensor, total_weight: float) -> Tensor:
        """Two numbers: what to follow downhill, and the part of the mean loss that these rows make up.

        The first has L2Wrap added: the squares of the largest logits, which keeps them from drifting. As a term of the
        loss it scales with everything else.
        """
        x, _ = self.model(inputs, None, resets)
        counts = weights > 0
        logits = self.model.logits(x[counts]).float()
        loss = (cross_entropy(logits, targets[counts], reduction="none") * weights[counts]).sum() / total_weight
        penalty = 0.5 * self.logit_penalty * logits.amax(dim=-1).square().sum() / total_weight
        return torch.stack((loss + penalty, loss.detach()))


def prepare_data(config: TrainConfig, run_dir: Path, data_dir: Path) -> Dataset:
    """Read every source, encode it once into `RUN/tokens`, and pack it."""
    codec: Tokenizer | None = None
    dataset = Dataset({}, {})
    for source in config.data.sources:
        path = run_dir / "tokens" / f"{source.name}.safetensors"
        if not path.exists():
            codec = codec or load_tokenizer(run_dir / config.data.tokenizer)
            encode_documents(read_documents(source, data_dir, config.run.seed), codec).save(path)
        table = TokenTable.load(path)
        kept_back = held_out(table.num_documents, config.data.held_out, config.run.seed)
        for rows, chosen in ((dataset.training, ~kept_back), (dataset.held_out, kept_back)):
            packed = pack(table, chosen.nonzero()[0].tolist(), config.data.row_tokens, config.run.seed)
            rows[source.name] = Rows(table, packed, config.data.row_tokens)
    return dataset


def train(
    config: TrainConfig,
    run_dir: Path,
    data_dir: Path,
    *,
    max_minutes: float | None = None,
    resume: bool = True,
) -> Progress:
    """Train until the last step, the time limit or SIGTERM; each ends with a checkpoint. Returns what was done.

    Continues from the newest checkpoint in `run_dir` if there is one. Under `torchrun`, every process calls this.
    """
    started = time.monotonic()
    run, settings = config.run, config.optimizer
    rank, num_processes = _join_processes(run.device)
    device = torch.device(run.device)
    if run.num_threads:
        torch.set_num_threads(run.num_threads)
    torch.manual_seed(run.seed)

    dataset = prepare_data(config, run_dir, data_dir)
    mixture = Mixture(dataset.training, config.data, run.num_steps, run.seed)
    codec = load_tokenizer(run_dir / config.data.tokenizer)
    token_bytes = torch.tensor(bytes_per_token(codec), dtype=torch.float32)

    model = Rwkv7(config.model.shape, recompute=run.recompute).to(device)
    optimizer = make_optimizer(model, settings)
    scaler = torch.amp.GradScaler(device.type, enabled=run.precision == "float16")
    progress = Progress()
    if resume and (saved := checkpoints(run_dir)):
        progress = load_checkpoint(saved[-1], model, optimizer, scaler)
    if run.compile:
        model.compile_blocks()
    objective: nn.Module = LanguageModelLoss(model, settings.logit_penalty)
    if num_processes > 1:
        objective = DistributedDataParallel(objective)
    sinks = open_sinks(run_dir, wandb=run.wandb) if rank == 0 else []
    stop = _StopFlag(started, max_minutes)

    def save() -> None:
        if rank == 0:
            save_checkpoint(
                run_dir, model, optimizer, scaler, progress, msgspec.to_builtins(config), run.keep_checkpoints
            )

    bar = tqdm(total=run.num_steps, initial=progress.step, disable=rank != 0, mininterval=5.0)
    last = time.monotonic()
    while progress.step < run.num_steps and not stop.wanted(num_processes):
        batch = mixture.batch(progress.step)
        set_learning_rate(optimizer, learning_rate(progress.step, run.num_steps, settings))
        loss, norm = take_step(objective, optimizer, scaler, batch, config, rank, num_processes)
        progress.step += 1
        progress.num_tokens += batch.inputs.numel()
        if not norm.isfinite():
            progress.num_skipped += 1
        bar.update()
        now = time.monotonic()
        progress.seconds += now - last
        if progress.step % run.log_every == 0 and rank == 0:
            values = {
                "loss": float(loss),
                "grad_norm": float(norm),
                "lr": optimizer.param_groups[0]["lr"],
                "tokens": progress.num_tokens,
                "skipped": progress.num_skipped,
                "tokens_per_second": batch.inputs.numel() / (now - last),
                "seconds": progress.seconds,
            }
            bar.set_postfix_str(f"loss {values['loss']:.3f} {values['tokens_per_second']:.0f} tok/s", refresh=False)
            _write(sinks, progress.step, values)
        last = now
        if rank == 0 and (progress.step % run.eval_every == 0 or progress.step == run.num_steps):
            values = evaluate(model, codec, dataset.held_out, token_bytes, run.eval_rows, run.num_probes)
            _write(sinks, progress.step, values)
            tqdm.write(f"{progress.step:6d} " + " ".join(f"{name} {value:.3f}" for name, value in values.items()))
            if progress.best_loss is None or values["eval/loss"] < progress.best_loss:
                progress.best_loss = values["eval/loss"]
                save_weights(model.state_dict(), run_dir / "best.safetensors")
            last = time.monotonic()
        if progress.step % run.checkpoint_every == 0:
            save()
    save()
    stop.restore()
    bar.close()
    for sink in sinks:
        sink.close()
    return progress


def take_step(
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    batch: Batch,
    config: TrainConfig,
    rank: int = 0,
    num_processes: int = 1,
) -> tuple[Tensor, Tensor]:
    """One update. Returns this process's part of the mean loss and the norm of the gradient before clipping.

    A gradient that is not finite changes nothing: neither parameters nor moments.
    """
    device = torch.device(config.run.device)
    total_weight = max(float(batch.weights.sum()), 1.0)
    micro_batches = list(_cut(batch, rank, num_processes, config.run.accumulate))
    optimizer.zero_grad(set_to_none=True)
    loss = torch.zeros((), device=device)
    for index, rows in enumerate(micro_batches):
        rows = rows.to(device)
        with contextlib.ExitStack() as stack:
            if index + 1 < len(micro_batches) and isinstance(objective, DistributedDataParallel):
                stack.enter_context(objective.no_sync())
            with _autocast(config):
                descent, part = objective(rows.inputs, rows.targets, rows.weights, rows.resets, total_weight)
            # Processes' gradients are averaged, but their shares of the loss are to be added.
            scaler.scale(descent * num_processes).backward()
        loss += part.detach()
    scaler.unscale_(optimizer)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, config.optimizer.max_grad_norm)
    if scaler.is_enabled():
        scaler.step(optimizer)  # skips by itself
        scaler.update()
    elif norm.isfinite():
        optimizer.step()
    return loss, norm


def evaluate(
    model: Rwkv7, codec: Tokenizer, held_out: dict[str, Rows], token_bytes: Tensor, max_rows: int, num_probes: int
) -> dict[str, float]:
    """Loss and bits per byte of every source and of all, and recall by `num_probes` probes a distance."""
    values: dict[str, float] = {}
    nats = weight = num_bytes = 0.0
    for name, rows in held_out.items():
        score = score_rows(model, rows, max_rows, token_bytes)
        values[f"eval/{name}/loss"], values[f"eval/{name}/bits_per_byte"] = score.loss, score.bits_per_byte
        nats, weight, num_bytes = nats + score.nats, weight + score.weight, num_bytes + score.num_bytes
    values["eval/loss"] = nats / max(weight, 1.0)
    for distance in _RECALL_DISTANCES if num_probes else ():
        values[f"recall/{distance}"], _ = recall(model, codec, distance, num_probes)
    return values


def _cut(batch: Batch, rank: int, num_processes: int, accumulate: int) -> Iterator[Batch]:
    """The micro-batches of one process."""
    rows = batch.inputs.shape[0]
    if rows % (num_processes * accumulate):
        raise ValueError(
            f"{rows} rows a step cannot be cut into {num_processes} processes x {accumulate} accumulations"
        )
    size = rows // (num_processes * accumulate)
    for index in range(rank * accumulate, (rank + 1) * accumulate):
        yield batch.slice(slice(index * size, (index + 1) * size))


def _autocast(config: TrainConfig) -> torch.autocast:
    precision = config.run.precision
    dtype = torch.float16 if precision == "float16" else torch.bfloat16
    return torch.autocast(torch.device(config.run.device).type, dtype=dtype, enabled=precision != "float32")


def _join_processes(device: str) -> tuple[int, int]:
    """Rank of this process and the number of processes, 0 and 1 without `torchrun`."""
    if "RANK" not in os.environ:
        return 0, 1
    if not distributed.is_initialized():
        distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return distributed.get_rank(), distributed.get_world_size()


class _StopFlag:
    """Says when to stop early: SIGTERM or the time limit, decided by all processes together."""

    def __init__(self, started: float, max_minutes: float | None) -> None:
        self._deadline = started + 60 * max_minutes if max_minutes is not None else float("inf")
        self._signalled = False
        self._previous = signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, _signal: int, _frame: object) -> None:
        self._signalled = True

    def restore(self) -> None:
        """Give SIGTERM back to whoever had it."""
        signal.signal(signal.SIGTERM, self._previous)

    def wanted(self, num_processes: int) -> bool:
        """Say whether any process wants to stop."""
        mine = self._signalled or time.monotonic() >= self._deadline
        if num_processes == 1:
            return mine
        flag = torch.tensor(float(mine))
        distributed.all_reduce(flag, distributed.ReduceOp.MAX)
        return bool(flag)


def _write(sinks: list[Sink], step: int, values: dict[str, float]) -> None:
    for sink in sinks:
        sink.write(step, values)


__all__ = ["Dataset", "LanguageModelLoss", "OptimizerSection", "evaluate", "prepare_data", "take_step", "train"]

"""The training loop, from top to bottom: prepare, and then step after step, now and then a look and a checkpoint."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from engine.tokenizer.loading import load as load_tokenizer
from engine.tokenizer.tokenizer import Tokenizer
from training.adapters import adapt, trained_weights
from training.binidx import read_binidx
from training.checkpoint import Progress, checkpoints, load_checkpoint, save_checkpoint, save_weights
from training.config import TrainConfig
from training.data import Lanes, Mixture, Rows, TokenTable, encode_documents, held_out, one_per_row, pack
from training.documents import read_documents
from training.evaluate import recall, score_rows
from training.export import load_model
from training.logs import Sink, open_sinks
from training.model import Rwkv7, TrainingState
from training.optimizer import make_optimizer, set_learning_rate
from training.processes import Processes, StopFlag
from training.schedule import learning_rate
from training.sharding import shard, unsharded, whole_state
from training.step import LanguageModelLoss, take_step

_RECALL_DISTANCES = (1, 3, 8)


@dataclass(frozen=True, slots=True)
class Dataset:
    """What to train on, and the rows of held-out documents by source."""

    training: Mixture | Lanes
    held_out: dict[str, Rows]
    sizes: dict[str, int]  # tokens to train on, by source


def prepare_data(config: TrainConfig, run_dir: Path, data_dir: Path) -> Dataset:
    """Read every source, encode it once into `RUN/tokens`, keep some documents back, and arrange the rest."""
    data, seed = config.data, config.run.seed
    training: dict[str, Rows] = {}
    evaluation: dict[str, Rows] = {}
    streams = []
    for name, table in _token_tables(config, run_dir, data_dir).items():
        kept_back = held_out(table.num_documents, data.held_out, seed)
        chosen = (~kept_back).nonzero()[0].tolist()
        streams.append((table, chosen))
        for rows, documents in ((training, chosen), (evaluation, kept_back.nonzero()[0].tolist())):
            alone = config.tune.method == "state"
            packed = (
                one_per_row(table, documents, data.row_tokens)
                if alone
                else pack(table, documents, data.row_tokens, seed)
            )
            rows[name] = Rows(table, packed, data.row_tokens, resets=not alone)
    batches = Lanes(streams, data, seed) if data.carry_state else Mixture(training, data, config.run.num_steps, seed)
    return Dataset(batches, evaluation, {name: rows.num_tokens for name, rows in training.items()})


def open_tokenizer(config: TrainConfig, run_dir: Path) -> Tokenizer:
    """Return the run's tokenizer: one of those that the server knows."""
    return load_tokenizer(config.data.tokenizer, run_dir, config.model.vocab_size)


def _token_tables(config: TrainConfig, run_dir: Path, data_dir: Path) -> dict[str, TokenTable]:
    tables = {}
    for source in config.data.sources:
        path = run_dir / "tokens" / f"{source.name}.safetensors"
        if source.path.endswith(".bin"):
            tables[source.name] = read_binidx(data_dir / source.path)
            continue
        if not path.exists():
            tokenizer = open_tokenizer(config, run_dir)
            encode_documents(read_documents(source, data_dir, config.run.seed), tokenizer).save(path)
        tables[source.name] = TokenTable.load(path)
    return tables


def train(config: TrainConfig, run_dir: Path, data_dir: Path, *, max_minutes: float | None = None) -> Progress:
    """Train until the last step, the time limit or SIGTERM; each ends with a checkpoint. Returns what was done.

    Goes on from the newest checkpoint in `run_dir` if there is one. Under `torchrun`, every process calls this.
    """
    started = time.monotonic()
    run, settings = config.run, config.optimizer
    processes = Processes.join(run.device)
    if config.data.carry_state and processes.count > 1:
        raise ValueError("data.carry_state needs a single process: a checkpoint holds the states of one")
    if run.parallel == "fsdp" and config.tune.method != "full":
        raise ValueError("run.parallel = fsdp shares out whole models: tune.method must be full; use ddp")
    if run.num_threads:
        torch.set_num_threads(run.num_threads)
    torch.manual_seed(run.seed)

    dataset = prepare_data(config, run_dir, data_dir)
    tokenizer = open_tokenizer(config, run_dir)
    token_bytes = torch.tensor([len(tokenizer.token_bytes(token)) for token in range(tokenizer.vocab_size)])

    model = make_model(config).to(torch.device(run.device)).train()
    optimizer = make_optimizer(model, settings)
    scaler = torch.amp.GradScaler(torch.device(run.device).type, enabled=run.precision == "float16")
    progress = Progress()
    carried: TrainingState | None = None
    if saved := checkpoints(run_dir):
        progress, carried = load_checkpoint(saved[-1], model, optimizer, scaler)
    if run.compile:
        model.compile_blocks()
    objective: nn.Module = LanguageModelLoss(model, settings.logit_penalty)
    if processes.count > 1 and run.parallel == "fsdp":
        shard(objective, model.blocks, optimizer, run.device)
    elif processes.count > 1:
        objective = DistributedDataParallel(objective)
    sinks = open_sinks(run_dir, wandb=run.wandb) if processes.is_first else []

    def save() -> None:
        state = whole_state(optimizer)
        with unsharded(objective):
            if processes.is_first:
                weights = trained_weights(model)
                save_checkpoint(run_dir, weights, state, scaler, progress, carried, config, run.keep_checkpoints)

    def look() -> None:
        with unsharded(objective):
            if not processes.is_first:
                return
            values = evaluate(model, tokenizer, dataset.held_out, token_bytes, run.eval_rows, run.num_probes)
            _write(sinks, progress, values)
            bar.write(f"{progress.step:6d} " + " ".join(f"{name} {value:.3f}" for name, value in values.items()))
            if progress.best_loss is None or values["eval/loss"] < progress.best_loss:
                progress.best_loss = values["eval/loss"]
                save_weights(trained_weights(model), run_dir / "best.safetensors")

    bar = tqdm(total=run.num_steps, initial=progress.step, disable=not processes.is_first, mininterval=5.0)
    with StopFlag(processes, started, max_minutes) as stop, bar:
        last = time.monotonic()
        while progress.step < run.num_steps and not stop.wanted():
            batch = dataset.training.batch(progress.step)
            rate = learning_rate(progress.step, run.num_steps, settings)
            set_learning_rate(optimizer, rate)
            result = take_step(objective, optimizer, scaler, batch, config, processes, carried)
            carried = result.state if config.data.carry_state else None
            seconds = time.monotonic() - last
            progress.add(batch.inputs.numel(), result.grad_norm, seconds)
            bar.update()
            if progress.step % run.log_every == 0:
                speed = batch.inputs.numel() / seconds
                bar.set_postfix_str(f"loss {result.loss:.3f} {speed:.0f} tok/s", refresh=False)
                values = {"loss": result.loss, "grad_norm": result.grad_norm, "lr": rate, "tokens_per_second": speed}
                _write(sinks, progress, values)
            if progress.step % run.eval_every == 0 or progress.step == run.num_steps:
                look()
            if progress.step % run.checkpoint_every == 0:
                save()
            last = time.monotonic()
        if progress.step % run.checkpoint_every or not progress.step:
            save()
    for sink in sinks:
        sink.close()
    return progress


def make_model(config: TrainConfig) -> Rwkv7:
    """Return a new model, or the one to tune with what is to be trained of it."""
    model = load_model(Path(config.tune.base)) if config.tune.base else Rwkv7(config.model.shape)
    if model.shape != config.model.shape:
        raise ValueError(f"{config.tune.base} has the shape {model.shape}, the configuration says {config.model.shape}")
    adapt(model, config.tune)
    model.recompute = config.run.recompute
    return model


def evaluate(
    model: Rwkv7, tokenizer: Tokenizer, held_out: dict[str, Rows], token_bytes: Tensor, max_rows: int, num_probes: int
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
        values[f"recall/{distance}"], _ = recall(model, tokenizer, distance, num_probes)
    return values


def _write(sinks: list[Sink], progress: Progress, values: dict[str, float]) -> None:
    counts = {"tokens": progress.num_tokens, "skipped": progress.num_skipped, "seconds": progress.seconds}
    for sink in sinks:
        sink.write(progress.step, values | counts)

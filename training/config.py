"""What a training run is told: one TOML file, unknown keys refused."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from training.model import ModelShape

Precision = Literal["float32", "bfloat16", "float16"]


class ModelSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The size of the model."""

    vocab_size: int
    width: int
    num_layers: int
    head_size: int = 64

    @property
    def shape(self) -> ModelShape:
        """The shape that determines the parameters."""
        return ModelShape(self.vocab_size, self.width, self.num_layers, self.head_size)


class SourceSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One set of documents of the mixture."""

    name: str
    path: str = (
        ""  # below the data directory: .txt, .jsonl (either gzipped), or a .bin with its .idx; or made: see `made`
    )
    made: Literal["", "short", "medium", "long", "strange", "stories"] = (
        ""  # our own dialogues; "stories" wraps those at `path`
    )
    num_documents: int = 0  # how many to make; 0: as many as `path` has
    weight: float | list[float] = 1.0  # share of the rows; a list is interpolated over the curriculum
    user_loss: float = 0.0  # weight of the loss on a user's words; an assistant's have 1


class DataSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The mixture and how it is cut into rows."""

    sources: list[SourceSection]
    tokenizer: str = "auto"  # the tokenizer.json of the run, made if there is none; or world, bytes, a path
    row_tokens: int = 512
    rows_per_step: int = 8  # of all processes and accumulations together
    curriculum_steps: int = 0  # over which weights move from first to last; afterwards they stay
    held_out: float = 0.01  # share of each source's documents that is never trained on
    carry_state: bool = False  # rows continue each other: truncated backpropagation through time


class OptimizerSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How parameters move."""

    schedule: Literal["constant", "cosine", "wsd"] = "cosine"
    peak_lr: float = 6e-4
    final_lr: float = 6e-5
    warmup_steps: int = 10
    decay_steps: int = 0  # of wsd: the last steps, in which the rate falls
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-18
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    logit_penalty: float = 1e-4  # L2Wrap: keeps the largest logits from growing


class RunSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How long, where, and how often things are looked at."""

    num_steps: int
    seed: int = 0
    device: str = "cpu"
    precision: Precision = "float32"
    accumulate: int = 1  # micro-batches a step
    parallel: Literal["ddp", "fsdp"] = "ddp"  # among processes: copies of the model, or shares of it
    num_threads: int = 0
    compile: bool = False
    recompute: bool = False
    eval_every: int = 200
    eval_rows: int = 32  # of each source
    num_probes: int = 0  # of recall, at each distance: for models of our own dialogues
    checkpoint_every: int = 200
    keep_checkpoints: int = 2
    log_every: int = 10
    wandb: bool = False


class TuneSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is trained: the whole model, its initial states, or low-rank additions."""

    method: Literal["full", "state", "lora"] = "full"
    base: str = ""  # the model to begin with: a file or directory; none: a new one
    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = ("receptance", "key", "value", "output")


class TrainConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A whole run."""

    model: ModelSection
    data: DataSection
    optimizer: OptimizerSection = OptimizerSection()
    run: RunSection
    tune: TuneSection = TuneSection()

    @staticmethod
    def load(path: Path) -> TrainConfig:
        """Read a TOML file. Raises `msgspec.ValidationError`, which names the key at fault."""
        return msgspec.toml.decode(path.read_bytes(), type=TrainConfig)

    def with_run(self, **changes: object) -> TrainConfig:
        """The same with other values in its `run` section."""
        return msgspec.structs.replace(self, run=msgspec.structs.replace(self.run, **changes))

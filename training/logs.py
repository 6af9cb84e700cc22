"""Where a run's numbers go: a JSONL file; TensorBoard where it is installed; wandb when asked, offline by default."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Protocol

import msgspec


class Sink(Protocol):
    """Takes the numbers of a step."""

    def write(self, step: int, values: dict[str, float]) -> None:
        """Record values."""

    def close(self) -> None:
        """Write what is buffered."""


class JsonLines:
    """One JSON object a line, appended and flushed at once."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab")

    def write(self, step: int, values: dict[str, float]) -> None:
        """Record values."""
        self._file.write(msgspec.json.encode({"step": step, **values}) + b"\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoard:
    """Event files for TensorBoard."""

    def __init__(self, directory: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(directory)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Record values."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is buffered."""
        self._writer.close()


class Wandb:
    """Weights & Biases; offline unless `WANDB_MODE` says otherwise."""

    def __init__(self, directory: Path) -> None:
        os.environ.setdefault("WANDB_MODE", "offline")
        import wandb  # type: ignore[import-not-found]

        self._run = wandb.init(project="sostenuto", dir=directory)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Record values."""
        self._run.log(values, step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


def open_sinks(run_dir: Path, *, wandb: bool) -> list[Sink]:
    """Return the sinks of a run. Only the first process of a run should have any."""
    sinks: list[Sink] = [JsonLines(run_dir / "log.jsonl")]
    with contextlib.suppress(ImportError):  # an extra: `pip install sostenuto[training]`
        sinks.append(TensorBoard(run_dir / "tensorboard"))
    if wandb:
        sinks.append(Wandb(run_dir))
    return sinks

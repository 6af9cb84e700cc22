"""The curves of a run, drawn from its log."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

_SMOOTHING = 20  # logged losses that a point of the training curve is the mean of


def draw_curves(log: Path, image: Path) -> None:
    """Write a picture of loss, bits per byte and recall over the tokens trained on."""
    records = [json.loads(line) for line in log.read_text().splitlines()]
    training = [record for record in records if "loss" in record]
    evaluations = [record for record in records if "eval/loss" in record]
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    names = sorted({key for record in evaluations for key in record if key.startswith(("eval/", "recall/"))})
    has_recall = any(name.startswith("recall/") for name in names)
    loss, bits, *recalls = figure.subplots(1, 3 if has_recall else 2)
    loss.plot(_tokens(training), [record["loss"] for record in training], alpha=0.25, linewidth=0.8)
    loss.plot(_tokens(training), _running_mean([record["loss"] for record in training]), label="training")
    loss.set(title="loss, nats a token", ylim=(0, 5))
    for name in names:
        values = [record.get(name) for record in evaluations]
        if name.endswith("/bits_per_byte"):
            bits.plot(_tokens(evaluations), values, label=name.split("/")[1])
        elif name.startswith("recall/"):
            turns = name.split("/")[1]
            recalls[0].plot(_tokens(evaluations), values, label=f"{turns} turn{'s' * (turns != '1')} later")
    bits.set(title="held-out bits a byte", ylim=(0, 3))
    for axes in recalls:
        axes.set(title="held-out facts recalled", ylim=(-0.02, 1.02))
    for axes in (loss, bits, *recalls):
        axes.set_xlabel("tokens")
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="x-small")
    figure.savefig(image, dpi=110)


def _tokens(records: Sequence[dict[str, float]]) -> list[float]:
    return [record["tokens"] for record in records]


def _running_mean(values: Sequence[float]) -> list[float]:
    windows = (values[max(0, end - _SMOOTHING) : end] for end in range(1, len(values) + 1))
    return [sum(window) / len(window) for window in windows]

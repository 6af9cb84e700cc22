"""The plots of a load test. Each is drawn on axes it is given, so that one drawing serves the page and the picture."""

from __future__ import annotations

import io
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Final

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from loadtest.generator import LoadRun
from loadtest.reply import TurnRecord

# Told apart also without red-green vision (Okabe and Ito), in the order of the legend.
RESUME_COLORS: Final = {
    "new": "#7d8590",
    "hot": "#009e73",
    "restored": "#0072b2",
    "replayed": "#e69f00",
    "stateless": "#56646f",
}
FAILED_COLOR: Final = "#d55e00"
SERIES_COLORS: Final = ("#0072b2", "#009e73", "#cc79a7")
STYLE: Final = Path(__file__).with_name("report.mplstyle")

Draw = Callable[[Axes, LoadRun], None]


def draw_timeline(axes: Axes, run: LoadRun) -> None:
    """Time to first token of every turn, where it was meant to start; failed turns along the bottom."""
    axes.set_title("Time to first token over the run")
    groups: dict[str, list[TurnRecord]] = {}
    for record in run.records:
        if record.error is None and record.ttft_seconds is not None:
            groups.setdefault(record.resume or "stateless", []).append(record)
    for kind, color in RESUME_COLORS.items():
        if records := groups.get(kind):
            times = [record.intended_start for record in records]
            waits = [record.ttft_seconds or 0.0 for record in records]
            axes.scatter(times, waits, s=13, color=color, alpha=0.55, linewidths=0, label=kind, rasterized=True)
    failures = [record.intended_start for record in run.records if record.error not in (None, "unfinished")]
    if failures:
        bottom = axes.get_xaxis_transform()
        axes.plot(failures, [0.02] * len(failures), "x", color=FAILED_COLOR, ms=6, transform=bottom, label="failed")
    _scale_waits(axes, [record.ttft_seconds or 0.0 for records in groups.values() for record in records])
    axes.set_xlabel("intended start (s)")
    if groups or failures:
        axes.legend(ncols=3, loc="upper right", handletextpad=0.1, columnspacing=1.0, markerscale=1.6)
    _mark_warmup(axes, run)


def draw_distributions(axes: Axes, run: LoadRun) -> None:
    """The share of measurements below each latency."""
    axes.set_title("How long things took")
    whole = _measured(run)
    series = {
        "between tokens": [gap for record in whole for gap in record.token_gaps],
        "to first token": [record.ttft_seconds for record in whole if record.ttft_seconds is not None],
        "whole turn": [record.turn_seconds for record in whole],
    }
    for (name, values), color in zip(series.items(), SERIES_COLORS, strict=True):
        if values:
            # Clocks are not exact to the microsecond, and several events may share one packet.
            ordered = np.maximum(np.sort(np.array(values)), 1e-6)
            shares = np.arange(1, ordered.size + 1) / ordered.size
            shown = np.unique(np.linspace(0, ordered.size - 1, 2000).astype(int))
            axes.step(ordered[shown], shares[shown], where="post", color=color, linewidth=1.8, label=name)
    for share in (0.5, 0.99):
        axes.axhline(share, color="#8c959f", linewidth=0.8, linestyle=(0, (4, 3)))
    if whole:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
        axes.legend(loc="upper left", bbox_to_anchor=(0, 0.93), frameon=True, framealpha=0.85, edgecolor="none")
    axes.set_ylim(0, 1.02)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 0.99], ["0", "25 %", "50 %", "75 %", "99 %"])
    _label_seconds(axes.xaxis)
    axes.set_xlabel("latency")


def draw_by_turn(axes: Axes, run: LoadRun) -> None:
    """Time to first token by the turn's place in its conversation: flat, if a long past costs nothing."""
    axes.set_title("Does a longer conversation answer later?")
    positions: dict[int, list[float]] = {}
    for record in _measured(run):
        if record.ttft_seconds is not None:
            positions.setdefault(record.turn, []).append(record.ttft_seconds)
    turns = sorted(positions)
    if turns:
        low, middle, high = (
            [float(np.percentile(positions[turn], rank, method="inverted_cdf")) for turn in turns]
            for rank in (10, 50, 90)
        )
        axes.fill_between(turns, low, high, color=SERIES_COLORS[0], alpha=0.14, linewidth=0, label="p10 to p90")
        axes.plot(turns, middle, "o-", color=SERIES_COLORS[0], linewidth=1.8, ms=4.5, label="median")
        axes.set_ylim(0, max(high) * 1.2)
        axes.set_xlim(0.5, max(turns) + 0.5)
        axes.legend(loc="upper right", ncols=2)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _label_seconds(axes.yaxis)
    axes.set_xlabel("turn of the conversation")
    axes.set_ylabel("time to first token")


def draw_throughput(axes: Axes, run: LoadRun) -> None:
    """Tokens delivered in each interval, and the turns that were on the wire."""
    axes.set_title("Output tokens a second")
    end = max(run.elapsed_seconds, 1e-3)
    edges = np.linspace(0.0, end, min(120, max(10, int(end * 2))) + 1)
    width = edges[1] - edges[0]
    times, weights = _deliveries(run)
    tokens, _ = np.histogram(times, bins=edges, weights=weights)
    color = SERIES_COLORS[1]
    rates = np.append(tokens, tokens[-1]) / width
    axes.fill_between(edges, rates, step="post", color=color, alpha=0.18, linewidth=0)
    axes.step(edges, rates, where="post", color=color, linewidth=1.5, label="tokens/s")
    axes.set_xlim(0, end)
    axes.set_ylim(0, max(float(rates.max()), 1.0) * 1.2)
    axes.set_xlabel("time (s)")
    _draw_active_turns(axes, run)
    axes.legend(loc="upper left")
    _mark_warmup(axes, run)


def _draw_active_turns(axes: Axes, run: LoadRun) -> None:
    """Draw the turns on the wire over the same time, on a scale of their own at the right."""
    right = axes.twinx()
    starts, active = _active_turns(run)
    right.step(starts, active, where="post", color="#8c959f", linewidth=0.9, alpha=0.8, label="turns in flight")
    right.set_ylim(0, max(*active, 1) * 1.8)
    right.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    right.spines["right"].set_visible(False)
    right.grid(visible=False)
    right.legend(loc="upper right")


DRAWINGS: Final[dict[str, Draw]] = {
    "timeline": draw_timeline,
    "distributions": draw_distributions,
    "by_turn": draw_by_turn,
    "throughput": draw_throughput,
}


def svg_of(draw: Draw, run: LoadRun) -> str:
    """Return one drawing as an SVG document."""
    with style.context(STYLE):
        figure = Figure(figsize=(6.4, 3.7), layout="constrained")
        draw(figure.subplots(), run)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", dpi=160, metadata={"Date": None, "Creator": "loadtest"})
    return buffer.getvalue()


def png_of_all(run: LoadRun, title: str) -> bytes:
    """Return all drawings as one PNG picture."""
    with style.context(STYLE):
        figure = Figure(figsize=(13.0, 8.2), layout=ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.15))
        figure.suptitle(title, x=0.015, ha="left", fontsize=13, fontweight="bold")
        for axes, draw in zip(figure.subplots(2, 2).flat, DRAWINGS.values(), strict=True):
            draw(axes, run)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def format_seconds(seconds: float | None) -> str:
    """Return a duration with three digits and the unit that suits it."""
    if seconds is None:
        return "-"
    if seconds >= 1:
        return f"{seconds:.3g} s" if seconds < 1000 else f"{seconds:.0f} s"
    if seconds >= 1e-3:
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds * 1e6:.3g} µs"


def _measured(run: LoadRun) -> list[TurnRecord]:
    warmup = run.options.warmup_seconds
    return [record for record in run.records if record.error is None and record.intended_start >= warmup]


def _deliveries(run: LoadRun) -> tuple[list[float], list[float]]:
    """Return when text arrived and how many tokens it was: a turn's tokens, spread evenly over its deliveries."""
    times: list[float] = []
    weights: list[float] = []
    for record in run.records:
        if record.first_token is not None and record.output_tokens:
            arrived = list(accumulate(record.token_gaps, initial=record.first_token))
            times += arrived
            weights += [record.output_tokens / len(arrived)] * len(arrived)
    return times, weights


def _active_turns(run: LoadRun) -> tuple[list[float], list[int]]:
    changes = [(record.sent, 1) for record in run.records if record.sent is not None]
    changes += [(record.end, -1) for record in run.records if record.sent is not None]
    changes.sort()
    return [0.0, *(time for time, _ in changes)], list(accumulate((change for _, change in changes), initial=0))


def _label_seconds(axis: Axis) -> None:
    axis.set_major_formatter(FuncFormatter(lambda seconds, _: format_seconds(seconds) if seconds else "0"))
    axis.set_minor_formatter(NullFormatter())


def _scale_waits(axes: Axes, waits: list[float]) -> None:
    """Scale the y axis for `waits` in seconds: by powers where they span more than one, else from zero."""
    if waits and max(waits) > 10 * min(waits) > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.set_ylim(top=max(waits) * 1.8)
    elif waits:
        axes.set_ylim(0, max(waits) * 1.2)
    _label_seconds(axes.yaxis)


def _mark_warmup(axes: Axes, run: LoadRun) -> None:
    if warmup := run.options.warmup_seconds:
        axes.axvspan(0, warmup, color="#8c959f", alpha=0.12, linewidth=0)

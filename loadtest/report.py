"""The files a load test leaves in its output directory: a page, a picture, the summary and every turn."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from dataclasses import asdict, fields
from html import escape
from pathlib import Path
from string import Template

import orjson

from loadtest.figures import DRAWINGS, format_seconds, png_of_all, svg_of
from loadtest.generator import LoadRun
from loadtest.statistics import Distribution, Summary

# Above this share of the median time to first token, the numbers are about this program as much as about the server.
BUSY_SHARE = 0.1
HIDDEN_OPTIONS = {"api_key", "output", "quiet"}
PAGE = Path(__file__).with_name("report.html")


def write_report(directory: Path, run: LoadRun, summary: Summary) -> None:
    """Write `report.html`, `report.png`, `summary.json` and `turns.jsonl` into `directory`, which is made if needed."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "summary.json").write_bytes(orjson.dumps(summary.as_json(), option=orjson.OPT_INDENT_2) + b"\n")
    with (directory / "turns.jsonl").open("wb") as turns:
        turns.writelines(orjson.dumps(asdict(record)) + b"\n" for record in run.records)
    (directory / "report.png").write_bytes(png_of_all(run, _title(summary)))
    (directory / "report.html").write_text(_page(run, summary), encoding="utf-8")


def summary_lines(summary: Summary) -> list[str]:
    """Return the summary as a few lines for a terminal."""
    lines = [
        f"{_title(summary)}",
        f"{summary.turns} turns of {summary.conversations} conversations in {summary.elapsed_seconds:.1f} s, "
        f"{summary.failed_turns} failed, {summary.unfinished_turns} unfinished",
        f"{summary.output_tokens_per_second:.1f} output tokens/s, {summary.turns_per_second:.2f} turns/s",
        f"{'':20}{'p50':>10}{'p90':>10}{'p95':>10}{'p99':>10}{'max':>10}",
    ]
    for name, distribution in _latencies(summary):
        columns = (distribution.p50, distribution.p90, distribution.p95, distribution.p99, distribution.max)
        lines.append(f"{name:20}" + "".join(f"{format_seconds(value):>10}" for value in columns))
    for name, tally in (("errors", summary.errors), ("broken promises", summary.violations)):
        lines += [f"{name}: {kind} x {number}" for kind, number in tally.items()]
    return lines + _cautions(summary)


def _latencies(summary: Summary) -> list[tuple[str, Distribution]]:
    return [
        ("time to first token", summary.ttft_seconds),
        ("between tokens", summary.inter_token_seconds),
        ("per output token", summary.seconds_per_token),
        ("whole turn", summary.turn_seconds),
        ("start delay", summary.start_delay_seconds),
        ("timer lag", summary.timer_lag_seconds),
    ]


def _title(summary: Summary) -> str:
    load = f"{summary.rate:g} conversations/s (open loop)" if summary.rate else f"{summary.users} users (closed loop)"
    keeper = "history on the server" if summary.history == "server" else "history resent by the client"
    return f"{summary.model}: {load}, {keeper}"


def _cautions(summary: Summary) -> list[str]:
    """Return what a reader of the numbers must know."""
    cautions = []
    lag, ttft = summary.timer_lag_seconds.p99, summary.ttft_seconds.p50
    if lag is not None and ttft is not None and lag > BUSY_SHARE * ttft:
        cautions.append(
            f"This program was busy: its timers were {format_seconds(lag)} late (p99) against a median time to first "
            "token of " + format_seconds(ttft) + ". Part of these latencies is its own."
        )
    if summary.unfinished_turns:
        cautions.append(
            f"{summary.unfinished_turns} turns were cut off at the end of the run and are in no percentile: "
            "the tail is longer than shown."
        )
    return cautions


def _page(run: LoadRun, summary: Summary) -> str:
    verdict, verdict_class = _verdict(summary)
    figures = {name: _image(svg_of(draw, run), name) for name, draw in DRAWINGS.items()}
    return Template(PAGE.read_text(encoding="utf-8")).substitute(
        figures,
        title=escape(_title(summary)),
        verdict_class=verdict_class,
        verdict=verdict,
        tiles="".join(_tile(*tile) for tile in _tiles(summary)),
        cautions="".join(f'<p class="caution">{escape(caution)}</p>' for caution in _cautions(summary)),
        latencies=_rows((name, *_latency_cells(distribution)) for name, distribution in _latencies(summary)),
        positions=_rows(
            (
                str(position.turn),
                str(position.ttft_seconds.count),
                format_seconds(position.ttft_seconds.p50),
                format_seconds(position.ttft_seconds.p99),
                f"{position.mean_request_bytes:,.0f}",
                f"{position.mean_prompt_tokens:,.1f}",
                f"{position.mean_cached_tokens:,.1f}",
            )
            for position in summary.by_turn
        ),
        tallies=_tallies(summary),
        options="".join(
            f"<div><dt>{name}</dt><dd>{escape(str(value))}</dd></div>" for name, value in _shown_options(run).items()
        ),
    )


def _verdict(summary: Summary) -> tuple[str, str]:
    if not summary.turns:
        return "no turn succeeded", "bad"
    if summary.violations:
        return f"{sum(summary.violations.values())} broken promises", "bad"
    if summary.failed_turns:
        return "promises kept, some turns failed", "fair"
    return "every promise kept", "good"


def _tiles(summary: Summary) -> list[tuple[str, str, str]]:
    def tail(distribution: Distribution) -> str:
        return f"p99 {format_seconds(distribution.p99)}"

    failed = summary.failed_turns
    return [
        ("first token p50", format_seconds(summary.ttft_seconds.p50), tail(summary.ttft_seconds)),
        ("between tokens p50", format_seconds(summary.inter_token_seconds.p50), tail(summary.inter_token_seconds)),
        ("whole turn p50", format_seconds(summary.turn_seconds.p50), tail(summary.turn_seconds)),
        ("output tokens/s", f"{summary.output_tokens_per_second:,.1f}", f"{summary.output_tokens:,} in all"),
        ("turns/s", f"{summary.turns_per_second:,.2f}", f"{summary.turns:,} turns"),
        ("failed turns", f"{failed:,}", f"{100 * failed / max(1, failed + summary.turns):.2g} % of all"),
    ]


def _tile(name: str, value: str, note: str) -> str:
    number, _, unit = value.partition(" ")
    return f"<div class=tile><span>{name}</span><strong>{number}<small>{unit}</small></strong><em>{note}</em></div>"


def _latency_cells(distribution: Distribution) -> tuple[str, ...]:
    values = (distribution.mean, distribution.p50, distribution.p90, distribution.p95, distribution.p99)
    return (f"{distribution.count:,}", *(format_seconds(value) for value in (*values, distribution.max)))


def _rows(rows: Iterable[Iterable[str]]) -> str:
    return "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)


def _tallies(summary: Summary) -> str:
    groups = {
        "resumed": summary.resumes,
        "finished by": summary.finish_reasons,
        "errors": summary.errors,
        "broken promises": summary.violations,
    }
    rows = [(name, escape(kind), f"{number:,}") for name, tally in groups.items() for kind, number in tally.items()]
    return _rows(rows or [("nothing", "", "")])


def _shown_options(run: LoadRun) -> dict[str, object]:
    hidden = HIDDEN_OPTIONS | ({"users"} if run.options.loop == "open" else set())
    names = [field.name for field in fields(run.options) if field.name not in hidden]
    return {name: value for name in names if (value := getattr(run.options, name)) is not None}


def _image(svg: str, name: str) -> str:
    data = base64.b64encode(svg.encode()).decode()
    return f'<img alt="{name}" src="data:image/svg+xml;base64,{data}">'

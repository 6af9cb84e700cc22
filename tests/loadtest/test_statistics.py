"""Records to numbers."""

from __future__ import annotations

import orjson
import pytest

from loadtest.generator import LoadRun
from loadtest.options import Options
from loadtest.reply import TurnRecord
from loadtest.statistics import Distribution, summarize


def record(turn: int = 1, start: float = 0.0, ttft: float = 1.0, **changes: object) -> TurnRecord:
    """Return a turn that took `ttft` to its first token, then one second."""
    values = {"conversation": 0, "sent": start, "first_token": start + ttft, "end": start + ttft + 1.0}
    return TurnRecord(turn=turn, intended_start=start, **(values | changes))  # type: ignore[arg-type]


def run(*records: TurnRecord, warmup: float = 0.0) -> LoadRun:
    """Return a run that saw `records`."""
    options = Options(url="http://unused", warmup_seconds=warmup)
    return LoadRun(options, "m", elapsed_seconds=20.0, records=list(records), num_conversations=1)


def test_percentiles_are_measured_values() -> None:
    """Of 1..1000, each percentile is the value at that rank, none between two."""
    distribution = Distribution.of(float(value) for value in range(1000, 0, -1))
    assert (distribution.count, distribution.mean, distribution.max) == (1000, 500.5, 1000.0)
    assert (distribution.p50, distribution.p90, distribution.p95, distribution.p99) == (500.0, 900.0, 950.0, 990.0)
    assert Distribution.of([3.0, None, 1.0]).p50 == 1.0


def test_nothing_measured_is_said_to_be_nothing() -> None:
    """Without values there are no percentiles, and a run without turns is not ok."""
    assert Distribution.of([None]) == Distribution(0)
    summary = summarize(run())
    assert (summary.turns, summary.turns_per_second, summary.ok) == (0, 0.0, False)


def test_failed_and_unfinished_turns_are_counted_apart() -> None:
    """Neither is in a percentile; only the first is an error."""
    records = [
        record(ttft=1.0, output_tokens=4),
        record(ttft=50.0, error="timeout", output_tokens=9),
        record(ttft=50.0, error="unfinished"),
    ]
    summary = summarize(run(*records))
    assert (summary.turns, summary.failed_turns, summary.unfinished_turns) == (1, 1, 1)
    assert summary.errors == {"timeout": 1}
    assert summary.ttft_seconds.max == 1.0
    assert summary.output_tokens == 4


def test_warmup_is_left_out_of_everything_but_the_promises() -> None:
    """Turns meant to start in the warm-up count nowhere, but what they broke is told."""
    early = record(start=1.0, ttft=30.0, violations=["no_done"], output_tokens=100)
    summary = summarize(run(early, record(start=5.0, ttft=3.0, output_tokens=10), warmup=4.0))
    assert (summary.turns, summary.warmup_turns) == (1, 1)
    assert summary.ttft_seconds.max == 3.0
    assert summary.measured_seconds == pytest.approx(5.0)
    assert summary.output_tokens_per_second == pytest.approx(2.0)
    assert summary.violations == {"no_done": 1}
    assert not summary.ok


def test_turns_are_told_apart_by_their_place() -> None:
    """Each place in the conversation has its own latencies and sizes, in order."""
    records = [record(2, ttft=2.0, request_bytes=10), record(1, ttft=1.0), record(2, ttft=4.0, request_bytes=30)]
    positions = summarize(run(*records)).by_turn
    assert [(position.turn, position.ttft_seconds.max) for position in positions] == [(1, 1.0), (2, 4.0)]
    assert positions[1].mean_request_bytes == 20.0


def test_tokens_are_counted_by_usage_and_gaps_by_delivery() -> None:
    """A delivery may hold several tokens: the time per token divides by what the server reports."""
    summary = summarize(run(record(output_tokens=9, token_gaps=[1.0, 3.0])))
    assert summary.inter_token_seconds.count == 2
    assert summary.seconds_per_token.p50 == 0.5


def test_the_summary_is_json() -> None:
    """All of it can be written as JSON, floats to six digits."""
    line = orjson.loads(orjson.dumps(summarize(run(record(ttft=1 / 3))).as_json()))
    assert line["ttft_seconds"]["p50"] == 0.333333
    assert line["by_turn"][0]["turn"] == 1

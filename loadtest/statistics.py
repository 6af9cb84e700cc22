"""Records of turns to numbers: percentiles, throughput, errors, and what a turn costs by its place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import numpy as np

from loadtest.generator import LoadRun
from loadtest.reply import TurnRecord

UNFINISHED = "unfinished"


@dataclass(frozen=True, slots=True)
class Distribution:
    """What many measurements of one thing look like. Each percentile is a value that was measured (nearest rank)."""

    count: int
    mean: float | None = None
    p50: float | None = None
    p90: float | None = None
    p95: float | None = None
    p99: float | None = None
    max: float | None = None

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Distribution:
        """Return the distribution of the values that are there."""
        measured = np.array([value for value in values if value is not None], dtype=np.float64)
        if not measured.size:
            return cls(0)
        ranks = np.percentile(measured, (50, 90, 95, 99, 100), method="inverted_cdf")
        return cls(int(measured.size), float(measured.mean()), *(float(rank) for rank in ranks))


@dataclass(frozen=True, slots=True)
class TurnPosition:
    """All turns that were the `turn`-th of their conversation."""

    turn: int
    ttft_seconds: Distribution
    mean_request_bytes: float
    mean_prompt_tokens: float
    mean_cached_tokens: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """A load test in numbers, with the options that say what was measured."""

    url: str
    model: str
    loop: str
    rate: float | None
    users: int | None
    history: str
    seed: int
    elapsed_seconds: float
    measured_seconds: float
    conversations: int
    turns: int  # measured and whole
    failed_turns: int
    unfinished_turns: int  # cut off at the end of the run: neither whole nor failed
    warmup_turns: int  # left out of everything but the violations
    ttft_seconds: Distribution
    inter_token_seconds: Distribution  # between one delivery of text and the next; a delivery may hold several tokens
    seconds_per_token: Distribution  # a turn's mean after its first delivery, by the usage that the server reports
    turn_seconds: Distribution
    start_delay_seconds: Distribution  # of the latency: waiting in this program
    timer_lag_seconds: Distribution  # how late this program's own timers were
    turns_per_second: float
    output_tokens_per_second: float
    output_tokens: int
    prompt_tokens: int
    cached_tokens: int
    request_bytes: int
    finish_reasons: dict[str, int]
    resumes: dict[str, int]
    errors: dict[str, int]
    violations: dict[str, int]
    by_turn: list[TurnPosition]

    @property
    def ok(self) -> bool:
        """Whether something was measured and every promise was kept."""
        return self.turns > 0 and not self.violations

    def as_json(self) -> dict[str, object]:
        """Return this as what JSON can hold, numbers to six digits."""
        return {name: _rounded(value) for name, value in asdict(self).items()}


def summarize(run: LoadRun) -> Summary:
    """Return what `run` saw, in numbers."""
    options = run.options
    measured = [record for record in run.records if record.intended_start >= options.warmup_seconds]
    whole = [record for record in measured if record.error is None]
    measured_seconds = max((record.end for record in measured), default=0.0) - options.warmup_seconds
    output_tokens = sum(record.output_tokens for record in whole)
    return Summary(
        url=options.url,
        model=run.model,
        loop=options.loop,
        rate=options.rate,
        users=options.users if options.rate is None else None,
        history=options.history,
        seed=options.seed,
        elapsed_seconds=run.elapsed_seconds,
        measured_seconds=max(0.0, measured_seconds),
        conversations=run.num_conversations,
        turns=len(whole),
        failed_turns=sum(record.error not in (None, UNFINISHED) for record in measured),
        unfinished_turns=sum(record.error == UNFINISHED for record in measured),
        warmup_turns=len(run.records) - len(measured),
        ttft_seconds=Distribution.of(record.ttft_seconds for record in whole),
        inter_token_seconds=Distribution.of(gap for record in whole for gap in record.token_gaps),
        seconds_per_token=Distribution.of(record.seconds_per_token for record in whole),
        turn_seconds=Distribution.of(record.turn_seconds for record in whole),
        start_delay_seconds=Distribution.of(record.start_delay_seconds for record in measured),
        timer_lag_seconds=Distribution.of(run.lags),
        turns_per_second=_ratio(len(whole), measured_seconds),
        output_tokens_per_second=_ratio(output_tokens, measured_seconds),
        output_tokens=output_tokens,
        prompt_tokens=sum(record.prompt_tokens for record in whole),
        cached_tokens=sum(record.cached_tokens for record in whole),
        request_bytes=sum(record.request_bytes for record in whole),
        finish_reasons=_tally(record.finish_reason for record in whole),
        resumes=_tally(record.resume for record in whole),
        errors=_tally(record.error for record in measured if record.error != UNFINISHED),
        violations=_tally(violation for record in run.records for violation in record.violations),
        by_turn=_by_turn(whole),
    )


def _by_turn(records: list[TurnRecord]) -> list[TurnPosition]:
    positions: dict[int, list[TurnRecord]] = {}
    for record in records:
        positions.setdefault(record.turn, []).append(record)
    return [_position(turn, positions[turn]) for turn in sorted(positions)]


def _position(turn: int, records: list[TurnRecord]) -> TurnPosition:
    return TurnPosition(
        turn,
        Distribution.of(record.ttft_seconds for record in records),
        mean_request_bytes=sum(record.request_bytes for record in records) / len(records),
        mean_prompt_tokens=sum(record.prompt_tokens for record in records) / len(records),
        mean_cached_tokens=sum(record.cached_tokens for record in records) / len(records),
    )


def _rounded(value: object) -> object:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    return [_rounded(part) for part in value] if isinstance(value, list) else value


def _ratio(amount: float, seconds: float) -> float:
    return amount / seconds if seconds > 0 else 0.0


def _tally(names: Iterable[str | None]) -> dict[str, int]:
    return dict(sorted(Counter(name for name in names if name is not None).items()))

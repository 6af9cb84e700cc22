"""Every metric, declared once: name, unit, buckets, labels.

Fed by the engine's step reports, the turn protocol and the HTTP layer. Labels have few values by construction: routes,
codes, kinds; never a conversation, a request or anything else a client can invent.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import accumulate
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.utils import floatToGoString

from engine.messages import (
    CheckpointStored,
    EngineReady,
    EngineStats,
    FinishReason,
    ResumeKind,
    SequenceStarted,
    StepReport,
    StepStats,
)
from server.conversations.ledger import Durability

# A recurrent model's step takes 1-10 ms whatever the history's length, so resolution begins at half a millisecond.
STEP_BUCKETS: Final = (
    0.0005, 0.001, 0.002, 0.003, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5,
)  # fmt: skip
WAIT_BUCKETS: Final = (
    0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 20.0, 60.0,
)  # fmt: skip
DURATION_BUCKETS: Final = (
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 600.0,
)  # fmt: skip
STATE_BUCKETS: Final = (
    0.0005, 0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5,
)  # fmt: skip
SIZE_BUCKETS: Final = tuple(float(2**k) for k in range(0, 14))

# Monotonic totals the engine counts itself and sends by these names.
ENGINE_COUNTERS: Final = {
    "rwkv_engine_steps_total": "Steps of the engine; must grow while sequences run.",
    "rwkv_engine_errors_total": "Sequences that failed because the device did.",
    "rwkv_numerical_errors_total": "Sequences that failed because a value was NaN or infinite.",
    "rwkv_prefill_tokens_total": "Prompt and replayed tokens consumed.",
    "rwkv_decode_tokens_total": "Tokens consumed one by one while generating.",
    "rwkv_settled_tokens_total": "Delivered tokens consumed after the end, to make a state final.",
    "rwkv_state_load_bytes_total": "Bytes of checkpoints loaded.",
    "rwkv_state_rebuilds_total": "States built again from their origin because a stop string reached back behind them.",
    "rwkv_states_lost_total": "Final states that could not be kept; their next resume may replay.",
    "rwkv_states_unavailable_total": "Sequences refused because their state could not be had.",
    "rwkv_snapshots_missed_total": "Partial stop strings without a spare slot to go back to.",
    "rwkv_stop_bytes_lost_total": "Bytes before a stop string that no token could express.",
    "rwkv_hot_state_evictions_total": "States dropped from host memory to make room.",
    "rwkv_hot_states_dropped_total": "States too large to be kept in host memory at all.",
    "rwkv_checkpoints_rejected_total": "Checkpoints found but not what was asked for: never loaded.",
    "rwkv_checkpoints_missing_total": "Checkpoints that were expected and not there.",
    "rwkv_checkpoints_unavailable_total": "Checkpoints that the store did not deliver.",
    "rwkv_prefix_tokens_reused_total": "Prompt tokens not computed because an equal beginning had left its state.",
    "rwkv_prefix_states_written_total": "States of prompts' beginnings written to the store.",
    "rwkv_prefix_states_not_written_total": "States of prompts' beginnings that the store did not take.",
}

# Likewise, with one label: sent as NAME:VALUE, for these values.
LABELLED_ENGINE_COUNTERS: Final = {
    "rwkv_prefix_lookups_total": (
        "Prompts for which a state of an equal beginning was looked for.",
        "outcome",
        ("hit_memory", "hit_store", "miss"),
    ),
    "rwkv_prefix_misses_total": (
        "Of these, those that found none.",
        "reason",
        ("evicted", "new", "not_kept", "prompt_logprobs", "store_unavailable", "too_short"),
    ),
}

# How the engine is, as it said last.
_ENGINE_GAUGES: Final[tuple[tuple[str, str, Callable[[EngineStats], float]], ...]] = (
    ("rwkv_sequences_running", "Sequences in a slot.", lambda stats: stats.num_running),
    ("rwkv_sequences_waiting", "Sequences waiting for a slot.", lambda stats: stats.num_waiting),
    ("rwkv_hot_states", "States held in host memory between turns.", lambda stats: stats.num_hot_states),
    ("rwkv_hot_state_bytes", "Bytes of these states.", lambda stats: stats.hot_state_bytes),
    ("rwkv_checkpoints_pending", "States waiting to be written.", lambda stats: stats.pending_checkpoints),
)
_NO_STATS: Final = EngineStats(
    num_steps=0, num_running=0, num_waiting=0, num_slots_used=0, num_slots=0, num_hot_states=0, hot_state_bytes=0,
    pending_checkpoints=0,
)  # fmt: skip


class Metrics:
    """All metrics of one API process, in a registry of their own."""

    def __init__(self, state_tier: str = "memory") -> None:
        self.registry = CollectorRegistry()
        self.engine = EngineMetrics(self.registry, state_tier)
        self.turns = TurnMetrics(self.registry)
        self.http = HttpMetrics(self.registry)
        ProcessCollector(namespace="rwkv", registry=self.registry)

    def render(self) -> bytes:
        """Return everything in Prometheus' text format."""
        return generate_latest(self.registry)


class EngineMetrics:
    """The engine, as its reports tell it, and the sequences it runs, as their clients see them."""

    def __init__(self, registry: CollectorRegistry, state_tier: str) -> None:
        self._state_tier = state_tier
        self._latest = _NO_STATS
        self._totals = EngineTotals()
        registry.register(self._totals)
        self.model = Info("rwkv_model", "What is being served.", registry=registry)
        self.state_bytes = Gauge("rwkv_state_bytes", "Size of one conversation's state.", registry=registry)
        self.up = Gauge("rwkv_engine_up", "1 while the engine takes requests.", registry=registry)
        self.restarts = Gauge("rwkv_engine_restarts", "Engines started to replace a lost one.", registry=registry)
        for name, description, value in _ENGINE_GAUGES:
            Gauge(name, description, registry=registry).set_function(partial(self._now, value))
        slots = Gauge("rwkv_state_slots", "Slots of the device's state pool.", ["status"], registry=registry)
        slots.labels("used").set_function(partial(self._now, lambda stats: stats.num_slots_used))
        slots.labels("free").set_function(partial(self._now, lambda stats: stats.num_slots - stats.num_slots_used))
        self.step_seconds = LoopHistogram("rwkv_engine_step_seconds", "Duration of an engine step.", STEP_BUCKETS)
        self.batch_size = LoopHistogram("rwkv_batch_size", "Sequences in a step.", SIZE_BUCKETS)
        self.step_tokens = LoopHistogram("rwkv_step_tokens", "Tokens consumed by a step.", SIZE_BUCKETS)
        self.queue_seconds = Histogram(
            "rwkv_queue_seconds", "Wait of a sequence for a slot.", buckets=WAIT_BUCKETS, registry=registry
        )
        self.first_token_seconds = Histogram(
            "rwkv_time_to_first_token_seconds",
            "From the request to the first token delivered, by how the state before it was obtained.",
            ["resume"],
            buckets=WAIT_BUCKETS,
            registry=registry,
        )
        self.inter_token_seconds = LoopHistogram(
            "rwkv_inter_token_latency_seconds", "Between deliveries of one sequence.", STEP_BUCKETS
        )
        for histogram in (self.step_seconds, self.batch_size, self.step_tokens, self.inter_token_seconds):
            registry.register(histogram)
        self.prompt_tokens = Counter(
            "rwkv_prompt_tokens", "Tokens of prompts, histories not included.", registry=registry
        )
        self.generation_tokens = Counter("rwkv_generation_tokens", "Tokens generated.", registry=registry)
        self.finished = Counter("rwkv_sequences_finished", "Sequences ended, by reason.", ["reason"], registry=registry)
        self.state_load_seconds = Histogram(
            "rwkv_state_load_seconds",
            "To fetch, verify and place a checkpoint.",
            ["tier"],
            buckets=STATE_BUCKETS,
            registry=registry,
        )

    def ready(self, ready: EngineReady, model_name: str, version: str) -> None:
        """Note what is being served."""
        self.state_bytes.set(ready.state_bytes)
        self.model.info(
            {
                "model": model_name,
                "fingerprint": ready.fingerprint,
                "generation": ready.generation,
                "device": ready.device,
                "dtype": ready.dtype,
                "state_dtype": ready.state_dtype,
                "version": version,
            }
        )

    def report(self, report: StepReport) -> None:
        """Take in what one step had to say about itself."""
        if report.step is not None:
            self._step(report.step)
        if report.stats is not None:
            self._stats(report.stats)

    def _step(self, step: StepStats) -> None:
        self.step_seconds.observe(step.step_seconds)
        self.batch_size.observe(step.num_sequences)
        self.step_tokens.observe(step.num_decode_tokens + step.num_prefill_tokens)

    def _stats(self, stats: EngineStats) -> None:
        self._latest = stats
        self._totals.counters = {"rwkv_engine_steps_total": float(stats.num_steps), **stats.counters}

    def _now(self, value: Callable[[EngineStats], float]) -> float:
        return value(self._latest)

    def watch(self, num_prompt_tokens: int) -> SequenceClock:
        """Return the clock of a sequence that is submitted now."""
        self.prompt_tokens.inc(num_prompt_tokens)
        return SequenceClock(self, self._state_tier)


class SequenceClock:
    """Times one sequence from its submission to its end."""

    def __init__(self, metrics: EngineMetrics, state_tier: str) -> None:
        self._metrics = metrics
        self._state_tier = state_tier
        self._delivered_at = time.perf_counter()
        self._resume = ResumeKind.NEW
        self._has_delivered = False

    def started(self, event: SequenceStarted) -> None:
        """The sequence has a slot and its state."""
        self._resume = event.resume
        self._metrics.queue_seconds.observe(event.queue_seconds)
        if event.load_seconds > 0:
            self._metrics.state_load_seconds.labels(self._state_tier).observe(event.load_seconds)

    def delivered(self) -> None:
        """Tokens have come."""
        now = time.perf_counter()
        if self._has_delivered:
            self._metrics.inter_token_seconds.observe(now - self._delivered_at)
        else:
            self._metrics.first_token_seconds.labels(self._resume.value).observe(now - self._delivered_at)
        self._has_delivered = True
        self._delivered_at = now

    def finished(self, reason: FinishReason, num_sampled_tokens: int) -> None:
        """The sequence has ended."""
        self._metrics.finished.labels(reason.value).inc()
        self._metrics.generation_tokens.inc(num_sampled_tokens)


class LoopHistogram:
    """A histogram that can be afforded for every token and step: the package's takes two locks an observation.

    Observed on the event loop only.
    """

    def __init__(self, name: str, documentation: str, buckets: Sequence[float]) -> None:
        self._name = name
        self._documentation = documentation
        self._bounds = [*buckets, math.inf]
        self._counts = [0] * len(self._bounds)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count `value`."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def collect(self) -> Iterable[HistogramMetricFamily]:
        """Yield the counts so far."""
        bounds = map(floatToGoString, self._bounds)
        buckets = [*zip(bounds, accumulate(self._counts), strict=True)]
        yield HistogramMetricFamily(self._name, self._documentation, buckets=buckets, sum_value=self._sum)


class EngineTotals:
    """Totals that the engine counts: passed on as they are, so that a scrape sees what the engine said last."""

    def __init__(self) -> None:
        self.counters: dict[str, float] = {}

    def collect(self) -> Iterable[CounterMetricFamily]:
        """Yield one family for every declared name, zero until the engine has counted something."""
        for name, description in ENGINE_COUNTERS.items():
            yield CounterMetricFamily(name.removesuffix("_total"), description, value=self.counters.get(name, 0.0))
        for name, (description, label, values) in LABELLED_ENGINE_COUNTERS.items():
            family = CounterMetricFamily(name.removesuffix("_total"), description, labels=[label])
            for value in values:
                family.add_metric([value], self.counters.get(f"{name}:{value}", 0.0))
            yield family


class TurnMetrics:
    """What happens to turns. The turn protocol's observer."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.resumes = Counter(
            "rwkv_turn_resumes", "Turns by how their state was obtained.", ["kind"], registry=registry
        )
        self.replayed_tokens = Counter(
            "rwkv_replayed_tokens", "History tokens computed again for want of a state.", registry=registry
        )
        self.commits = Counter("rwkv_turn_commits", "Turns applied.", ["durability"], registry=registry)
        self.commit_seconds = Histogram(
            "rwkv_turn_commit_seconds", "To commit a turn in the ledger.", buckets=STATE_BUCKETS, registry=registry
        )
        self.refusals = Counter(
            "rwkv_turn_conflicts", "Turns not opened or not applied.", ["reason"], registry=registry
        )
        self.save_seconds = Histogram(
            "rwkv_state_save_seconds", "To write a checkpoint.", ["tier"], buckets=STATE_BUCKETS, registry=registry
        )
        self.save_bytes = Counter("rwkv_state_save_bytes", "Bytes of checkpoints written.", ["tier"], registry=registry)
        self.save_failures = Counter(
            "rwkv_checkpoint_failures", "Checkpoints not written or not pointed to.", ["reason"], registry=registry
        )

    def turn_resumed(self, kind: ResumeKind, num_replayed_tokens: int) -> None:
        """A turn has its state."""
        self.resumes.labels(kind.value).inc()
        self.replayed_tokens.inc(num_replayed_tokens)

    def turn_committed(self, durability: Durability, seconds: float) -> None:
        """A turn is in the ledger; the commit took `seconds`."""
        self.commits.labels(durability.value).inc()
        self.commit_seconds.observe(seconds)

    def turn_refused(self, reason: str) -> None:
        """A turn could not be opened or committed."""
        self.refusals.labels(reason).inc()

    def checkpoint_stored(self, stored: CheckpointStored) -> None:
        """A state was written."""
        self.save_seconds.labels(stored.tier).observe(stored.save_seconds)
        self.save_bytes.labels(stored.tier).inc(stored.ref.num_bytes)

    def checkpoint_failed(self, reason: str) -> None:
        """A state was not written, or not pointed to."""
        self.save_failures.labels(reason).inc()


class HttpMetrics:
    """What clients asked for and got."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.requests = Counter(
            "rwkv_http_requests", "Requests answered.", ["route", "method", "status"], registry=registry
        )
        self.request_seconds = Histogram(
            "rwkv_http_request_seconds",
            "From the request's head to the end of its answer.",
            ["route"],
            buckets=DURATION_BUCKETS,
            registry=registry,
        )
        self.in_flight = Gauge("rwkv_http_requests_in_flight", "Requests being answered.", registry=registry)
        self.streams = Gauge("rwkv_sse_streams", "Event streams open.", registry=registry)
        self.errors = Counter("rwkv_errors", "Errors told to clients, in streams too.", ["code"], registry=registry)
        self.rejections = Counter(
            "rwkv_admission_rejections", "Requests refused before they ran.", ["reason"], registry=registry
        )
        self.disconnects = Counter("rwkv_client_disconnects", "Clients that left before the end.", registry=registry)
        self.loop_lag_seconds = Histogram(
            "rwkv_event_loop_lag_seconds", "How late the event loop is.", buckets=STEP_BUCKETS, registry=registry
        )

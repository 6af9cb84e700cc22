"""Every declared metric with something in it, served as the server serves them: a stand-in without a model."""

from __future__ import annotations

import threading
from types import TracebackType
from wsgiref.simple_server import WSGIServer

from prometheus_client import start_http_server

from engine.messages import (
    CheckpointRef,
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
from server.metrics import ENGINE_COUNTERS, LABELLED_ENGINE_COUNTERS, Metrics

READY = EngineReady(
    fingerprint="f", generation="7", vocab_size=256, num_layers=2, width=64, num_parameters=1, state_bytes=2_000_000,
    device="cpu", dtype="float32", max_num_seqs=8, max_num_batched_tokens=64,
)  # fmt: skip


class Exporter:
    """Serves metrics that grow twice a second."""

    def __init__(self) -> None:
        self.metrics = Metrics("file")
        self._rounds = 0
        self._stopped = threading.Event()

    @property
    def target(self) -> str:
        """Where Prometheus finds it."""
        return f"127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Exporter:
        self._server: WSGIServer
        self._server, self._thread = start_http_server(0, "127.0.0.1", self.metrics.registry)
        self.metrics.engine.ready(READY, "stub", "0")
        self._feeder = threading.Thread(target=self._feed)
        self._feeder.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._feeder.join()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _feed(self) -> None:
        while True:
            self._rounds += 1
            feed_engine(self.metrics, self._rounds)
            feed_turns(self.metrics)
            feed_http(self.metrics)
            if self._stopped.wait(0.5):
                return


def feed_engine(metrics: Metrics, rounds: int) -> None:
    """Add a step and a sequence of each kind."""
    labelled = {f"{name}:{value}" for name, (*_, values) in LABELLED_ENGINE_COUNTERS.items() for value in values}
    counters = dict.fromkeys({*ENGINE_COUNTERS, *labelled}, float(rounds))
    stats = EngineStats(
        num_steps=rounds, num_running=2, num_waiting=1, num_slots_used=3, num_slots=17, num_hot_states=4,
        hot_state_bytes=8_000_000, pending_checkpoints=1, counters=counters,
    )  # fmt: skip
    step = StepStats(step_seconds=0.004, num_decode_tokens=2, num_prefill_tokens=30, num_sequences=3)
    metrics.engine.report(StepReport(step=step, stats=stats))
    for kind in ResumeKind:
        clock = metrics.engine.watch(12)
        clock.started(SequenceStarted(request_id="r", resume=kind, queue_seconds=0.001, load_seconds=0.002))
        clock.delivered()
        clock.delivered()
        clock.finished(FinishReason.STOP, 2)


def feed_turns(metrics: Metrics) -> None:
    """Add a turn of each kind and fate."""
    for kind in ResumeKind:
        metrics.turns.turn_resumed(kind, 5 if kind is ResumeKind.REPLAYED else 0)
    metrics.turns.turn_committed(Durability.FSYNCED, 0.002)
    metrics.turns.turn_refused("busy")
    ref = CheckpointRef(checkpoint_id="c", num_tokens=3, chain=b"", num_bytes=2_000_000)
    metrics.turns.checkpoint_stored(CheckpointStored(ref=ref, save_seconds=0.01, tier="file"))
    metrics.turns.checkpoint_failed("store_unavailable")


def feed_http(metrics: Metrics) -> None:
    """Add an answered, a refused, a failed and an abandoned request."""
    route = "/v1/chat/completions"
    for status in ("200", "500", "503"):
        metrics.http.requests.labels(route, "POST", status).inc()
        metrics.http.request_seconds.labels(route).observe(0.2)
    metrics.http.errors.labels("store_unavailable").inc()
    metrics.http.rejections.labels("queue_full").inc()
    metrics.http.disconnects.inc()
    metrics.http.loop_lag_seconds.observe(0.001)
    metrics.http.in_flight.set(2)
    metrics.http.streams.set(1)

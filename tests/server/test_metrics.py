"""Metrics: their names are an interface, their labels are few."""

from __future__ import annotations

import httpx
import pytest

from engine.messages import (
    CheckpointRef,
    CheckpointStored,
    EngineStats,
    FinishReason,
    ResumeKind,
    SequenceStarted,
    StepReport,
    StepStats,
)
from server.conversations.ledger import Durability
from server.metrics import Metrics

NAMES = [
    "rwkv_admission_rejections",
    "rwkv_batch_size",
    "rwkv_checkpoint_failures",
    "rwkv_checkpoints_missing",
    "rwkv_checkpoints_pending",
    "rwkv_checkpoints_rejected",
    "rwkv_checkpoints_unavailable",
    "rwkv_client_disconnects",
    "rwkv_decode_tokens",
    "rwkv_engine_errors",
    "rwkv_engine_restarts",
    "rwkv_engine_step_seconds",
    "rwkv_engine_steps",
    "rwkv_engine_up",
    "rwkv_errors",
    "rwkv_event_loop_lag_seconds",
    "rwkv_generation_tokens",
    "rwkv_hot_state_bytes",
    "rwkv_hot_state_evictions",
    "rwkv_hot_states",
    "rwkv_hot_states_dropped",
    "rwkv_http_request_seconds",
    "rwkv_http_requests",
    "rwkv_http_requests_in_flight",
    "rwkv_inter_token_latency_seconds",
    "rwkv_model",
    "rwkv_numerical_errors",
    "rwkv_prefill_tokens",
    "rwkv_prefix_lookups",
    "rwkv_prefix_misses",
    "rwkv_prefix_states_not_written",
    "rwkv_prefix_states_written",
    "rwkv_prefix_tokens_reused",
    "rwkv_prompt_tokens",
    "rwkv_queue_seconds",
    "rwkv_replayed_tokens",
    "rwkv_sequences_finished",
    "rwkv_sequences_running",
    "rwkv_sequences_waiting",
    "rwkv_settled_tokens",
    "rwkv_snapshots_missed",
    "rwkv_sse_streams",
    "rwkv_state_bytes",
    "rwkv_state_load_bytes",
    "rwkv_state_load_seconds",
    "rwkv_state_rebuilds",
    "rwkv_state_save_bytes",
    "rwkv_state_save_seconds",
    "rwkv_state_slots",
    "rwkv_states_lost",
    "rwkv_states_unavailable",
    "rwkv_step_tokens",
    "rwkv_stop_bytes_lost",
    "rwkv_time_to_first_token_seconds",
    "rwkv_turn_commit_seconds",
    "rwkv_turn_commits",
    "rwkv_turn_conflicts",
    "rwkv_turn_resumes",
]


def test_no_metric_comes_or_goes_unnoticed() -> None:
    """Dashboards and alerts rest on these names."""
    names = {family.name for family in Metrics().registry.collect()}
    assert sorted(name for name in names if not name.startswith("rwkv_process_")) == NAMES


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    """Return a sample."""
    return metrics.registry.get_sample_value(name, labels)


def test_a_report_becomes_numbers() -> None:
    """Steps, batch, slots, and the engine's own totals."""
    metrics = Metrics()
    step = StepStats(step_seconds=0.0021, num_decode_tokens=2, num_prefill_tokens=30, num_sequences=3)
    totals = {
        "rwkv_decode_tokens_total": 11.0,
        "rwkv_prefix_misses_total:evicted": 5.0,
        "rwkv_never_declared_total": 1.0,
    }
    stats = EngineStats(
        num_steps=7,
        num_running=2,
        num_waiting=3,
        num_slots_used=2,
        num_slots=9,
        num_hot_states=4,
        hot_state_bytes=4096,
        pending_checkpoints=1,
        counters=totals,
    )
    metrics.engine.report(StepReport(step=step, stats=stats))
    assert value(metrics, "rwkv_engine_step_seconds_bucket", le="0.002") == 0
    assert value(metrics, "rwkv_engine_step_seconds_bucket", le="0.003") == 1
    assert value(metrics, "rwkv_batch_size_sum") == 3
    assert value(metrics, "rwkv_step_tokens_sum") == 32
    assert value(metrics, "rwkv_state_slots", status="free") == 7
    assert value(metrics, "rwkv_engine_steps_total") == 7
    assert value(metrics, "rwkv_decode_tokens_total") == 11
    assert value(metrics, "rwkv_never_declared_total") is None
    assert value(metrics, "rwkv_prefix_misses_total", reason="evicted") == 5
    assert value(metrics, "rwkv_prefix_misses_total", reason="new") == 0


def test_a_sequence_is_timed_from_its_submission() -> None:
    """The first delivery is the time to first token, the others are gaps; a checkpoint load has its tier."""
    metrics = Metrics(state_tier="redis")
    clock = metrics.engine.watch(num_prompt_tokens=5)
    clock.started(SequenceStarted(request_id="r", resume=ResumeKind.RESTORED, queue_seconds=0.2, load_seconds=0.03))
    for _ in range(3):
        clock.delivered()
    clock.finished(FinishReason.STOP, num_sampled_tokens=4)
    assert value(metrics, "rwkv_prompt_tokens_total") == 5
    assert value(metrics, "rwkv_queue_seconds_sum") == 0.2
    assert value(metrics, "rwkv_state_load_seconds_sum", tier="redis") == 0.03
    assert value(metrics, "rwkv_time_to_first_token_seconds_count", resume="restored") == 1
    assert value(metrics, "rwkv_inter_token_latency_seconds_count") == 2
    assert value(metrics, "rwkv_generation_tokens_total") == 4
    assert value(metrics, "rwkv_sequences_finished_total", reason="stop") == 1


def test_turns_are_counted_by_what_became_of_them() -> None:
    """Resumes by kind, commits by durability, refusals by reason, checkpoints by tier."""
    turns = (metrics := Metrics()).turns
    turns.turn_resumed(ResumeKind.REPLAYED, 40)
    turns.turn_committed(Durability.FSYNCED, 0.004)
    turns.turn_refused("busy")
    ref = CheckpointRef(checkpoint_id="x", num_tokens=1, chain=b"", num_bytes=2048)
    turns.checkpoint_stored(CheckpointStored(ref=ref, save_seconds=0.01, tier="file"))
    turns.checkpoint_failed("StoreUnavailable")
    assert value(metrics, "rwkv_turn_resumes_total", kind="replayed") == 1
    assert value(metrics, "rwkv_replayed_tokens_total") == 40
    assert value(metrics, "rwkv_turn_commits_total", durability="fsynced") == 1
    assert value(metrics, "rwkv_turn_conflicts_total", reason="busy") == 1
    assert value(metrics, "rwkv_state_save_bytes_total", tier="file") == 2048
    assert value(metrics, "rwkv_checkpoint_failures_total", reason="StoreUnavailable") == 1


def test_two_servers_in_one_process_count_apart() -> None:
    """Each has a registry of its own."""
    one, other = Metrics(), Metrics()
    one.turns.turn_refused("busy")
    assert value(one, "rwkv_turn_conflicts_total", reason="busy") == 1
    assert value(other, "rwkv_turn_conflicts_total", reason="busy") is None


@pytest.mark.parametrize("path", ["/v1/conversations/pr1vate-id", "/pr1vate-id", "/v1/models/pr1vate-id"])
def test_what_clients_invent_is_no_label(http: httpx.Client, path: str) -> None:
    """Routes are counted by their pattern."""
    http.get(path)
    http.request("PR1VATE", path)
    text = http.get("/metrics").text
    assert "pr1vate" not in text.lower()
    assert 'route="unmatched"' in text or "{" in text


def test_a_turn_leaves_its_numbers(http: httpx.Client) -> None:
    """What a request did can be read from /metrics afterwards."""
    body = {"prompt": "abc", "max_tokens": 3, "conversation_id": "pr1vate-conversation"}
    assert http.post("/v1/completions", json=body).status_code == 200
    scrape = http.get("/metrics")
    assert scrape.headers["content-type"].startswith("text/plain")
    assert 'rwkv_turn_commits_total{durability="fsynced"}' in scrape.text
    assert 'rwkv_http_requests_total{method="POST",route="/v1/completions",status="200"}' in scrape.text
    assert "pr1vate" not in scrape.text

"""Every alert fires when it should, and only then: promtool plays each story through the real rules."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT

RULES = ROOT / "deploy" / "prometheus" / "alerts.yml"
LABELS = 'job="sostenuto",instance="a:8000"'
STEPS = 90  # of 30 s: longer than every `for`, and than what each window needs

# A server with nothing to complain about: series and what they add in 30 s, or, after "=", their values.
HEALTHY = {
    "up": "=1",
    "rwkv_engine_up": "=1",
    "rwkv_sequences_running": "=3",
    "rwkv_sequences_waiting": "=0 5",
    "rwkv_engine_steps_total": "900",
    'rwkv_time_to_first_token_seconds_bucket{resume="hot",le="1.0"}': "998",
    'rwkv_time_to_first_token_seconds_count{resume="hot"}': "1000",
    'rwkv_inter_token_latency_seconds_bucket{le="0.1"}': "998",
    "rwkv_inter_token_latency_seconds_count": "1000",
    'rwkv_event_loop_lag_seconds_bucket{le="0.01"}': "1000",
    'rwkv_event_loop_lag_seconds_bucket{le="0.05"}': "1000",
    'rwkv_event_loop_lag_seconds_bucket{le="0.25"}': "1000",
    'rwkv_event_loop_lag_seconds_bucket{le="+Inf"}': "1000",
    'rwkv_http_requests_total{route="/v1/completions",status="200"}': "1000",
    'rwkv_http_requests_total{route="/v1/completions",status="500"}': "1",
    'rwkv_http_requests_total{route="/health",status="503"}': "900",
    'rwkv_errors_total{code="store_unavailable"}': "0",
    'rwkv_admission_rejections_total{reason="queue_full"}': "1",
    'rwkv_admission_rejections_total{reason="rate_limit_exceeded"}': "1",
    'rwkv_turn_conflicts_total{reason="busy"}': "1",
    'rwkv_turn_commits_total{durability="fsynced"}': "500",
    'rwkv_turn_resumes_total{kind="hot"}': "480",
    'rwkv_turn_resumes_total{kind="replayed"}': "5",
    'rwkv_turn_resumes_total{kind="new"}': "15",
    'rwkv_checkpoint_failures_total{reason="store_unavailable"}': "0",
    "rwkv_checkpoints_pending": "=0 4",
    "rwkv_checkpoints_rejected_total": "0",
    "rwkv_numerical_errors_total": "0",
    "rwkv_engine_errors_total": "0",
    "rwkv_engine_restarts": "=2",
    "rwkv_checkpoints_unavailable_total": "0",
}
TTFT, ITL = (
    f"rwkv_{name}_seconds_bucket{{{labels}}}"
    for name, labels in (
        ("time_to_first_token", 'resume="hot",le="1.0"'),
        ("inter_token_latency", 'le="0.1"'),
    )
)
STORIES: dict[str, tuple[dict[str, str | None], set[str]]] = {
    "all is well": ({}, set()),
    "nobody asks for anything": (
        {name: "0" for name, value in HEALTHY.items() if not value.startswith("=")} | {"rwkv_sequences_running": "=0"},
        set(),
    ),
    "first tokens are very late": ({TTFT: "800"}, {"FirstTokensLateFast", "FirstTokensLateSlow"}),
    "first tokens are somewhat late": ({TTFT: "920"}, {"FirstTokensLateSlow"}),
    "tokens are very late": ({ITL: "800"}, {"TokensLateFast", "TokensLateSlow"}),
    "tokens are somewhat late": ({ITL: "920"}, {"TokensLateSlow"}),
    "the event loop lags": (
        {f'rwkv_event_loop_lag_seconds_bucket{{le="{border}"}}': "900" for border in ("0.01", "0.05")},
        {"EventLoopLate"},
    ),
    "sequences wait without a break": ({"rwkv_sequences_waiting": "=2 5"}, {"SequencesWaiting"}),
    "requests are turned away": ({'rwkv_admission_rejections_total{reason="queue_full"}': "50"}, {"RequestsRejected"}),
    "a tenant asks beyond its limits": ({'rwkv_admission_rejections_total{reason="rate_limit_exceeded"}': "50"}, set()),
    "turns collide": (
        {'rwkv_turn_conflicts_total{reason="busy"}': "100"},
        {"ConversationsContended"},
    ),
    "states are recomputed": ({'rwkv_turn_resumes_total{kind="replayed"}': "100"}, {"StatesReplayed"}),
    "states cannot be written": (
        {'rwkv_checkpoint_failures_total{reason="store_unavailable"}': "1"},
        {"StateStoreFailing"},
    ),
    "the writer falls behind": ({"rwkv_checkpoints_pending": "=3 9"}, {"StateWritesBehind"}),
    "a stored state is damaged": ({"rwkv_checkpoints_rejected_total": "1"}, {"CheckpointsDamaged"}),
    "the server does not answer": ({"up": "=0"}, {"ServerDown"}),
    "no server is known": ({"up": None}, {"ServerDown"}),
    "the engine is gone": ({"rwkv_engine_up": "=0"}, {"EngineDown"}),
    "the engine was replaced": ({"rwkv_engine_restarts": "=2 3"}, {"EngineReplaced"}),
    "the device fails": ({"rwkv_engine_errors_total": "1"}, {"EngineErrors"}),
    "states cannot be read": ({"rwkv_checkpoints_unavailable_total": "1"}, {"StateStoreSilent"}),
    "the engine makes no step": ({"rwkv_engine_steps_total": "0"}, {"EngineStuck"}),
    "requests fail": ({'rwkv_http_requests_total{route="/v1/completions",status="500"}': "50"}, {"RequestsFailing"}),
    "the ledger is away": ({'rwkv_errors_total{code="store_unavailable"}': "3"}, {"LedgerUnavailable"}),
    "a value is not a number": ({"rwkv_numerical_errors_total": "1"}, {"NumericalErrors"}),
}


def series(story: dict[str, str | None]) -> list[dict[str, str]]:
    """Return `story` over the healthy server as promtool's input series."""
    return [
        {"series": with_labels(name), "values": values(value)}
        for name, value in (HEALTHY | story).items()
        if value is not None
    ]


def with_labels(name: str) -> str:
    """Return the series `name` with the labels that Prometheus adds."""
    bare, _, labels = name.partition("{")
    return f"{bare}{{{','.join(filter(None, (LABELS, labels.rstrip('}'))))}}}"


def values(value: str) -> str:
    """Return promtool's notation for `value`."""
    if value.startswith("="):
        return " ".join((value[1:].split() * STEPS)[:STEPS])
    return f"0+{value}x{STEPS}"


@pytest.fixture(scope="module")
def promtool() -> str:
    """The path of Prometheus' own checker."""
    path = shutil.which("promtool")
    assert path is not None, "promtool is not on the PATH: run `make test`, which installs prometheus"
    return path


@pytest.mark.parametrize("title", STORIES)
def test_the_right_alerts_fire(title: str, promtool: str, tmp_path: Path) -> None:
    """A story makes exactly its alerts fire: none is missed, none cries wolf."""
    story, alerts = STORIES[title]
    expected = [{"labels": f'{{alertname="{alert}"}}', "value": 1} for alert in sorted(alerts)]
    test = {
        "interval": "30s",
        "input_series": series(story),
        "promql_expr_test": [
            {
                "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
                "eval_time": "40m",
                "exp_samples": expected,
            }
        ],
    }
    file = tmp_path / "story.yml"
    file.write_text(yaml.safe_dump({"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": [test]}))
    result = subprocess.run([promtool, "test", "rules", str(file)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_alert_has_a_story() -> None:
    """No alert is untested, and no story is about an alert that does not exist."""
    told = set().union(*(alerts for _, alerts in STORIES.values()))
    assert told == {rule["alert"] for rule in alert_rules()}


def test_every_alert_says_what_to_do() -> None:
    """Each has a severity that somebody acts on, a one-line summary and a runbook."""
    for rule in alert_rules():
        assert rule["labels"]["severity"] in {"page", "ticket"}
        assert "\n" not in rule["annotations"]["summary"]
        assert len(rule["annotations"]["runbook"]) > 30


def test_the_configuration_is_valid(promtool: str) -> None:
    """Prometheus accepts the configuration and the rules it names, without a warning."""
    config = ROOT / "deploy" / "prometheus" / "prometheus.yml"
    for command in (["check", "config", str(config)], ["check", "rules", "--lint-fatal", str(RULES)]):
        result = subprocess.run([promtool, *command], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout + result.stderr


def alert_rules() -> list[dict[str, dict[str, str]]]:
    """Return all alerting rules."""
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"] if "alert" in rule]

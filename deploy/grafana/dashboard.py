"""The dashboard, as code: `python deploy/grafana/dashboard.py` writes `dashboards/sostenuto.json`.

Grafana's JSON is a page per panel and says most things twice; this says each once. A test checks that the two agree and
runs every query through Prometheus.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

OUTPUT = Path(__file__).with_name("dashboards") / "sostenuto.json"
GRID_COLUMNS = 24
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}

Json = dict[str, Any]


# -- queries -----------------------------------------------------------------------------------------------------------


def series(name: str, labels: str = "") -> str:
    """Return the selector of a metric on the servers that are looked at."""
    matchers = 'instance=~"$instance"' + (f", {labels}" if labels else "")
    return f"{name}{{{matchers}}}"


def rate(name: str, by: str = "", labels: str = "") -> str:
    """Return how much a counter adds a second, over all servers, told apart by the labels `by`."""
    return f"sum{_by(by)} (rate({series(name, labels)}[$__rate_interval]))"


def quantile(rank: float, name: str, by: str = "") -> str:
    """Return a quantile of a histogram over all servers."""
    buckets = rate(f"{name}_bucket", f"le, {by}" if by else "le")
    return f"histogram_quantile({rank}, {buckets})"


def mean(name: str) -> str:
    """Return the mean of a histogram over all servers."""
    return f"{rate(name + '_sum')} / {rate(name + '_count')}"


def share(part: str, whole: str) -> str:
    """Return `part`, or zero, of `whole`; nothing, rather than not-a-number, where there is no whole."""
    return f"({part} or vector(0)) / ({whole} > 0)"


def total(name: str, by: str = "", labels: str = "") -> str:
    """Return a gauge, added over all servers."""
    return f"sum{_by(by)} ({series(name, labels)})"


def _by(labels: str) -> str:
    return f" by ({labels})" if labels else ""


def quantiles(name: str) -> dict[str, str]:
    """Return the usual quantiles of a histogram, by their names."""
    return {f"p{round(rank * 100)}": quantile(rank, name) for rank in (0.5, 0.9, 0.99)}


# -- panels ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Panel:
    """One graph or number. `queries` maps legends, which may use `{{label}}`, to expressions."""

    title: str
    queries: dict[str, str]
    unit: str = "short"
    kind: str = "timeseries"
    width: int = 8
    height: int = 8
    description: str = ""
    stacked: bool = False
    steps: list[tuple[float | None, str]] = field(default_factory=lambda: [(None, "green")])

    def as_json(self, number: int, column: int, row: int) -> Json:
        """Return the panel as Grafana wants it, at a place on the grid."""
        panel: Json = {
            "id": number,
            "type": self.kind,
            "title": self.title,
            "description": self.description,
            "datasource": DATASOURCE,
            "gridPos": {"h": self.height, "w": self.width, "x": column, "y": row},
            "targets": [
                {"refId": chr(ord("A") + idx), "datasource": DATASOURCE, "expr": expression, "legendFormat": legend}
                for idx, (legend, expression) in enumerate(self.queries.items())
            ],
        }
        return panel | {"timeseries": self._timeseries, "stat": self._stat, "heatmap": self._heatmap}[self.kind]()

    def _timeseries(self) -> Json:
        custom = {
            "lineWidth": 1,
            "fillOpacity": 25 if self.stacked else 8,
            "showPoints": "never",
            "spanNulls": False,
            "stacking": {"mode": "normal" if self.stacked else "none", "group": "A"},
        }
        return {
            "fieldConfig": {"defaults": {"unit": self.unit, "min": 0, "custom": custom}, "overrides": []},
            "options": {
                "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
                "tooltip": {"mode": "multi", "sort": "desc"},
            },
        }

    def _stat(self) -> Json:
        steps = [{"value": value, "color": color} for value, color in self.steps]
        return {
            "fieldConfig": {
                "defaults": {"unit": self.unit, "noValue": "-", "thresholds": {"mode": "absolute", "steps": steps}},
                "overrides": [],
            },
            "options": {
                "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
                "colorMode": "value",
                "graphMode": "area",
                "textMode": "value",
            },
        }

    def _heatmap(self) -> Json:
        for_target = {"format": "heatmap", "legendFormat": "{{le}}"}
        (expression,) = self.queries.values()
        return {
            "targets": [{"refId": "A", "datasource": DATASOURCE, "expr": expression, **for_target}],
            "options": {
                "calculate": False,
                "yAxis": {"unit": self.unit},
                "color": {"mode": "scheme", "scheme": "Spectral", "steps": 64, "exponent": 0.5, "reverse": True},
                "cellGap": 1,
                "legend": {"show": True},
                "tooltip": {"mode": "single", "yHistogram": True},
            },
        }


def number(title: str, expression: str, unit: str = "short", *steps: tuple[float | None, str], width: int = 3) -> Panel:
    """Return a panel that shows one number, coloured by the last of `steps` that it reaches."""
    colors = list(steps) or [(None, "text")]
    return Panel(title, {"": expression}, unit, "stat", width=width, height=4, steps=colors)


TTFT = "rwkv_time_to_first_token_seconds"
ITL = "rwkv_inter_token_latency_seconds"
STEP = "rwkv_engine_step_seconds"
REQUESTS = "rwkv_http_requests_total"
RESUMES = "rwkv_turn_resumes_total"
ASKED = 'route!~"/health|/metrics"'  # probes and scrapes are nobody's requests
FAILED_SHARE = share(rate(REQUESTS, labels=f'{ASKED}, status=~"5.."'), rate(REQUESTS, labels=ASKED))
REPLAYED_SHARE = share(rate(RESUMES, labels='kind="replayed"'), rate(RESUMES, labels='kind!="new"'))

ROWS: dict[str, list[Panel]] = {
    "Overview": [
        number("Servers with an engine", total("rwkv_engine_up"), "short", (None, "red"), (1, "green")),
        number("Sequences running", total("rwkv_sequences_running")),
        number("Sequences waiting", total("rwkv_sequences_waiting"), "short", (None, "green"), (1, "orange")),
        number("Tokens a second", rate("rwkv_generation_tokens_total"), "short"),
        number("First token, p99", quantile(0.99, TTFT), "s", (None, "green"), (1, "orange"), (5, "red")),
        number("Between tokens, p99", quantile(0.99, ITL), "s", (None, "green"), (0.1, "orange"), (0.5, "red")),
        number("Requests that failed", FAILED_SHARE, "percentunit", (None, "green"), (0.001, "orange"), (0.01, "red")),
        number("States in memory", total("rwkv_hot_states")),
    ],
    "Latency": [
        Panel(
            "Time to first token", quantiles(TTFT), "s", description="From the request to the first token delivered."
        ),
        Panel(
            "Time to first token, p99 by resume",
            {"{{resume}}": quantile(0.99, TTFT, "resume")},
            "s",
            description="hot: state in memory; restored: loaded from a checkpoint; replayed: computed again.",
        ),
        Panel(
            "Time to first token, spread",
            {"": rate(f"{TTFT}_bucket", "le")},
            "s",
            "heatmap",
        ),
        Panel("Between tokens", quantiles(ITL), "s", description="Between two deliveries of one sequence."),
        Panel("Wait for a slot", quantiles("rwkv_queue_seconds"), "s"),
        Panel("Between tokens, spread", {"": rate(f"{ITL}_bucket", "le")}, "s", "heatmap"),
    ],
    "Throughput": [
        Panel(
            "Tokens a second",
            {
                "generated": rate("rwkv_generation_tokens_total"),
                "prompts": rate("rwkv_prompt_tokens_total"),
                "replayed": rate("rwkv_replayed_tokens_total"),
            },
        ),
        Panel(
            "Tokens consumed by the engine",
            {
                "prefill": rate("rwkv_prefill_tokens_total"),
                "decode": rate("rwkv_decode_tokens_total"),
                "settling": rate("rwkv_settled_tokens_total"),
            },
            stacked=True,
            description="Settling: the last delivered tokens, consumed after the end so that the state includes them.",
        ),
        Panel(
            "Sequences ended", {"{{reason}}": rate("rwkv_sequences_finished_total", "reason")}, "reqps", stacked=True
        ),
    ],
    "Engine": [
        Panel("Step", quantiles(STEP), "s", width=6, description="Independent of how long the histories are."),
        Panel("Steps a second", {"steps": rate("rwkv_engine_steps_total")}, width=6),
        Panel(
            "Sequences in a step",
            {"mean": mean("rwkv_batch_size"), "p99": quantile(0.99, "rwkv_batch_size")},
            width=6,
        ),
        Panel(
            "Tokens in a step",
            {"mean": mean("rwkv_step_tokens"), "p99": quantile(0.99, "rwkv_step_tokens")},
            width=6,
        ),
        Panel(
            "Sequences",
            {"running": total("rwkv_sequences_running"), "waiting": total("rwkv_sequences_waiting")},
        ),
        Panel("Slots of the state pool", {"{{status}}": total("rwkv_state_slots", "status")}, stacked=True),
        Panel(
            "Trouble",
            {
                "device failed": rate("rwkv_engine_errors_total"),
                "not a number": rate("rwkv_numerical_errors_total"),
                "engine replaced": f"sum (changes({series('rwkv_engine_restarts')}[$__rate_interval]))",
                "no spare slot for a stop string": rate("rwkv_snapshots_missed_total"),
                "bytes before a stop string lost": rate("rwkv_stop_bytes_lost_total"),
            },
            "ops",
        ),
    ],
    "Conversations": [
        Panel(
            "Turns, by where their state came from",
            {"{{kind}}": rate(RESUMES, "kind")},
            "reqps",
            stacked=True,
        ),
        Panel(
            "Continued turns that recompute their state",
            {"replayed": REPLAYED_SHARE},
            "percentunit",
        ),
        Panel(
            "Turns committed", {"{{durability}}": rate("rwkv_turn_commits_total", "durability")}, "reqps", stacked=True
        ),
        Panel("Commit", quantiles("rwkv_turn_commit_seconds"), "s", width=12),
        Panel("Turns refused", {"{{reason}}": rate("rwkv_turn_conflicts_total", "reason")}, "reqps", width=12),
    ],
    "Prompts that begin alike": [
        Panel(
            "Looks for a state, by outcome",
            {"{{outcome}}": rate("rwkv_prefix_lookups_total", "outcome")},
            "reqps",
            width=6,
            stacked=True,
            description="Of prompts without a conversation, and of first turns that begin with a system prompt.",
        ),
        Panel(
            "Misses, by reason",
            {"{{reason}}": rate("rwkv_prefix_misses_total", "reason")},
            "reqps",
            width=6,
            stacked=True,
            description="evicted: its memory was needed; not_kept: it came before, but left no state.",
        ),
        Panel(
            "Prompt tokens",
            {
                "not computed": rate("rwkv_prefix_tokens_reused_total"),
                "computed": rate("rwkv_prefill_tokens_total"),
            },
            width=6,
            stacked=True,
        ),
        Panel(
            "States written to the store",
            {
                "written": rate("rwkv_prefix_states_written_total"),
                "not taken": rate("rwkv_prefix_states_not_written_total"),
            },
            "ops",
            width=6,
        ),
    ],
    "States": [
        Panel(
            "Load",
            {f"{{{{tier}}}} p{rank}": quantile(rank / 100, "rwkv_state_load_seconds", "tier") for rank in (50, 99)},
            "s",
        ),
        Panel(
            "Save",
            {f"{{{{tier}}}} p{rank}": quantile(rank / 100, "rwkv_state_save_seconds", "tier") for rank in (50, 99)},
            "s",
        ),
        Panel(
            "Bytes moved",
            {
                "saved to {{tier}}": rate("rwkv_state_save_bytes_total", "tier"),
                "loaded": rate("rwkv_state_load_bytes_total"),
            },
            "Bps",
        ),
        Panel(
            "Checkpoints that did not serve",
            {
                "not written: {{reason}}": rate("rwkv_checkpoint_failures_total", "reason"),
                "damaged or of another model": rate("rwkv_checkpoints_rejected_total"),
                "missing": rate("rwkv_checkpoints_missing_total"),
                "not delivered by the store": rate("rwkv_checkpoints_unavailable_total"),
            },
            "ops",
        ),
        Panel(
            "States that left memory",
            {
                "to make room": rate("rwkv_hot_state_evictions_total"),
                "too large": rate("rwkv_hot_states_dropped_total"),
                "not kept at the end": rate("rwkv_states_lost_total"),
                "built again for a stop string": rate("rwkv_state_rebuilds_total"),
                "could not be had": rate("rwkv_states_unavailable_total"),
            },
            "ops",
        ),
        Panel("States waiting to be written", {"{{instance}}": series("rwkv_checkpoints_pending")}),
        Panel("States held in memory", {"bytes": total("rwkv_hot_state_bytes")}, "bytes", width=12),
        Panel("Size of one state", {"bytes": f"max ({series('rwkv_state_bytes')})"}, "bytes", width=12),
    ],
    "HTTP": [
        Panel("Requests", {"{{route}} {{status}}": rate(REQUESTS, "route, status", ASKED)}, "reqps", stacked=True),
        Panel("Duration, p99", {"{{route}}": quantile(0.99, "rwkv_http_request_seconds", "route")}, "s"),
        Panel("Errors told to clients", {"{{code}}": rate("rwkv_errors_total", "code")}, "ops", stacked=True),
        Panel(
            "Open",
            {"requests": total("rwkv_http_requests_in_flight"), "streams": total("rwkv_sse_streams")},
            width=6,
        ),
        Panel(
            "Turned away and gone",
            {
                "rejected: {{reason}}": rate("rwkv_admission_rejections_total", "reason"),
                "client left": rate("rwkv_client_disconnects_total"),
            },
            "ops",
            width=6,
        ),
        Panel("Event loop lag", quantiles("rwkv_event_loop_lag_seconds"), "s", width=6),
        Panel(
            "API process",
            {
                "cores {{instance}}": f"rate({series('rwkv_process_cpu_seconds_total')}[$__rate_interval])",
                "GB {{instance}}": f"{series('rwkv_process_resident_memory_bytes')} / 1e9",
            },
            width=6,
        ),
    ],
}


# -- the page ----------------------------------------------------------------------------------------------------------


def dashboard() -> Json:
    """Return the whole dashboard as Grafana's JSON."""
    panels: list[Json] = []
    top = 0
    for title, row in ROWS.items():
        place = {"h": 1, "w": GRID_COLUMNS, "x": 0, "y": top}
        panels.append(
            {"id": len(panels) + 1, "type": "row", "title": title, "collapsed": False, "gridPos": place, "panels": []}
        )
        top += 1
        column = 0
        for panel in row:
            if column + panel.width > GRID_COLUMNS:
                column, top = 0, top + panel.height
            panels.append(panel.as_json(len(panels) + 1, column, top))
            column += panel.width
        top += row[-1].height
    return {
        "uid": "sostenuto",
        "title": "Sostenuto",
        "description": "Conversations with recurrent models: latency, throughput, states.",
        "tags": ["sostenuto", "rwkv"],
        "schemaVersion": 39,
        "editable": False,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {"list": [_datasource_variable(), _instance_variable()]},
        "panels": panels,
    }


def _datasource_variable() -> Json:
    return {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus", "hide": 0}


def _instance_variable() -> Json:
    query = "label_values(rwkv_engine_up, instance)"
    return {
        "name": "instance",
        "label": "Server",
        "type": "query",
        "datasource": DATASOURCE,
        "definition": query,
        "query": {"query": query, "refId": "instances"},
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".+",
        "current": {"text": "All", "value": "$__all"},
    }


def main() -> None:
    """Write the dashboard where Grafana finds it."""
    OUTPUT.parent.mkdir(exist_ok=True)
    OUTPUT.write_text(json.dumps(dashboard(), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

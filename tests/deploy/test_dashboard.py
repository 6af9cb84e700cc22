"""The dashboard and the alerts ask for what the server declares, and a real Prometheus understands every question."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from deploy.grafana.dashboard import OUTPUT, dashboard
from server.metrics import Metrics
from tests.conftest import ROOT
from tests.deploy.exporter import Exporter
from tests.deploy.prometheus_server import PrometheusServer
from tests.deploy.queries import dashboard_queries, rule_expressions

# Told elsewhere than on the dashboard: labels for people, and what process metrics mean is known.
NOT_SHOWN = {"rwkv_model", "rwkv_numerical_errors"}


def names_in(expressions: dict[str, str]) -> set[str]:
    """Return the metrics that `expressions` mention, a histogram's parts as the histogram."""
    found = set(re.findall(r"\brwkv_\w+", " ".join(expressions.values())))
    return {re.sub(r"_(bucket|sum|count|total|info)$", "", name) for name in found}


def declared_names() -> set[str]:
    """Return the names of all metrics the server declares."""
    return {family.name for family in Metrics().registry.collect()}


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrometheusServer]:
    """A Prometheus that has watched every metric grow for a few seconds."""
    with (
        Exporter() as exporter,
        PrometheusServer(tmp_path_factory.mktemp("prometheus"), exporter.target) as server,
    ):
        server.wait_for_scrapes(5)
        yield server


def test_the_committed_dashboard_is_the_generated_one() -> None:
    """`python deploy/grafana/dashboard.py` would change nothing."""
    assert json.loads(OUTPUT.read_text()) == dashboard(), "run: python deploy/grafana/dashboard.py"


def test_only_declared_metrics_are_asked_for() -> None:
    """A misspelt or renamed metric is found here, not as an empty panel or a silent alert."""
    assert names_in(dashboard_queries() | rule_expressions()) - declared_names() == set()


def test_every_declared_metric_is_shown() -> None:
    """No metric is collected for nobody."""
    ours = {name for name in declared_names() if not name.startswith("rwkv_process_")}
    assert ours - names_in(dashboard_queries()) == NOT_SHOWN


@pytest.mark.parametrize("panel", dashboard_queries())
def test_every_panel_shows_data(prometheus: PrometheusServer, panel: str) -> None:
    """Prometheus answers each query without an error, with numbers, once the server has something to say."""
    samples = prometheus.query(dashboard_queries()[panel])
    assert samples
    assert not all(math.isnan(float(sample["value"][1])) for sample in samples)


def test_every_rule_is_evaluated(prometheus: PrometheusServer) -> None:
    """All rules of the file are loaded and healthy, and none complains."""
    rules = prometheus.rules()
    assert {rule["name"] for rule in rules} == set(rule_expressions())
    assert [(rule["name"], rule.get("lastError")) for rule in rules if rule["health"] != "ok"] == []


def test_panels_lie_beside_each_other() -> None:
    """No two panels overlap, none leaves the grid, and each has a number of its own."""
    panels = dashboard()["panels"]
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24, panel["title"]
        taken |= cells
    assert len({panel["id"] for panel in panels}) == len(panels)


def test_grafana_finds_what_it_is_given() -> None:
    """The provisioned paths and names are those that docker-compose.yml mounts and the dashboard asks for."""
    provisioning = ROOT / "deploy" / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())["datasources"]
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "sostenuto.yml").read_text())["providers"]
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    mounts = dict(volume.split(":")[:2] for volume in services["grafana"]["volumes"])
    assert mounts["./deploy/grafana/dashboards"] == provider["options"]["path"]
    assert mounts["./deploy/grafana/provisioning"] == "/etc/grafana/provisioning"
    assert source["url"] == "http://prometheus:9090"
    assert "prometheus" in services
    assert Path(OUTPUT).is_relative_to(ROOT / "deploy" / "grafana" / "dashboards")

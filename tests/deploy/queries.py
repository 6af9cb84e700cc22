"""Every question that the dashboard and the rules ask Prometheus."""

from __future__ import annotations

from typing import Any

import yaml

from deploy.grafana.dashboard import dashboard
from tests.conftest import ROOT

ALERTS = ROOT / "deploy" / "prometheus" / "alerts.yml"


def dashboard_queries() -> dict[str, str]:
    """Return every query of the dashboard by panel and letter, Grafana's variables filled in."""
    return {
        f"{panel['title']} {target['refId']}": fill_in(target["expr"])
        for panel in dashboard()["panels"]
        for target in panel.get("targets", [])
    }


def fill_in(expression: str) -> str:
    """Return `expression` as Grafana sends it when all servers are selected."""
    return expression.replace("$instance", ".+").replace("$__rate_interval", "5s")


def rule_expressions() -> dict[str, str]:
    """Return the expression of every alert and recording rule by its name."""
    rules: list[dict[str, Any]] = [
        rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]
    ]
    return {rule.get("alert") or rule["record"]: rule["expr"] for rule in rules}

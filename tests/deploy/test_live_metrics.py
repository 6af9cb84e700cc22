"""The dashboard over a real server with a real model, while real conversations run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from loadtest.__main__ import main as loadtest
from tests.deploy.prometheus_server import PrometheusServer
from tests.deploy.queries import dashboard_queries, rule_expressions
from tests.server_process import ServerProcess

# What any working server shows; the other panels are about failures, Redis, or states that left memory.
CORE_PANELS = (
    "Servers with an engine A",
    "Sequences running A",
    "Tokens a second A",
    "Tokens a second B",
    "Time to first token A",
    "Time to first token, p99 by resume A",
    "Time to first token, spread A",
    "Between tokens A",
    "Wait for a slot A",
    "Tokens consumed by the engine A",
    "Tokens consumed by the engine B",
    "Sequences ended A",
    "Step A",
    "Steps a second A",
    "Sequences in a step A",
    "Tokens in a step A",
    "Slots of the state pool A",
    "Turns, by where their state came from A",
    "Turns committed A",
    "Commit A",
    "Save A",
    "Bytes moved A",
    "States held in memory A",
    "Size of one state A",
    "Requests A",
    "Duration, p99 A",
    "Event loop lag A",
    "API process A",
)


@pytest.fixture(scope="module")
def watched(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrometheusServer]:
    """A Prometheus that watched a server hold some conversations."""
    directory = tmp_path_factory.mktemp("live")
    with (
        ServerProcess(tiny_model, directory / "data", "--num-threads", "1") as server,
        PrometheusServer(directory, f"127.0.0.1:{server.port}") as prometheus,
    ):
        talk = ["--users", "3", "--turns", "9", "--conversation-turns", "3", "--prompt-words", "1-3"]
        for number_of_scrapes in (3, 6, 9):  # a rate needs a series that has grown between two scrapes
            assert loadtest(["--url", server.url, "--quiet", *talk, "--max-tokens", "8"]) == 0
            prometheus.wait_for_scrapes(number_of_scrapes)
        yield prometheus


@pytest.mark.parametrize("panel", dashboard_queries())
def test_prometheus_answers_every_panel(watched: PrometheusServer, panel: str) -> None:
    """No query of the dashboard is an error on a real server, and those that every server can answer have numbers."""
    samples = watched.query(dashboard_queries()[panel].replace("[5s]", "[1m]"))
    if panel in CORE_PANELS:
        assert samples
        assert not all(math.isnan(float(sample["value"][1])) for sample in samples)


def test_the_core_panels_exist() -> None:
    """The list above names panels of the dashboard."""
    assert set(CORE_PANELS) - set(dashboard_queries()) == set()


def test_a_healthy_server_raises_no_alarm(watched: PrometheusServer) -> None:
    """Every rule is evaluated on a real server's metrics, and no alert is firing."""
    rules = watched.rules()
    assert {rule["name"] for rule in rules} == set(rule_expressions())
    assert [(rule["name"], rule.get("lastError")) for rule in rules if rule["health"] != "ok"] == []
    assert [rule["name"] for rule in rules if rule.get("state") == "firing"] == []

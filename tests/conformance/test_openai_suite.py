"""What the authors of the `openai` client test of its resources, run against this server."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from tests.conformance.environment import PIP_SECONDS, Unavailable
from tests.conformance.openai_suite import RUN_SECONDS, OpenAISuite
from tests.conformance.stage import Stage
from tests.server_process import ServerProcess

OPTIONS = ("--dtype", "float32", "--max-output-tokens", "16")
# Of the tests that the client in the lock file comes with. Those of the skip list are not among them.
MIN_PASSED = 500


@pytest.mark.slow
@pytest.mark.timeout(2 * PIP_SECONDS + RUN_SECONDS)
def test_the_clients_own_tests_pass(tiny_model: Path, tmp_path: Path) -> None:
    """Loose, strict and over aiohttp; what is not run is on a list, with a reason."""
    try:
        suite = OpenAISuite()
    except Unavailable as error:
        pytest.skip(f"openai-python's tests cannot be fetched: {error}")
    report = tmp_path / "report.xml"
    with ServerProcess(tiny_model, tmp_path / "data", *OPTIONS) as server, Stage(server.url, "test") as stage:
        said = suite.run(stage.base_url, report)
    assert report.exists(), said
    counts = ElementTree.parse(report).getroot().find("testsuite")
    assert counts is not None, said
    assert (counts.get("errors"), counts.get("failures")) == ("0", "0"), said
    assert int(counts.get("tests", 0)) - int(counts.get("skipped", 0)) >= MIN_PASSED, said

"""`python -m loadtest` as a whole: one line of JSON last, files in the output directory, an honest exit status."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from loadtest.__main__ import main
from tests.conftest import ROOT
from tests.loadtest.stub_server import StubServer
from tests.redis_server import free_port

SMALL = ("--users", "1", "--turns", "6", "--conversation-turns", "3", "--max-tokens", "4")


class Resources(HTMLParser):
    """Collects what a page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note every address in `tag`."""
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "data", "srcset")]


def test_the_last_line_is_json_and_the_bar_is_on_standard_error(stub: StubServer) -> None:
    """The command prints its summary, ends with one JSON object, shows progress on standard error only, and exits 0."""
    command = [sys.executable, "-m", "loadtest", "--url", stub.url, *SMALL]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout.splitlines()[-1])
    assert (summary["turns"], summary["conversations"], summary["resumes"]) == (6, 2, {"hot": 4, "new": 2})
    assert "time to first token" in result.stdout
    assert "6/6" in result.stderr
    assert "6/6" not in result.stdout


def test_the_report_is_one_page_and_one_picture(
    stub: StubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--output gets a page that loads nothing from elsewhere, a PNG, the summary and one line for each turn."""
    stub.behaviour.refuse = lambda number: (429, "<script>") if number == 3 else None
    assert main(["--url", stub.url, *SMALL, "--quiet", "--output", str(tmp_path / "new" / "out")]) == 0
    out = tmp_path / "new" / "out"
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert json.loads((out / "summary.json").read_text()) == printed
    turns = [json.loads(line) for line in (out / "turns.jsonl").read_text().splitlines()]
    assert sorted(turn["error"] or "" for turn in turns) == ["", "", "", "", "", "http_429:<script>"]
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    page = (out / "report.html").read_text()
    resources = Resources()
    resources.feed(page)
    assert len(resources.addresses) == 4
    assert all(address.startswith("data:image/svg+xml;base64,") for address in resources.addresses)
    assert not re.search(r"<script|@import|url\(", page)
    assert "http_429:&lt;script&gt;" in page


def test_a_broken_promise_is_the_exit_status(stub: StubServer, capsys: pytest.CaptureFixture[str]) -> None:
    """A server that skips a version makes the command fail and say what was broken."""

    def skip(event: dict[str, Any]) -> dict[str, Any]:
        if "conversation" in event:
            event["conversation"]["version"] += 1
        return event

    stub.behaviour.edit = skip
    assert main(["--url", stub.url, *SMALL, "--quiet"]) == 1
    output = capsys.readouterr().out
    assert "broken promises: version_not_consecutive" in output
    assert json.loads(output.splitlines()[-1])["violations"]["version_not_consecutive"] >= 2


def test_no_server_is_said_and_is_the_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a server the command fails with one line on standard error."""
    url = f"http://127.0.0.1:{free_port()}"
    assert main(["--url", url, "--quiet"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"loadtest: {url}")


def test_a_report_of_nothing_is_still_a_report(stub: StubServer, tmp_path: Path) -> None:
    """Where every turn failed the report says so instead of breaking."""
    stub.behaviour.refuse = lambda number: (500, "down")
    assert main(["--url", stub.url, "--turns", "1", "--users", "1", "--quiet", "--output", str(tmp_path)]) == 1
    assert "no turn succeeded" in (tmp_path / "report.html").read_text()

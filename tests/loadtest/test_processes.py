"""One load test from several processes is one load test."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from loadtest.options import Options
from loadtest.share import Share, shares_of
from tests.conftest import ROOT
from tests.loadtest.stub_server import StubServer

SMALL = ("--history", "client", "--conversation-turns", "2", "--max-tokens", "4", "--quiet")


def command(stub: StubServer, *options: str) -> list[str]:
    """A small load test of the stub."""
    return [sys.executable, "-m", "loadtest", "--url", stub.url, *SMALL, *options]


def summary_of(stub: StubServer, *options: str) -> dict[str, Any]:
    """The last line of one that goes well."""
    done = subprocess.run(command(stub, *options), cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    summary: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return summary


def started(stub: StubServer, num_requests: int) -> subprocess.Popen[str]:
    """A minute's load from two processes, once the stub has had so many requests."""
    load = command(stub, "--users", "4", "--duration", "60", "--processes", "2")
    process = subprocess.Popen(load, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 30
    while len(stub.requests) < num_requests:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process


def first_prompts(stub: StubServer) -> list[str]:
    """What users began with, in order of what was said."""
    return sorted(request["messages"][0]["content"] for request in stub.requests if len(request["messages"]) == 1)


def test_shares_are_the_whole() -> None:
    """Nothing is lost by dividing, and nobody is left without anything to do."""
    options = Options(url="", users=7, max_turns=100, max_in_flight=50, processes=3)
    parts = [share.options(options) for share in shares_of(options)]
    assert [part.users for part in parts] == [3, 2, 2]
    assert sum(part.max_turns or 0 for part in parts) == 100
    assert sum(part.max_in_flight for part in parts) == 50
    assert len(shares_of(Options(url="", users=2, processes=8))) == 2
    assert len(shares_of(Options(url="", users=20, max_turns=5, processes=8))) == 5
    assert len(shares_of(Options(url="", users=2, rate=5.0, processes=8))) == 8


def test_conversations_are_numbered_across_shares() -> None:
    """Each is somebody's, and nobody else's."""
    of_each = [Share(i, 4).numbers() for i in range(4)]
    assert sorted(next(numbers) for _ in range(3) for numbers in of_each) == list(range(12))


def test_users_are_shared(stub: StubServer) -> None:
    """The turns, the conversations and the words are those of one process."""
    load = ("--users", "4", "--turns", "4", "--conversation-turns", "1")
    alone = summary_of(stub, *load)
    said = first_prompts(stub)
    stub.requests.clear()
    shared = summary_of(stub, *load, "--processes", "2")
    assert first_prompts(stub) == said
    for name in ("turns", "conversations", "output_tokens", "users", "failed_turns", "finish_reasons"):
        assert shared[name] == alone[name]
    assert shared["ttft_seconds"]["count"] == 4


def test_arrivals_are_shared(stub: StubServer) -> None:
    """Conversations arrive when they would have, whoever holds them."""
    alone = summary_of(stub, "--rate", "8", "--duration", "1.5")
    said = first_prompts(stub)
    stub.requests.clear()
    shared = summary_of(stub, "--rate", "8", "--duration", "1.5", "--processes", "2")
    assert first_prompts(stub) == said
    assert shared["turns"] == alone["turns"] > 0


def test_an_interrupt_ends_all_in_order(stub: StubServer) -> None:
    """With the summary of what was seen until then."""
    process = started(stub, num_requests=8)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors
    summary = json.loads(output.splitlines()[-1])
    assert summary["turns"] >= 4
    assert summary["elapsed_seconds"] < 30


def test_a_process_that_is_lost_is_said(stub: StubServer) -> None:
    """Its share is missing: no summary of the rest."""
    process = started(stub, num_requests=4)
    os.kill(_children_that_spawned(process.pid)[0], signal.SIGKILL)
    output, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    assert output == ""
    assert "ended before its share was over" in errors


def _children_that_spawned(pid: int) -> list[int]:
    """Return the processes that hold shares; multiprocessing has one of its own beside them."""
    children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [child for child in children if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text()]

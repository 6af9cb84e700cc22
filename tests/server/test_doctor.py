"""`sostenuto doctor`: what it finds on real stores."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from server.doctor import Finding, Grade, examine
from server.settings import Settings
from tests.conftest import ROOT
from tests.redis_server import RedisServer, free_port


def found(data_dir: Path, **settings: Any) -> list[Finding]:
    """Examine; without asking for a compiler, which takes a process."""
    return list(examine(Settings(model="x.pth", data_dir=data_dir, device="cuda", **settings)))


def texts(findings: list[Finding], grade: Grade) -> str:
    """All findings of a grade."""
    return "\n".join(finding.text for finding in findings if finding.grade is grade)


def test_the_embedded_stores_are_measured(tmp_path: Path) -> None:
    """Before they exist; and nothing of that is left."""
    findings = found(tmp_path / "data")
    assert "ledger: a write to" in "\n".join(map(str, findings))
    assert "states: a megabyte is written in" in texts(findings, Grade.OK)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_directory_in_memory_keeps_no_promise() -> None:
    """Told of the ledger as a problem, of the states as a warning."""
    if not Path("/dev/shm").is_dir():
        pytest.skip("this machine has no /dev/shm")
    findings = found(Path("/dev/shm/not-there"), state_url="memory:")
    assert "is in memory (tmpfs)" in texts(findings, Grade.PROBLEM)
    assert "states: memory" in texts(findings, Grade.WARNING)


def test_a_redis_that_is_set_well_is_well(redis_server: RedisServer, tmp_path: Path) -> None:
    """No problem, and what a crash costs is said."""
    findings = found(tmp_path, ledger_url=redis_server.url)
    assert texts(findings, Grade.PROBLEM) == ""
    assert "may lose about two seconds of turns" in texts(findings, Grade.OK)


def test_a_redis_that_forgets_is_told(tmp_path: Path) -> None:
    """Eviction and a missing append-only file are problems of a ledger; sharing is a warning."""
    with RedisServer(tmp_path / "redis", "--appendonly", "no", "--maxmemory-policy", "volatile-ttl") as server:
        findings = found(tmp_path, ledger_url=server.url, state_url=server.url)
    problems, warnings = texts(findings, Grade.PROBLEM), texts(findings, Grade.WARNING)
    assert "conversations vanish" in problems
    assert "appendonly no" in problems
    assert "checkpoints that are being uploaded" in warnings
    assert "share a Redis" in warnings


def test_a_redis_that_is_not_there_is_told_without_its_password(tmp_path: Path) -> None:
    """One problem for each store."""
    url = f"redis://user:secret@127.0.0.1:{free_port()}/0"
    findings = found(tmp_path, ledger_url=url, state_url=url)
    assert texts(findings, Grade.PROBLEM).count("does not answer") == 2
    assert "secret" not in "\n".join(map(str, findings))


def test_the_command_says_all_and_exits_by_the_worst(tmp_path: Path) -> None:
    """With few open files allowed that is a warning; a ledger that is not there is a problem."""
    asked = [sys.executable, "-m", "server", "doctor", "--data-dir", str(tmp_path)]
    limited = ["bash", "-c", 'ulimit -Sn 200; exec "$@"', "-", *asked]
    few = subprocess.run(limited, capture_output=True, text=True, cwd=ROOT, timeout=100)
    assert "warning  open files: at most 200" in few.stdout
    assert "compiler:" in few.stdout
    assert (few.returncode, few.stderr) == (int("problem " in few.stdout), "")
    volatile = subprocess.run(
        [*asked, "--ledger-url", "redis://127.0.0.1:1"], capture_output=True, cwd=ROOT, timeout=100
    )
    assert volatile.returncode == 1

"""Every kernel compiles for sm_90 within its budget, without a card."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytest.importorskip("triton", reason="Triton is not installed: pip install sostenuto[cuda]")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_kernel_keeps_its_budget(tmp_path: Path) -> None:
    """Registers, spills, shared memory, wide accesses, tensor cores; in a process that compiles."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-m", "kernels.triton.compile"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["kernel"]: row["over_budget"] for row in kernels if row["over_budget"]} == {}
    assert done.returncode == 0, done.stderr
    assert kernels

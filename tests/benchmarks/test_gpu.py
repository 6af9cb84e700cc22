"""`make bench-gpu` on a machine without a card."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from tests.conftest import ROOT


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card: the benchmark would run")
def test_without_a_card_it_says_so_and_measures_nothing() -> None:
    """Exit status 2, a message, no JSON."""
    command = [sys.executable, "-m", "tests.benchmarks.gpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "needs a CUDA device" in done.stderr
    assert done.stdout == ""

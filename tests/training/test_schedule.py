from __future__ import annotations

from itertools import pairwise

import pytest

from training.config import OptimizerSection
from training.schedule import learning_rate

BASE = {"peak_lr": 1e-3, "final_lr": 1e-4, "warmup_steps": 10}


@pytest.mark.parametrize("schedule", ["constant", "cosine", "wsd"])
def test_rate_is_a_number_that_warms_up_peaks_and_stays_at_its_floor(schedule: str) -> None:
    """It rises from above zero to the peak, never rises again, and past the end stays what it was."""
    settings = OptimizerSection(**BASE, schedule=schedule, decay_steps=20)  # type: ignore[arg-type]
    rates = [learning_rate(step, 100, settings) for step in range(300)]
    assert all(type(rate) is float for rate in rates)
    assert 0 < rates[0] < rates[5] < rates[10] == pytest.approx(1e-3)
    assert all(later <= earlier for earlier, later in pairwise(rates[10:]))
    assert rates[99] == rates[299] == pytest.approx(1e-3 if schedule == "constant" else 1e-4)


def test_wsd_holds_the_peak_until_the_decay() -> None:
    """Only the last `decay_steps` go down, in a line."""
    settings = OptimizerSection(**BASE, schedule="wsd", decay_steps=20)  # type: ignore[arg-type]
    assert learning_rate(80, 100, settings) == pytest.approx(1e-3)
    assert learning_rate(81, 100, settings) < 1e-3
    assert learning_rate(90, 100, settings) == pytest.approx(1e-3 - 9e-4 * 10 / 19)


def test_a_run_that_is_all_warm_up() -> None:
    """As many steps of warm-up as of training divide nothing by zero."""
    settings = OptimizerSection(**BASE, schedule="cosine")  # type: ignore[arg-type]
    assert learning_rate(10, 10, settings) == pytest.approx(1e-3)

"""Health means forward progress."""

from __future__ import annotations

from engine.messages import EngineStats, StepReport
from server.pulse import STALL_SECONDS, Pulse


class Clock:
    """Time that passes when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def report(num_steps: int, num_running: int) -> StepReport:
    """Return a report of an engine that has made `num_steps` steps."""
    stats = EngineStats(
        num_steps=num_steps,
        num_running=num_running,
        num_waiting=0,
        num_slots_used=0,
        num_slots=1,
        num_hot_states=0,
        hot_state_bytes=0,
        pending_checkpoints=0,
    )
    return StepReport(stats=stats)


def test_an_engine_that_steps_is_well() -> None:
    """Steps count as progress, however long it has run."""
    clock = Clock()
    pulse = Pulse(clock)
    for step in range(10):
        clock.now += STALL_SECONDS * 0.9
        pulse.report(report(step, num_running=1))
        assert not pulse.is_stalled


def test_an_idle_engine_is_well_while_it_reports() -> None:
    """Without work there are no steps, and nothing is wrong."""
    clock = Clock()
    pulse = Pulse(clock)
    for _ in range(10):
        clock.now += STALL_SECONDS * 0.9
        pulse.report(report(5, num_running=0))
        assert not pulse.is_stalled


def test_a_silent_engine_is_stalled() -> None:
    """It reports at least once a second when it is well."""
    clock = Clock()
    pulse = Pulse(clock)
    pulse.report(report(5, num_running=0))
    clock.now += STALL_SECONDS + 1
    assert pulse.is_stalled


def test_an_engine_that_reports_without_stepping_is_stalled() -> None:
    """Sequences that run must bring steps."""
    clock = Clock()
    pulse = Pulse(clock)
    pulse.report(report(5, num_running=1))
    for _ in range(4):
        clock.now += STALL_SECONDS / 3
        pulse.report(report(5, num_running=1))
    assert pulse.is_stalled
    pulse.report(report(6, num_running=1))
    assert not pulse.is_stalled

"""Whether the engine makes progress. A server that answers HTTP while its engine hangs is not healthy."""

from __future__ import annotations

import time
from collections.abc import Callable

from engine.messages import StepReport

# The engine reports at least once a second; a step that takes this long will not end.
STALL_SECONDS = 30.0


class Pulse:
    """Watches the engine's reports."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._num_steps = -1
        self._is_busy = False
        self._heard_at = self._progressed_at = clock()

    def report(self, report: StepReport) -> None:
        """Take in a report."""
        now = self._clock()
        self._heard_at = now
        if report.stats is None:
            return
        if report.stats.num_steps != self._num_steps or report.stats.num_running == 0:
            self._progressed_at = now
        self._num_steps = report.stats.num_steps

    @property
    def is_stalled(self) -> bool:
        """Whether the engine is silent, or runs sequences without making a step."""
        return self._clock() - min(self._heard_at, self._progressed_at) > STALL_SECONDS

"""Steps on their way: planned by the scheduler, launched on the device, waited for. No sockets, no clients."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable

from engine.messages import StepStats
from engine.runner.plan import Launch, ModelRunner
from engine.scheduler.scheduler import Scheduler

_log = logging.getLogger(__name__)


class Pipeline:
    """At most two steps in flight: where the device can do it, the next is launched before the last one is read.

    So the device goes on while the host reads tokens, tells clients, and plans. A step that raises fails whoever is in
    flight: the steps after it began from states it should have made.
    """

    def __init__(self, scheduler: Scheduler, runner: ModelRunner, clock: Callable[[], float] = time.monotonic) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._clock = clock
        self._in_flight: deque[tuple[Launch, float]] = deque()  # with the time of the launch, oldest first
        self._read_at = 0.0

    @property
    def num_in_flight(self) -> int:
        """Steps that are launched and have not been read."""
        return len(self._in_flight)

    def launch(self) -> None:
        """Launch what can be planned now."""
        if not self._in_flight and (plan := self._scheduler.schedule()).chunks:
            self._launch(lambda: self._runner.launch(plan))
        may_follow = len(self._in_flight) == 1 and self._in_flight[0][0].can_be_followed
        if may_follow and (following := self._scheduler.follow()) is not None:
            self._launch(lambda: self._runner.follow(following.rows, following.chunks))

    def read(self) -> StepStats | None:
        """Wait for the oldest step and tell the scheduler; None if there was none, or nothing came of it."""
        if not self._in_flight:
            return None
        launch, launched_at = self._in_flight.popleft()
        try:
            output = launch.output()
        except Exception as error:
            self._fail(error)
            return None
        tokens = self._scheduler.update(output)
        began_at, self._read_at = max(launched_at, self._read_at), self._clock()
        return StepStats(
            step_seconds=self._read_at - began_at,
            num_decode_tokens=tokens.num_decode,
            num_prefill_tokens=tokens.num_prefill + tokens.num_settled,
            num_sequences=tokens.num_sequences,
        )

    def _launch(self, launch: Callable[[], Launch]) -> None:
        launched_at = self._clock()
        try:
            self._in_flight.append((launch(), launched_at))
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        _log.error("a step failed, and with it whoever was in flight", exc_info=error)
        self._in_flight.clear()
        self._scheduler.fail_step(error)

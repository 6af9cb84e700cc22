"""A progress bar on standard error while a load test runs."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import NoReturn

import numpy as np
from tqdm import tqdm

from loadtest.figures import format_seconds
from loadtest.generator import LoadRun
from loadtest.options import Options
from loadtest.reply import TurnRecord

TICK_SECONDS = 0.25
RECENT_TURNS = 200


class Progress:
    """Shows turns where the run is bounded by them, else seconds, and how the recent turns went."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._recent: deque[float] = deque(maxlen=RECENT_TURNS)
        self._turns = self._failures = 0
        by_turns = options.max_turns is not None
        self._bar: tqdm[NoReturn] = tqdm(
            total=options.max_turns if by_turns else options.duration_seconds,
            unit="turn" if by_turns else "s",
            bar_format=None if by_turns else "{percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s{postfix}",
            disable=options.quiet,
            dynamic_ncols=True,
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def on_turn(self, run: LoadRun, record: TurnRecord) -> None:
        """Hear of a turn that ended."""
        self._turns += 1
        self._failures += record.error is not None
        if record.ttft_seconds is not None:
            self._recent.append(record.ttft_seconds)
        if self._options.max_turns is not None:
            self._bar.update()
        ttft = format_seconds(float(np.median(self._recent))) if self._recent else "-"
        self._bar.set_postfix_str(
            f"{self._turns} turns, {run.in_flight} in flight, {self._failures} failed, first token {ttft}",
            refresh=False,
        )

    async def tick(self, clock: Callable[[], float]) -> None:
        """Keep the bar moving with the clock, until cancelled."""
        while True:
            if self._options.max_turns is None:
                self._bar.n = min(clock(), self._options.duration_seconds)
            self._bar.refresh()
            await asyncio.sleep(TICK_SECONDS)

"""The processes that train together under `torchrun`, and when they stop."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass

import torch
from torch import distributed


@dataclass(frozen=True, slots=True)
class Processes:
    """Which of how many processes this one is."""

    rank: int
    count: int

    @property
    def is_first(self) -> bool:
        """Whether this is the one that evaluates, logs and saves."""
        return self.rank == 0

    @staticmethod
    def join(device: str) -> Processes:
        """Meet the other processes that `torchrun` started; alone without it."""
        if "RANK" not in os.environ:
            return ALONE
        if not distributed.is_initialized():
            distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
        return Processes(distributed.get_rank(), distributed.get_world_size())


ALONE = Processes(0, 1)


class StopFlag:
    """Says when to stop before the last step: at SIGTERM or a time limit, decided by all processes together.

    A context: SIGTERM is given back to whoever had it.
    """

    def __init__(self, processes: Processes, started: float, max_minutes: float | None) -> None:
        self._processes = processes
        self._deadline = started + 60 * max_minutes if max_minutes is not None else float("inf")
        self._signalled = False

    def __enter__(self) -> StopFlag:
        self._previous = signal.signal(signal.SIGTERM, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._previous)

    def _on_signal(self, _signal: int, _frame: object) -> None:
        self._signalled = True

    def wanted(self) -> bool:
        """Say whether any process wants to stop."""
        mine = self._signalled or time.monotonic() >= self._deadline
        if self._processes.count == 1:
            return mine
        flag = torch.tensor(float(mine))
        distributed.all_reduce(flag, distributed.ReduceOp.MAX)
        return bool(flag)

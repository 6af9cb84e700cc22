"""From a client's wish to adopt a state that came from elsewhere to the checkpoint it becomes."""

from __future__ import annotations

import logging
from concurrent.futures import Future

from engine.errors import CheckpointMissing, CheckpointRejected, StoreUnavailable
from engine.messages import AdoptCheckpoint, CheckpointFailed, CheckpointStored
from engine.state.checkpointer import Checkpointer

_log = logging.getLogger(__name__)

_REASONS: dict[type[Exception], str] = {
    CheckpointMissing: "missing",
    CheckpointRejected: "rejected",
    StoreUnavailable: "store_unavailable",
}


class Adoptions:
    """Adoptions that are not answered yet. Engine thread only."""

    def __init__(self, checkpointer: Checkpointer) -> None:
        self._checkpointer = checkpointer
        self._running: list[tuple[bytes, AdoptCheckpoint, Future[CheckpointStored]]] = []

    @property
    def num_pending(self) -> int:
        """Adoptions that are not answered yet."""
        return len(self._running)

    def add(self, client: bytes, command: AdoptCheckpoint) -> None:
        """Begin one; `take_done` will answer it."""
        self._running.append((client, command, self._checkpointer.adopt(command.checkpoint, command.chain)))

    def take_done(self) -> list[tuple[bytes, CheckpointStored | CheckpointFailed]]:
        """Return what is done now, and who asked for it."""
        done = [running for running in self._running if running[2].done()]
        self._running = [running for running in self._running if not running[2].done()]
        return [(client, _answer(command, future)) for client, command, future in done]


def _answer(command: AdoptCheckpoint, future: Future[CheckpointStored]) -> CheckpointStored | CheckpointFailed:
    try:
        return future.result()
    except Exception as error:
        reason = _REASONS.get(type(error), "error")
        if reason == "error":
            _log.exception("a state could not be adopted")
        return CheckpointFailed(
            chain=command.chain,
            num_tokens=command.checkpoint.num_tokens,
            reason=reason,
            message=str(error),
            adopted=command.checkpoint.checkpoint_id,
        )

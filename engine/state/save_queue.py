"""From a client's wish to have a state saved to the checkpoint's name, in whatever order things get ready."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from engine.errors import StoreUnavailable
from engine.messages import CheckpointFailed, CheckpointRef, CheckpointStored, SaveState
from engine.state.checkpointer import Checkpointer
from engine.state.hot_states import HotStates

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Wish:
    client: bytes
    command: SaveState

    @property
    def wanted(self) -> CheckpointRef:
        """The state, as it is looked up."""
        return CheckpointRef(checkpoint_id="", num_tokens=self.command.num_tokens, chain=self.command.chain)

    def failed(self, reason: str, message: str) -> CheckpointFailed:
        """Return the answer that it could not be done."""
        return CheckpointFailed(
            chain=self.command.chain, num_tokens=self.command.num_tokens, reason=reason, message=message
        )


class SaveQueue:
    """Saves that are not answered yet: of states that still settle, and of states that are being written.

    Every wish gets a checkpoint of its own, even for the same state: whoever asked may delete it without asking others.
    Engine thread only.
    """

    def __init__(self, hot_states: HotStates, checkpointer: Checkpointer, is_settling: Callable[[bytes], bool]) -> None:
        self._hot_states = hot_states
        self._checkpointer = checkpointer
        self._is_settling = is_settling
        self._new: list[_Wish] = []
        self._writing: list[tuple[_Wish, Future[CheckpointStored]]] = []

    @property
    def num_pending(self) -> int:
        """Saves that are not answered yet."""
        return len(self._new) + len(self._writing)

    def add(self, client: bytes, command: SaveState) -> None:
        """Take a wish; `advance` will answer it."""
        self._new.append(_Wish(client, command))

    def advance(self) -> list[tuple[bytes, CheckpointStored | CheckpointFailed]]:
        """Begin to write what has become final; returns what is done now, and who asked for it."""
        answers: list[tuple[bytes, CheckpointStored | CheckpointFailed]] = []
        wishes, self._new = self._new, []
        for wish in wishes:
            if self._is_settling(wish.command.chain):
                self._new.append(wish)
            elif not self._begin(wish):
                answers.append((wish.client, wish.failed("not_kept", "the state is not in the engine's memory")))
        done = [(wish, future) for wish, future in self._writing if future.done()]
        self._writing = [(wish, future) for wish, future in self._writing if not future.done()]
        answers += [(wish.client, self._finish(wish, future)) for wish, future in done]
        return answers

    def _begin(self, wish: _Wish) -> bool:
        state = self._hot_states.get(wish.wanted)
        if state is None:
            return False
        self._hot_states.pin(state.chain)
        self._writing.append((wish, self._checkpointer.save(state)))
        return True

    def _finish(self, wish: _Wish, future: Future[CheckpointStored]) -> CheckpointStored | CheckpointFailed:
        self._hot_states.unpin(wish.command.chain)
        try:
            return future.result()
        except StoreUnavailable as error:
            return wish.failed("store_unavailable", str(error))
        except Exception as error:
            _log.exception("a state could not be written")
            return wish.failed("error", str(error))

"""From a client's wish to have a state saved to the checkpoint's name, in whatever order things get ready."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from engine.errors import CheckpointError, StoreUnavailable
from engine.messages import CheckpointFailed, CheckpointRef, CheckpointStored, SaveState
from engine.state.checkpointer import Checkpointer
from engine.state.hot_states import HotStates
from engine.state.spec import RecurrentState

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
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
    """Saves that are not answered yet: of states that still settle, are read to be copied, or are being written.

    Every wish gets a checkpoint of its own, even for the same state: whoever asked may delete it without asking others.
    Engine thread only.
    """

    def __init__(self, hot_states: HotStates, checkpointer: Checkpointer, is_settling: Callable[[bytes], bool]) -> None:
        self._hot_states = hot_states
        self._checkpointer = checkpointer
        self._is_settling = is_settling
        self._new: list[_Wish] = []
        self._reading: list[tuple[_Wish, Future[RecurrentState]]] = []
        self._writing: list[tuple[_Wish, Future[CheckpointStored]]] = []
        self._pinned: set[_Wish] = set()

    @property
    def num_pending(self) -> int:
        """Saves that are not answered yet."""
        return len(self._new) + len(self._reading) + len(self._writing)

    def add(self, client: bytes, command: SaveState) -> None:
        """Take a wish; `advance` will answer it."""
        self._new.append(_Wish(client, command))

    def advance(self) -> list[tuple[bytes, CheckpointStored | CheckpointFailed]]:
        """Begin to write what has become final; returns what is done now, and who asked for it."""
        answers = self._write_what_was_read()
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
        if state is not None:
            self._write(wish, state)
            return True
        if wish.command.copy_of is None:
            return False
        self._reading.append((wish, self._checkpointer.fetch(wish.command.copy_of)))
        return True

    def _write(self, wish: _Wish, state: RecurrentState) -> None:
        if self._hot_states.put(state):  # a copy will be wanted in a moment; and what waits to be written stays
            self._hot_states.pin(state.chain)
            self._pinned.add(wish)
        self._writing.append((wish, self._checkpointer.save(state)))

    def _write_what_was_read(self) -> list[tuple[bytes, CheckpointStored | CheckpointFailed]]:
        """Begin to write the copies whose original has arrived; returns whose has not and will not."""
        answers: list[tuple[bytes, CheckpointStored | CheckpointFailed]] = []
        done = [(wish, future) for wish, future in self._reading if future.done()]
        self._reading = [(wish, future) for wish, future in self._reading if not future.done()]
        for wish, future in done:
            try:
                state = future.result()
            except CheckpointError as error:
                answers.append((wish.client, wish.failed("not_kept", f"its checkpoint cannot be copied: {error}")))
            except Exception as error:
                _log.exception("a checkpoint could not be read")
                answers.append((wish.client, wish.failed("error", str(error))))
            else:
                if state.matches(wish.wanted):
                    self._write(wish, state)
                else:
                    answers.append((wish.client, wish.failed("not_kept", "the checkpoint to copy is of other tokens")))
        return answers

    def _finish(self, wish: _Wish, future: Future[CheckpointStored]) -> CheckpointStored | CheckpointFailed:
        if wish in self._pinned:
            self._pinned.remove(wish)
            self._hot_states.unpin(wish.command.chain)
        try:
            return future.result()
        except StoreUnavailable as error:
            return wish.failed("store_unavailable", str(error))
        except Exception as error:
            _log.exception("a state could not be written")
            return wish.failed("error", str(error))

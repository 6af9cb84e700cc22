"""The state store behind the prefix states of an engine's memory: how replicas share them.

A prefix state is stored under an id that follows from what it is (the model, how it computes, and the tokens consumed),
so that every engine that would compute the same finds it without being told. Whatever the store does costs time, never
an answer: a state that cannot be read is a miss, one that cannot be written is written another time.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import Protocol

from engine.errors import CheckpointError
from engine.messages import CheckpointRef, CheckpointStored
from engine.state.checkpoint import derived_id
from engine.state.hot_states import HotStates
from engine.state.spec import RecurrentState, StateSpec

_log = logging.getLogger(__name__)

REST_SECONDS = 10.0  # so long a store that did not answer is not asked again: no prompt waits for its time-outs
MAX_WRITES = 4  # at once; what comes then is written when it is used next


class PrefixCheckpointer(Protocol):
    """What is asked of `engine.state.checkpointer.Checkpointer`."""

    def fetch_first(self, refs: Sequence[CheckpointRef]) -> Future[RecurrentState]:
        """Read the first of `refs` that is there."""
        ...

    def save(self, state: RecurrentState, checkpoint_id: str | None = None) -> Future[CheckpointStored]:
        """Write `state` under an id."""
        ...

    def delete(self, checkpoint_ids: Iterable[str]) -> None:
        """Remove checkpoints, some time soon."""
        ...


class PrefixStore:
    """Reads and writes prefix states by what they are. Engine thread only."""

    def __init__(
        self,
        checkpointer: PrefixCheckpointer,
        hot_states: HotStates,
        spec: StateSpec,
        computed_by: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.num_written = 0
        self.num_failed = 0
        self._checkpointer = checkpointer
        self._hot_states = hot_states
        self._spec = spec
        self._computed_by = computed_by
        self._clock = clock
        self._rests_until = 0.0
        self._writing: dict[bytes, Future[CheckpointStored]] = {}  # by chain; these states are pinned
        self._unwanted: set[bytes] = set()  # of those being written

    def name(self, chain: bytes) -> str:
        """Return the id under which the state behind `chain` is stored."""
        return derived_id(self._spec, chain, self._computed_by)

    @property
    def rests(self) -> bool:
        """Whether the store failed a moment ago and is not asked."""
        return self._clock() < self._rests_until

    def rest(self) -> None:
        """Ask the store for nothing for a while."""
        self._rests_until = self._clock() + REST_SECONDS

    def fetch(self, wanted: Sequence[tuple[int, bytes]]) -> Future[RecurrentState]:
        """Read the first state of `wanted` (number of tokens, chain) that is there, verified whole.

        The future raises `CheckpointError`.
        """
        refs = [CheckpointRef(checkpoint_id=self.name(chain), num_tokens=n, chain=chain) for n, chain in wanted]
        return self._checkpointer.fetch_first(refs)

    def write(self, state: RecurrentState) -> bool:
        """Begin to write a state that is in memory, and will be pinned until it is written; False if it is too much."""
        if self.rests or len(self._writing) >= MAX_WRITES or state.chain in self._writing:
            return False
        self._hot_states.pin(state.chain)
        self._writing[state.chain] = self._checkpointer.save(state, self.name(state.chain))
        return True

    def delete(self, chain: bytes) -> None:
        """Remove the state behind `chain`, if it is there or on its way."""
        if chain in self._writing:
            self._unwanted.add(chain)
        self._checkpointer.delete([self.name(chain)])

    def advance(self) -> list[bytes]:
        """Take note of the writes that ended; returns the chains of those that failed."""
        failed = []
        for chain in [chain for chain, future in self._writing.items() if future.done()]:
            future = self._writing.pop(chain)
            self._hot_states.unpin(chain)
            if not self._is_written(future):
                failed.append(chain)
            elif chain in self._unwanted:
                self._checkpointer.delete([self.name(chain)])
            self._unwanted.discard(chain)
        return failed

    def _is_written(self, future: Future[CheckpointStored]) -> bool:
        try:
            future.result()
        except Exception as error:
            self.num_failed += 1
            self.rest()
            expected = isinstance(error, CheckpointError)
            _log.warning("a prefix state could not be written: %s", error, exc_info=None if expected else error)
            return False
        self.num_written += 1
        return True

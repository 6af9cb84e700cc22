"""States between turns, in host memory: the fastest way to resume, and the source of every checkpoint."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from engine.messages import CheckpointRef, StateSource
from engine.state.spec import RecurrentState

TRIAL_SHARE = 0.25  # of the memory, that states nobody has used yet may hold against those that somebody has


@dataclass(slots=True)
class _Entry:
    state: RecurrentState
    num_pins: int = 0
    forgotten: bool = False


class HotStates:
    """The most recently used states, up to a number of bytes, found by the chain of what they have consumed.

    A state is on trial until it is used for the first time: resumed, or written to the store as every conversation's
    is. Where states on trial hold more than their share they make room first, oldest first; so prompts that come once
    cannot push out what is come back to. A pinned state (one that waits to be written) is never evicted, and counts
    until it is unpinned. When pinned states leave no room a new one is dropped: its conversation replays. Engine thread
    only.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.num_evicted = 0
        self.num_dropped = 0
        self._entries: dict[bytes, _Entry] = {}
        self._trial: OrderedDict[bytes, None] = OrderedDict()  # never used, oldest first
        self._used: OrderedDict[bytes, None] = OrderedDict()  # least recently used first
        self._trial_bytes = 0
        self._pinned_bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, chain: bytes) -> bool:
        """Say whether the state behind `chain` would be found; looking is no use."""
        entry = self._entries.get(chain)
        return entry is not None and not entry.forgotten

    def put(self, state: RecurrentState) -> bool:
        """Keep `state`, in place of others; False if there is no room for it."""
        if (known := self._entries.get(state.chain)) is not None:  # equal chains are equal states
            known.forgotten = False
            (self._trial if state.chain in self._trial else self._used).move_to_end(state.chain)
            return True
        if not self._make_room(state.num_bytes):
            self.num_dropped += 1
            return False
        self._entries[state.chain] = _Entry(state)
        self._trial[state.chain] = None
        self.num_bytes += state.num_bytes
        self._trial_bytes += state.num_bytes
        return True

    def get(self, wanted: StateSource | CheckpointRef) -> RecurrentState | None:
        """Return the state that `wanted` names, if it is here, and count this as a use."""
        entry = self._entries.get(wanted.chain)
        if entry is None or entry.forgotten or not entry.state.matches(wanted):
            return None
        if wanted.chain in self._trial:
            del self._trial[wanted.chain]
            self._trial_bytes -= entry.state.num_bytes
        self._used[wanted.chain] = None
        self._used.move_to_end(wanted.chain)
        return entry.state

    def has_room(self, num_bytes: int) -> bool:
        """Say whether a state of `num_bytes` could be kept now."""
        return self._pinned_bytes + num_bytes <= self.max_bytes

    def pin(self, chain: bytes) -> None:
        """Hold on to a state that is here until `unpin`; pins are counted."""
        entry = self._entries[chain]
        self._pinned_bytes += 0 if entry.num_pins else entry.state.num_bytes
        entry.num_pins += 1

    def unpin(self, chain: bytes) -> None:
        """Let go of one pin."""
        entry = self._entries[chain]
        entry.num_pins -= 1
        if entry.num_pins:
            return
        self._pinned_bytes -= entry.state.num_bytes
        if entry.forgotten:
            self._remove(chain)

    def forget(self, chain: bytes) -> None:
        """Never find the state behind `chain` again; its memory goes as soon as nothing pins it."""
        entry = self._entries.get(chain)
        if entry is None:
            return
        entry.forgotten = True
        if not entry.num_pins:
            self._remove(chain)

    def _make_room(self, num_bytes: int) -> bool:
        if self.num_bytes + num_bytes <= self.max_bytes:
            return True
        if not self.has_room(num_bytes):
            return False
        trial = [chain for chain in self._trial if not self._entries[chain].num_pins]
        used = [chain for chain in self._used if not self._entries[chain].num_pins]
        trial.reverse()
        used.reverse()
        while self.num_bytes + num_bytes > self.max_bytes:
            exceeds_share = self._trial_bytes + num_bytes > TRIAL_SHARE * self.max_bytes
            self._remove((trial if trial and (exceeds_share or not used) else used).pop())
            self.num_evicted += 1
        return True

    def _remove(self, chain: bytes) -> None:
        num_bytes = self._entries.pop(chain).state.num_bytes
        self.num_bytes -= num_bytes
        if chain in self._trial:
            del self._trial[chain]
            self._trial_bytes -= num_bytes
        else:
            del self._used[chain]

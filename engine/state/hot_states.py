"""States between turns, in host memory: the fastest way to resume, and the source of every checkpoint."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from engine.messages import CheckpointRef, StateSource
from engine.state.spec import RecurrentState


@dataclass(slots=True)
class _Entry:
    state: RecurrentState
    num_pins: int = 0
    forgotten: bool = False


class HotStates:
    """The most recently used states, up to a number of bytes, found by the chain of what they have consumed.

    A pinned state (one that waits to be written) is never evicted, and counts until it is unpinned. When pinned states
    leave no room a new one is dropped: its conversation replays. Engine thread only.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.num_evicted = 0
        self.num_dropped = 0
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()  # least recently used first

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, state: RecurrentState) -> bool:
        """Keep `state`, in place of the ones not used for longest; False if there is no room for it."""
        if (known := self._entries.get(state.chain)) is not None:  # equal chains are equal states
            known.forgotten = False
            self._entries.move_to_end(state.chain)
            return True
        if not self._make_room(state.num_bytes):
            self.num_dropped += 1
            return False
        self._entries[state.chain] = _Entry(state)
        self.num_bytes += state.num_bytes
        return True

    def get(self, wanted: StateSource | CheckpointRef) -> RecurrentState | None:
        """Return the state that `wanted` names, if it is here, and count this as a use."""
        entry = self._entries.get(wanted.chain)
        if entry is None or entry.forgotten or not entry.state.matches(wanted):
            return None
        self._entries.move_to_end(wanted.chain)
        return entry.state

    def pin(self, chain: bytes) -> None:
        """Hold on to a state that is here until `unpin`; pins are counted."""
        self._entries[chain].num_pins += 1

    def unpin(self, chain: bytes) -> None:
        """Let go of one pin."""
        entry = self._entries[chain]
        entry.num_pins -= 1
        if entry.forgotten and not entry.num_pins:
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
        pinned_bytes = sum(entry.state.num_bytes for entry in self._entries.values() if entry.num_pins)
        if pinned_bytes + num_bytes > self.max_bytes:
            return False
        for chain in [chain for chain, entry in self._entries.items() if not entry.num_pins]:
            if self.num_bytes + num_bytes <= self.max_bytes:
                break
            self._remove(chain)
            self.num_evicted += 1
        return True

    def _remove(self, chain: bytes) -> None:
        self.num_bytes -= self._entries.pop(chain).state.num_bytes

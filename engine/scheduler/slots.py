"""Which rows of the state pool are free. Knows numbers only."""

from __future__ import annotations


class Slots:
    """The free slots of a pool. Every slot is free or has exactly one owner; an owner gives back what it took."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._free = list(reversed(range(num_slots)))
        self._used: set[int] = set()

    @property
    def num_free(self) -> int:
        """Slots that `take` can still hand out."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Slots that have an owner."""
        return len(self._used)

    def take(self) -> int | None:
        """Return a slot that is now the caller's, or None when all have owners."""
        if not self._free:
            return None
        slot = self._free.pop()
        self._used.add(slot)
        return slot

    def give_back(self, slot: int) -> None:
        """Make `slot` free again."""
        assert slot in self._used, f"slot {slot} has no owner"
        self._used.remove(slot)
        self._free.append(slot)

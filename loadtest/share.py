"""The part of a load that one of several processes makes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count

from loadtest.options import Options


@dataclass(frozen=True, slots=True)
class Share:
    """Part `index` of `count`: every `count`-th conversation, so that all parts together ask what one alone would."""

    index: int = 0
    count: int = 1

    def numbers(self) -> Iterator[int]:
        """Yield the numbers of its conversations, without end."""
        return count(self.index, self.count)

    def options(self, whole: Options) -> Options:
        """Return the options of its part of a load."""
        return replace(
            whole,
            users=self._of(whole.users),
            max_turns=None if whole.max_turns is None else self._of(whole.max_turns),
            max_in_flight=self._of(whole.max_in_flight),
        )

    def _of(self, total: int) -> int:
        return total // self.count + (self.index < total % self.count)


def shares_of(options: Options) -> list[Share]:
    """Return the shares of a load: as many as there are to be processes, or fewer where some would have nothing."""
    parts = [options.processes, options.max_in_flight]
    if options.rate is None:
        parts.append(options.users)
    if options.max_turns is not None:
        parts.append(options.max_turns)
    count = min(parts)
    return [Share(index, count) for index in range(count)]

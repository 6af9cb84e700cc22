"""How much one tenant may ask for: requests and tokens a minute, and requests that run at once.

Decided before anything runs and without a store: each server process keeps its own count.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from server.errors import RateLimitExceeded

SECONDS_PER_MINUTE = 60.0
# When a running request ends nobody knows.
RUNNING_RETRY_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Limits:
    """What a tenant may use; None: as much as there is."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_running: int | None = None


class TokenBucket:
    """A minute's allowance, which refills continuously and may be used all at once.

    It can be overdrawn: what a request generates is known only afterwards. Then it is empty for longer.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float]) -> None:
        self.capacity = per_minute
        self._per_second = per_minute / SECONDS_PER_MINUTE
        self._clock = clock
        self._level = float(per_minute)
        self._filled_at = clock()

    @property
    def level(self) -> float:
        """What is left; negative if overdrawn."""
        now = self._clock()
        self._level = min(float(self.capacity), self._level + (now - self._filled_at) * self._per_second)
        self._filled_at = now
        return self._level

    def spend(self, amount: int) -> None:
        """Take `amount`, there or not."""
        self._level = self.level - amount

    def seconds_until(self, level: float) -> float:
        """Return how long it takes to be filled up to `level`."""
        return max(0.0, (level - self.level) / self._per_second)


class Budget:
    """What one tenant has left. Belongs to the event loop."""

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_running = limits.max_running
        self._num_running = 0
        self._requests = _bucket(limits.requests_per_minute, clock)
        self._tokens = _bucket(limits.tokens_per_minute, clock)

    def take_request(self) -> None:
        """Count one request; raises `RateLimitExceeded` if the minute's are used up."""
        if self._requests is None:
            return
        if self._requests.level < 1:
            raise RateLimitExceeded("requests per minute", self._requests.seconds_until(1))
        self._requests.spend(1)

    def begin(self) -> None:
        """Count one generation in; raises `RateLimitExceeded` if too many run, or no token is left."""
        if self._max_running is not None and self._num_running >= self._max_running:
            raise RateLimitExceeded("running requests", RUNNING_RETRY_SECONDS)
        if self._tokens is not None and self._tokens.level < 1:
            raise RateLimitExceeded("tokens per minute", self._tokens.seconds_until(1))
        self._num_running += 1

    def end(self) -> None:
        """Count one generation out."""
        self._num_running -= 1

    def spend_tokens(self, num_tokens: int) -> None:
        """Take tokens that were consumed or generated."""
        if self._tokens is not None:
            self._tokens.spend(num_tokens)

    def headers(self) -> Iterator[tuple[str, str]]:
        """Yield what every reply says about the limits that are set, as OpenAI spells it."""
        for resource, bucket in (("requests", self._requests), ("tokens", self._tokens)):
            if bucket is not None:
                yield f"x-ratelimit-limit-{resource}", str(bucket.capacity)
                yield f"x-ratelimit-remaining-{resource}", str(max(0, math.floor(bucket.level)))
                yield f"x-ratelimit-reset-{resource}", f"{math.ceil(bucket.seconds_until(bucket.capacity) * 1000)}ms"


def _bucket(per_minute: int | None, clock: Callable[[], float]) -> TokenBucket | None:
    return None if per_minute is None else TokenBucket(per_minute, clock)

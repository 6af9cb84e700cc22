"""What a tenant may use: counted on a clock that the test turns."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.errors import RateLimitExceeded
from server.rate_limits import Budget, Limits, TokenBucket


class Clock:
    """Time as the test tells it."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_minutes_requests_may_come_at_once_and_then_one_by_one() -> None:
    """The refusal says when the next one is allowed, and then it is."""
    clock = Clock()
    budget = Budget(Limits(requests_per_minute=3), clock)
    for _ in range(3):
        budget.take_request()
    with pytest.raises(RateLimitExceeded) as refused:
        budget.take_request()
    assert refused.value.retry_after_seconds == pytest.approx(20)
    clock.now += 20
    budget.take_request()
    with pytest.raises(RateLimitExceeded):
        budget.take_request()


def test_an_overdrawn_minute_is_paid_back() -> None:
    """A request that generated more than was left is not cut; the next one waits until the debt is gone."""
    clock = Clock()
    budget = Budget(Limits(tokens_per_minute=60), clock)
    budget.begin()
    budget.spend_tokens(90)
    with pytest.raises(RateLimitExceeded) as refused:
        budget.begin()
    assert refused.value.retry_after_seconds == pytest.approx(31)
    clock.now += 31
    budget.begin()


def test_only_so_many_run_at_once() -> None:
    """One that ends makes room for another; one that was refused took none."""
    budget = Budget(Limits(max_running=2))
    budget.begin()
    budget.begin()
    for _ in range(2):
        with pytest.raises(RateLimitExceeded, match="running"):
            budget.begin()
    budget.end()
    budget.begin()


def test_without_limits_nothing_is_refused_or_told() -> None:
    """A server without limits says nothing about any."""
    budget = Budget(Limits())
    for _ in range(1000):
        budget.take_request()
        budget.begin()
        budget.spend_tokens(10**9)
    assert list(budget.headers()) == []


def test_headers_say_what_is_left_and_when_it_is_whole_again() -> None:
    """In OpenAI's names; an overdrawn bucket has nothing left, not less."""
    clock = Clock()
    budget = Budget(Limits(requests_per_minute=60, tokens_per_minute=600), clock)
    budget.take_request()
    budget.spend_tokens(601)
    assert dict(budget.headers()) == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "59",
        "x-ratelimit-reset-requests": "1000ms",
        "x-ratelimit-limit-tokens": "600",
        "x-ratelimit-remaining-tokens": "0",
        "x-ratelimit-reset-tokens": "60100ms",
    }


@given(
    per_minute=st.integers(1, 1000),
    steps=st.lists(st.tuples(st.floats(0, 300), st.integers(0, 50)), max_size=40),
)
def test_no_stretch_of_time_gives_more_than_its_share(per_minute: int, steps: list[tuple[float, int]]) -> None:
    """Whatever is asked for and when: granted is at most one full bucket and what flowed in since."""
    clock = Clock()
    bucket = TokenBucket(per_minute, clock)
    granted = 0
    for seconds, num_wanted in steps:
        clock.now += seconds
        for _ in range(num_wanted):
            if bucket.level >= 1:
                bucket.spend(1)
                granted += 1
    assert granted <= per_minute * (1 + (clock.now - 100) / 60) + 1e-6
    assert bucket.level <= per_minute

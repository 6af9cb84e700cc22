"""What is asked of a server depends on the seed alone."""

from __future__ import annotations

from itertools import islice, pairwise
from statistics import mean

from loadtest.options import Options, Span
from loadtest.workload import Workload


def options(seed: int = 0, **changes: object) -> Options:
    """Return options with varied conversations."""
    settings = {"conversation_turns": Span(2, 6), "prompt_words": Span(3, 30), "max_tokens": Span(1, 90)} | changes
    return Options(url="http://unused", seed=seed, **settings)  # type: ignore[arg-type]


def test_the_same_seed_asks_for_the_same() -> None:
    """A conversation's plan depends on the seed and its number, not on when or in what order it is made."""
    one, two = Workload(options()), Workload(options())
    assert [one.conversation(number) for number in (3, 1, 2)] == [
        two.conversation(3),
        two.conversation(1),
        two.conversation(2),
    ]
    assert list(islice(one.arrivals(5.0), 50)) == list(islice(two.arrivals(5.0), 50))


def test_another_seed_asks_for_something_else() -> None:
    """Seeds and numbers change words and arrivals."""
    one, two = Workload(options(seed=1)), Workload(options(seed=2))
    assert one.conversation(0) != two.conversation(0)
    assert one.conversation(0).turns != one.conversation(1).turns
    assert next(one.arrivals(1.0)) != next(two.arrivals(1.0))


def test_plans_stay_within_what_was_asked_for() -> None:
    """Turns, words and lengths lie in their spans, and the first turn of a conversation does not wait."""
    workload = Workload(options(think_seconds=2.0))
    for number in range(100):
        turns = workload.conversation(number).turns
        assert 2 <= len(turns) <= 6
        assert turns[0].think_seconds == 0.0
        assert all(turn.think_seconds > 0.0 for turn in turns[1:])
        assert all(3 <= len(turn.prompt.split()) <= 30 and 1 <= turn.max_tokens <= 90 for turn in turns)


def test_arrivals_are_a_poisson_process() -> None:
    """Gaps between arrivals have the mean and the spread of an exponential distribution."""
    gaps = [later - earlier for earlier, later in pairwise(islice(Workload(options()).arrivals(4.0), 4000))]
    assert min(gaps) > 0.0
    assert abs(mean(gaps) - 0.25) < 0.02
    assert abs(mean(gap * gap for gap in gaps) - 2 * 0.25**2) < 0.02
    assert abs(sum(gap > 0.25 for gap in gaps) / len(gaps) - 0.3679) < 0.03

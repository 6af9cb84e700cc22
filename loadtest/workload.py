"""Who says what, and when. Everything random about a load test comes from here, and from its seed alone.

A conversation's plan depends on the seed and its number, never on timing, so two runs with one seed ask for the same
work however fast the servers are.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from loadtest.options import Options

PHRASES = """
the river carries a small boat under old bridge while morning light falls on quiet water and someone sings
about home far away where winter comes early but people keep warm by telling stories of summer gardens stone
walls green hills bread salt apples honey wind rain thunder silver bells wooden doors open windows long roads
tired horses good friends lost letters found again music in every street piano strings held notes that do not
fade until you lift your foot from pedal so listen now what happens next why did it begin here who will answer
me
"""
WORDS = tuple(PHRASES.split())


@dataclass(frozen=True, slots=True)
class TurnPlan:
    """One thing a user will say."""

    prompt: str
    max_tokens: int
    think_seconds: float  # between the reply before it and this turn; 0 for the first
    seed: int  # of the server's sampling


@dataclass(frozen=True, slots=True)
class ConversationPlan:
    """Everything one user will say."""

    number: int
    turns: tuple[TurnPlan, ...]


class Workload:
    """The conversations of one load test, numbered from 0, and the times at which they arrive."""

    def __init__(self, options: Options) -> None:
        self._options = options

    def arrivals(self, rate: float) -> Iterator[float]:
        """Yield the seconds since the beginning at which conversations arrive: a Poisson process without end."""
        randomness = random.Random(f"{self._options.seed} arrivals")
        seconds = 0.0
        while True:
            seconds += randomness.expovariate(rate)
            yield seconds

    def conversation(self, number: int) -> ConversationPlan:
        """Return the plan of conversation `number`."""
        randomness = random.Random(f"{self._options.seed} conversation {number}")
        num_turns = self._options.conversation_turns.draw(randomness)
        return ConversationPlan(number, tuple(self._turn(randomness, idx) for idx in range(num_turns)))

    def _turn(self, randomness: random.Random, idx: int) -> TurnPlan:
        options = self._options
        words = randomness.choices(WORDS, k=options.prompt_words.draw(randomness))
        pause = randomness.expovariate(1.0)
        return TurnPlan(
            prompt=" ".join(words).capitalize() + ".",
            max_tokens=options.max_tokens.draw(randomness),
            think_seconds=pause * options.think_seconds if idx else 0.0,
            seed=randomness.getrandbits(32),
        )

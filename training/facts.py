"""What people tell in our dialogues: kinds of facts, how each is told and asked for, and the words for them.

The lists lie in `dialogues.json`. This module knows them and how to fill a sentence; nothing of turns.
"""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Literal

import msgspec

Half = Literal["training", "held out"]

HELD_OUT_STRIDE = 10  # every tenth value of a list is never told in training
_FEWEST_TO_SPLIT = 15  # of shorter lists (days, seasons) no value is held out


class Kind(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A kind of fact: how it is told and asked for. `{v}` is the value, `{s}` whom it is about (a dog, a sister)."""

    values: str  # name of the list of values
    clauses: tuple[str, ...]  # "my name is {v}": what a user says, as part of a sentence
    answer: str  # "your name is {v}": the same, said back
    asks: tuple[str, ...]
    noun: str  # "your name"
    echoes: tuple[str, ...] = ()
    subjects: tuple[str, ...] = ("",)
    sole_asks: tuple[str, ...] = ()  # questions that fit whatever the subject is: "what pet do I have?"
    sole_answer: str = ""
    frequency: int = 1


class Lexicon(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All that the dialogues are made of."""

    values: dict[str, list[str]]
    kinds: tuple[Kind, ...]  # the first three are name, colour and pet
    exchanges: list[tuple[str, str]]  # small talk: what is said and what is answered
    tables: dict[str, dict[str, str]]  # capitals, opposites, ...


class Fact(msgspec.Struct, frozen=True):
    """Something that a user told."""

    kind: Kind
    subject: str
    value: str

    def fill(self, template: str) -> str:
        """Return the template with this fact in it, with `an` where English wants it."""
        text = template.replace("{s}", self.subject).replace("{v}", self.value)
        for vowel in "aeiou":
            text = text.replace(f" a {vowel}", f" an {vowel}")
        return text


@cache
def lexicon() -> Lexicon:
    """Return the lists behind the dialogues."""
    return msgspec.json.decode(resources.files(__package__).joinpath("dialogues.json").read_bytes(), type=Lexicon)


@cache
def values(name: str, half: Half | None = None) -> list[str]:
    """Return a list of values: those told in training, those held out, or all."""
    everything = lexicon().values[name]
    if half is None or len(everything) < _FEWEST_TO_SPLIT:
        return everything
    return [value for index, value in enumerate(everything) if (index % HELD_OUT_STRIDE == 3) == (half == "held out")]


@cache
def held_out_words() -> frozenset[str]:
    """Return every held-out value of any list, in small letters: no invented word may be one."""
    return frozenset(
        value.lower()
        for name, everything in lexicon().values.items()
        if len(everything) >= _FEWEST_TO_SPLIT
        for value in values(name, "held out")
    )

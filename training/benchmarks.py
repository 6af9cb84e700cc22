"""Public measures of a language model: LAMBADA, multiple choice, and bits per byte of a text with the state carried.

LAMBADA has two protocols, which give two different numbers. BlinkDL's puts the end-of-text id before each passage; the
plain one does not. Both ask for the last word: it counts if each of its tokens is the most likely one, and the
perplexity is that of whole words, so neither depends on how a tokenizer cuts them.
"""

from __future__ import annotations

import gzip
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from training.data import END_OF_TEXT_ID
from training.evaluate import Score
from training.scoring import Encoder, Example, Scorer


@dataclass(frozen=True, slots=True)
class LambadaScore:
    """Accuracy and perplexity of the last words of passages."""

    num_passages: int
    accuracy: float
    perplexity: float


class Question(msgspec.Struct, frozen=True):
    """A multiple-choice question: which choice follows the context."""

    context: str
    choices: list[str]  # as they follow the context, with the space before them
    answer: int


@dataclass(frozen=True, slots=True)
class ChoiceScore:
    """Shares of questions answered rightly, by the likelihood of choices and by that of each byte of them."""

    num_questions: int
    accuracy: float
    accuracy_per_byte: float


def lambada(scorer: Scorer, tokenizer: Encoder, passages: Sequence[str], *, prefix_end_of_text: bool) -> LambadaScore:
    """Score passages whose last word, with the space before it, is to be foretold."""
    prefix = [END_OF_TEXT_ID] if prefix_end_of_text else []
    pairs = [passage.rsplit(" ", 1) for passage in passages]
    examples = [Example(prefix + tokenizer.encode(text), tokenizer.encode(" " + word)) for text, word in pairs]
    found = scorer.score(examples)
    log_probability = sum(likelihood.log_probability for likelihood in found) / len(found)
    accuracy = sum(likelihood.is_greedy for likelihood in found) / len(found)
    return LambadaScore(len(found), accuracy, math.exp(-log_probability))


def multiple_choice(scorer: Scorer, tokenizer: Encoder, questions: Sequence[Question]) -> ChoiceScore:
    """Score questions by which of their choices is likeliest, as it is and for each of its bytes."""
    examples = [
        Example([END_OF_TEXT_ID, *tokenizer.encode(question.context)], tokenizer.encode(choice))
        for question in questions
        for choice in question.choices
    ]
    found = iter(scorer.score(examples))
    right = right_per_byte = 0
    for question in questions:
        scores = [next(found).log_probability for _ in question.choices]
        per_byte = [score / len(choice.encode()) for score, choice in zip(scores, question.choices, strict=True)]
        right += scores.index(max(scores)) == question.answer
        right_per_byte += per_byte.index(max(per_byte)) == question.answer
    return ChoiceScore(len(questions), right / len(questions), right_per_byte / len(questions))


def score_text(scorer: Scorer, tokenizer: Encoder, text: str) -> Score:
    """Score a text from its first token to its last, the state carried through all of it."""
    ids = [END_OF_TEXT_ID, *tokenizer.encode(text)]
    return Score(-scorer.log_probability(ids), len(ids) - 1, len(text.encode()))


def read_passages(path: Path) -> list[str]:
    """The `text` of every JSON line that has one."""
    return [str(record["text"]) for record in _records(path) if "text" in record]


def read_questions(path: Path) -> list[Question]:
    """The multiple-choice questions of a file of JSON lines; lines without choices are notices."""
    return [msgspec.convert(record, Question) for record in _records(path) if "choices" in record]


def read_text(path: Path) -> str:
    """A text file, gzipped or not."""
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix == ".gz" else data).decode()


def _records(path: Path) -> Iterator[dict[str, object]]:
    for line in read_text(path).splitlines():
        yield msgspec.json.decode(line, type=dict[str, object])

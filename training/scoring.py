"""Log-probabilities of continuations and texts by a model in this process; `training.served` asks a server for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn.functional import log_softmax

from training.data import END_OF_TEXT_ID
from training.model import Rwkv7, TrainingState

_EXAMPLES_AT_ONCE = 16
_WINDOW_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Example:
    """What is given, at least one id, and what is to follow."""

    context: list[int]
    continuation: list[int]


@dataclass(frozen=True, slots=True)
class Likelihood:
    """How likely a continuation is, in nats, and whether it is what greedy decoding says."""

    log_probability: float
    is_greedy: bool


class Encoder(Protocol):
    """Cuts texts into tokens."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`; what looks like a special token in it is text like any other."""


class Scorer(Protocol):
    """Scores examples, in their order, and whole texts."""

    def score(self, examples: Sequence[Example]) -> list[Likelihood]:
        """Return the likelihood of each continuation after its context."""

    def log_probability(self, ids: Sequence[int]) -> float:
        """Return that of all `ids` after the first, in nats, the state carried from one end to the other."""


class LocalScorer:
    """Scores with a model in this process."""

    def __init__(self, model: Rwkv7) -> None:
        self._model = model.eval()

    def score(self, examples: Sequence[Example]) -> list[Likelihood]:
        """Return the likelihood of each continuation after its context."""
        order = sorted(range(len(examples)), key=lambda index: size_of(examples[index]))
        found: dict[int, Likelihood] = {}
        for begin in range(0, len(order), _EXAMPLES_AT_ONCE):
            indices = order[begin : begin + _EXAMPLES_AT_ONCE]
            found |= zip(indices, self._score([examples[index] for index in indices]), strict=True)
        return [found[index] for index in range(len(examples))]

    @torch.no_grad()
    def log_probability(self, ids: Sequence[int]) -> float:
        """Return that of all `ids` after the first, window after window."""
        tokens = torch.tensor([ids], device=self._model.emb.weight.device)
        state: TrainingState | None = None
        total = 0.0
        for begin in range(0, len(ids) - 1, _WINDOW_TOKENS):
            end = min(begin + _WINDOW_TOKENS, len(ids) - 1)
            x, state = self._model(tokens[:, begin:end], state)
            log_probabilities = log_softmax(self._model.logits(x[0]).float(), dim=-1)
            total += float(log_probabilities.gather(1, tokens[0, begin + 1 : end + 1].unsqueeze(1)).sum())
        return total

    @torch.no_grad()
    def _score(self, examples: Sequence[Example]) -> list[Likelihood]:
        """Score some together, filled up on the right, where nothing sees the filling."""
        ids = torch.full((len(examples), max(map(size_of, examples)) - 1), END_OF_TEXT_ID)
        for row, example in enumerate(examples):
            ids[row, : size_of(example) - 1] = torch.tensor((example.context + example.continuation)[:-1])
        x, _ = self._model(ids.to(self._model.emb.weight.device))
        likelihoods = []
        for row, example in enumerate(examples):
            begin = len(example.context) - 1
            logits = self._model.logits(x[row, begin : begin + len(example.continuation)]).float()
            wanted = torch.tensor(example.continuation, device=logits.device)
            chosen = log_softmax(logits, dim=-1).gather(1, wanted.unsqueeze(1))
            likelihoods.append(Likelihood(float(chosen.sum()), bool((logits.argmax(dim=-1) == wanted).all())))
        return likelihoods


def size_of(example: Example) -> int:
    """Number of tokens of context and continuation."""
    return len(example.context) + len(example.continuation)

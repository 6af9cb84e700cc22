"""Log-probabilities of continuations, computed here or asked of a server: the numbers are the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import httpx
import torch
from torch.nn.functional import log_softmax

from training.data import END_OF_TEXT_ID
from training.model import Rwkv7

_EXAMPLES_AT_ONCE = 16


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


class Scorer(Protocol):
    """Scores examples, in their order."""

    def score(self, examples: Sequence[Example]) -> list[Likelihood]:
        """Return the likelihood of each continuation after its context."""


class LocalScorer:
    """Scores with a model in this process."""

    def __init__(self, model: Rwkv7) -> None:
        self._model = model.eval()

    def score(self, examples: Sequence[Example]) -> list[Likelihood]:
        """Return the likelihood of each continuation after its context."""
        order = sorted(range(len(examples)), key=lambda index: _size(examples[index]))
        found: dict[int, Likelihood] = {}
        for begin in range(0, len(order), _EXAMPLES_AT_ONCE):
            indices = order[begin : begin + _EXAMPLES_AT_ONCE]
            found |= zip(indices, self._score([examples[index] for index in indices]), strict=True)
        return [found[index] for index in range(len(examples))]

    @torch.no_grad()
    def _score(self, examples: Sequence[Example]) -> list[Likelihood]:
        """Score some together, filled up on the right, where nothing sees the filling."""
        ids = torch.full((len(examples), max(map(_size, examples)) - 1), END_OF_TEXT_ID)
        for row, example in enumerate(examples):
            ids[row, : _size(example) - 1] = torch.tensor((example.context + example.continuation)[:-1])
        x, _ = self._model(ids.to(self._model.emb.weight.device))
        likelihoods = []
        for row, example in enumerate(examples):
            begin = len(example.context) - 1
            logits = self._model.logits(x[row, begin : begin + len(example.continuation)]).float()
            wanted = torch.tensor(example.continuation, device=logits.device)
            chosen = log_softmax(logits, dim=-1).gather(1, wanted.unsqueeze(1))
            likelihoods.append(Likelihood(float(chosen.sum()), bool((logits.argmax(dim=-1) == wanted).all())))
        return likelihoods


class HttpScorer:
    """Asks a server's `/v1/completions` to echo log-probabilities, as lm-evaluation-harness does."""

    def __init__(self, client: httpx.Client, model: str) -> None:
        self._client, self._model = client, model

    def score(self, examples: Sequence[Example]) -> list[Likelihood]:
        """Return the likelihood of each continuation after its context. Raises `httpx.HTTPStatusError`."""
        likelihoods: list[Likelihood] = []
        remaining = iter(examples)
        while some := list(islice(remaining, _EXAMPLES_AT_ONCE)):
            body = {
                "model": self._model,
                "prompt": [example.context + example.continuation for example in some],
                "max_tokens": 1,
                "temperature": 0,
                "logprobs": 1,
                "echo": True,
            }
            response = self._client.post("/v1/completions", json=body).raise_for_status()
            choices = sorted(response.json()["choices"], key=lambda choice: choice["index"])
            likelihoods += [_read(choice["logprobs"], example) for choice, example in zip(choices, some, strict=True)]
        return likelihoods


def _read(logprobs: dict[str, Any], example: Example) -> Likelihood:
    span = slice(len(example.context), _size(example))
    own, best = logprobs["token_logprobs"][span], logprobs["top_logprobs"][span]
    is_greedy = all(value == max(top.values()) for value, top in zip(own, best, strict=True))
    return Likelihood(sum(own), is_greedy)


def _size(example: Example) -> int:
    return len(example.context) + len(example.continuation)

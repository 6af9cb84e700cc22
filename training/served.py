"""A model behind a server, measured over HTTP: its tokens, its log-probabilities, and what its conversations remember.

Only public routes are asked, as lm-evaluation-harness does; nothing is known of the server but its address.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, TypeVar

import httpx

from training.dialogues import RecallProbe
from training.documents import chat
from training.scoring import Encoder, Example, Likelihood, size_of

ANSWER_TOKENS = 24
_EXAMPLES_AT_ONCE = 16
_CONVERSATIONS_AT_ONCE = 8

Result = TypeVar("Result")


class RefusedError(Exception):
    """The server refused a request; says what it said."""


class Server:
    """A server and the model's name there; None is the one it serves."""

    def __init__(self, client: httpx.Client, model: str | None = None) -> None:
        self._client, self._model = client, model

    def post(self, route: str, body: dict[str, Any], headers: dict[str, str] | None = None) -> dict[str, Any]:
        """Return the reply to `body`. Raises `RefusedError`, and `httpx.HTTPError` if there is none."""
        named = {} if self._model is None else {"model": self._model}
        response = self._client.post(route, json=named | body, headers=headers)
        if response.status_code != 200:
            raise RefusedError(f"{route} answered {response.status_code}: {response.text[:500]}")
        reply: dict[str, Any] = response.json()
        return reply


class ServedEncoder:
    """Cuts texts into tokens by the server's `/tokenize`; remembers what it has cut."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._known: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`."""
        if text not in self._known:
            self._known[text] = self._server.post("/tokenize", {"prompt": text})["tokens"]
        return self._known[text]


class HttpScorer:
    """Asks `/v1/completions` to echo log-probabilities."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def score(self, examples: Sequence[Example]) -> list[Likelihood]:
        """Return the likelihood of each continuation after its context."""
        likelihoods: list[Likelihood] = []
        remaining = iter(examples)
        while some := list(islice(remaining, _EXAMPLES_AT_ONCE)):
            prompts = [example.context + example.continuation for example in some]
            choices = self._echo(prompts, num_logprobs=1)
            likelihoods += [_read(choice["logprobs"], example) for choice, example in zip(choices, some, strict=True)]
        return likelihoods

    def log_probability(self, ids: Sequence[int]) -> float:
        """Return that of all `ids` after the first. They are one prompt, so the server carries the state."""
        [choice] = self._echo([list(ids)], num_logprobs=0)
        return math.fsum(choice["logprobs"]["token_logprobs"][1 : len(ids)])

    def _echo(self, prompts: list[list[int]], num_logprobs: int) -> list[dict[str, Any]]:
        body = {"prompt": prompts, "max_tokens": 1, "temperature": 0, "logprobs": num_logprobs, "echo": True}
        choices: list[dict[str, Any]] = self._server.post("/v1/completions", body)["choices"]
        return sorted(choices, key=lambda choice: choice["index"])


def _read(logprobs: dict[str, Any], example: Example) -> Likelihood:
    span = slice(len(example.context), size_of(example))
    own, best = logprobs["token_logprobs"][span], logprobs["top_logprobs"][span]
    is_greedy = all(value == max(top.values()) for value, top in zip(own, best, strict=True))
    return Likelihood(sum(own), is_greedy)


class ServedRecall:
    """Tells facts in conversations and asks for them, now or later: what lies between is the server's to survive."""

    def __init__(self, server: Server, encoder: Encoder, prefix: str) -> None:
        self._server, self._encoder, self._prefix = server, encoder, prefix

    def tell(self, probes: Sequence[RecallProbe], name: str) -> None:
        """Hold every dialogue up to its question, each in a conversation of its own: prefix, `name`, number."""

        def tell_one(index: int) -> None:
            pieces = chat(probes[index].messages[:-1], 0.0)
            ids = [token for piece in pieces for token in self._encoder.encode(piece.text)]
            body = {"prompt": ids, "max_tokens": 0, "conversation_id": self._id(name, index)}
            self._server.post("/v1/completions", body, {"if-match": "0"})

        self._for_each(tell_one, len(probes))

    def ask(self, probes: Sequence[RecallProbe], name: str) -> list[tuple[str, str]]:
        """Ask every dialogue's question at temperature 0; returns (expected, answer). It can be asked once."""

        def ask_one(index: int) -> tuple[str, str]:
            body = {
                "messages": probes[index].messages[-1:],
                "conversation": self._id(name, index),
                "max_tokens": ANSWER_TOKENS,
                "temperature": 0,
                "stop": ["\n\n"],
            }
            reply = self._server.post("/v1/chat/completions", body, {"if-match": "1"})
            return probes[index].expected, reply["choices"][0]["message"]["content"]

        return self._for_each(ask_one, len(probes))

    def _id(self, name: str, index: int) -> str:
        return f"{self._prefix}-{name}-{index}"

    def _for_each(self, work: Callable[[int], Result], count: int) -> list[Result]:
        with ThreadPoolExecutor(_CONVERSATIONS_AT_ONCE) as pool:
            return list(pool.map(work, range(count)))

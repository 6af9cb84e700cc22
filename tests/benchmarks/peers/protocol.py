"""How a peer is spoken to: a line of JSON in, a line of JSON out. Imported first, in whatever environment it has."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Protocol

BOS = 0

# What was standard output carries the answers; whatever else is printed, from the first import on, is an error's.
_answers = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)


class Peer(Protocol):
    """One implementation with its weights loaded."""

    max_batch: int  # sequences it can decode together
    max_prompt: int  # tokens of a prompt it is timed with: fewer where each takes a step of its own

    def begin(self, batch_size: int) -> None:
        """Forget everything; `batch_size` empty sequences begin."""
        ...

    def decode(self, token_ids: list[int]) -> None:
        """Consume one token of every sequence and compute its logits."""
        ...

    def last_logits(self) -> list[float]:
        """Return the last sequence's logits as `decode` computed them."""
        ...

    def prefill(self, token_ids: list[int]) -> list[float]:
        """Consume a prompt from the empty history; return the logits after it."""
        ...


def answer_questions(peer: Peer) -> None:
    """Answer until standard input ends."""
    print(json.dumps({"max_batch": peer.max_batch, "max_prompt": peer.max_prompt}), file=_answers)
    for line in sys.stdin:
        question = json.loads(line)
        print(json.dumps(_answer(peer, **question)), file=_answers)


def _answer(peer: Peer, what: str, token_ids: list[int], batch_size: int = 1) -> object:
    """Return logits after `token_ids` as a prompt, or decoded by the last of some sequences; or how long either takes.

    Where logits are wanted, the sequences before the last are late by one token each: no two consume the same.
    """
    if what == "prompt_logits":
        return peer.prefill(token_ids)
    if what == "decode_logits":
        peer.begin(batch_size)
        for step in range(len(token_ids)):
            peer.decode([token_ids[step - batch_size + 1 + row] for row in range(batch_size)])
        return peer.last_logits()
    if what == "decode":
        peer.begin(batch_size)
        peer.decode([BOS] * batch_size)  # not counted
        started_at = time.perf_counter()
        for token_id in token_ids:
            peer.decode([token_id] * batch_size)
    else:
        started_at = time.perf_counter()
        peer.prefill(token_ids)
    return time.perf_counter() - started_at

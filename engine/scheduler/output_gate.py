"""What of a sequence's sampled tokens may be delivered. Knows tokens and their bytes, not states or slots.

A token is held back while any of its bytes might become part of a stop string. Either the match dies and the token is
released as it is, or it completes and the token is cut: what stands before the stop string is put into tokens of its
own.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from engine.messages import TokenLogprobs
from engine.scheduler.stop_matcher import StopMatcher

_log = logging.getLogger(__name__)


class ByteVocabulary(Protocol):
    """The part of a tokenizer that speaks of bytes."""

    def token_bytes(self, token_id: int) -> bytes:
        """Return what the token adds to the text."""
        ...

    def encode_bytes(self, data: bytes) -> list[int]:
        """Return tokens whose bytes are `data`, which need not be whole characters."""
        ...


class SampledToken(NamedTuple):
    """A token and, when asked for, its log-probabilities."""

    token_id: int
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True, slots=True)
class StopMatch:
    """A stop string was completed; nothing is held any more."""

    stop_string: bytes
    remnant: list[SampledToken]  # the part of a token before the stop string, as tokens of their own
    num_lost_bytes: int = 0  # of that part, which no tokens of the vocabulary could spell


class OutputGate:
    """Holds back what may yet turn out to be part of a stop string."""

    def __init__(self, vocabulary: ByteVocabulary, stop_strings: Iterable[bytes]) -> None:
        self._vocabulary = vocabulary
        self._matcher = StopMatcher(strings) if (strings := list(stop_strings)) else None
        self._held: deque[tuple[SampledToken, bytes]] = deque()
        self._num_held_bytes = 0

    @property
    def num_held(self) -> int:
        """Tokens sampled and not released."""
        return len(self._held)

    def push(self, token: SampledToken) -> tuple[list[SampledToken], StopMatch | None]:
        """Take the next token; returns the tokens that are released now, in order, and the match if there is one."""
        data = self._vocabulary.token_bytes(token.token_id)
        if self._matcher is None:
            return [token], None
        self._held.append((token, data))
        self._num_held_bytes += len(data)
        match = self._matcher.push(data)
        if match is None:
            return self._release(self._num_held_bytes - self._matcher.num_undecided_bytes), None
        stop_string, num_bytes_after = match
        num_bytes_before = self._num_held_bytes - num_bytes_after - len(stop_string)
        num_held_bytes = self._num_held_bytes
        released = self._release(num_bytes_before)
        num_released_bytes = num_held_bytes - self._num_held_bytes
        return released, self._cut(stop_string, num_bytes_before - num_released_bytes)

    def flush(self) -> list[SampledToken]:
        """Release everything: the sequence ended, so no held byte can become part of a stop string any more."""
        released = [token for token, _ in self._held]
        self._forget_held()
        return released

    def _release(self, num_bytes: int) -> list[SampledToken]:
        """Release the tokens that lie wholly in the first `num_bytes` held bytes.

        A token without bytes after them waits with those it follows.
        """
        released = []
        while self._held and len(self._held[0][1]) <= num_bytes:
            token, data = self._held.popleft()
            num_bytes -= len(data)
            self._num_held_bytes -= len(data)
            released.append(token)
        return released

    def _cut(self, stop_string: bytes, num_remnant_bytes: int) -> StopMatch:
        """Spell the first bytes of the token in which the stop string begins, and drop the rest."""
        if not num_remnant_bytes:
            self._forget_held()
            return StopMatch(stop_string, [])
        token, data = self._held[0]
        self._forget_held()
        token_ids = spell(self._vocabulary, data[:num_remnant_bytes])
        # The pieces were never sampled: each carries the log-probabilities of the token it was cut from.
        remnant = [SampledToken(token_id, token.logprobs) for token_id in token_ids]
        return StopMatch(stop_string, remnant, num_lost_bytes=0 if token_ids else num_remnant_bytes)

    def _forget_held(self) -> None:
        self._held.clear()
        self._num_held_bytes = 0


def spell(vocabulary: ByteVocabulary, data: bytes) -> list[int]:
    """Return tokens whose bytes are exactly `data`: encoded in one piece, else byte by byte, else none at all."""
    for pieces in ([data], [data[i : i + 1] for i in range(len(data))]):
        try:
            token_ids = [token_id for piece in pieces for token_id in vocabulary.encode_bytes(piece)]
        except Exception:  # whatever a vocabulary answers to bytes that are not text, there is still the other way
            _log.warning("the tokenizer cannot encode %d bytes before a stop string", len(data), exc_info=True)
            continue
        if b"".join(map(vocabulary.token_bytes, token_ids)) == data:
            return token_ids
    return []

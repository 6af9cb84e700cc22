"""What each slot's request has consumed and generated, as far as its penalties need to know.

The repetition penalty looks at every token of the request, prompt included, once or more. Presence and frequency look
at generated tokens, with RWKV's decay: each generated token multiplies all counts by `penalty_decay`, then adds one to
its own. Tokens generated earlier in a conversation can be counted before a request begins; then both penalties are the
same function of the conversation, wherever it was interrupted. Only tokens that came are held, in host memory: a
request has few of them, a vocabulary has many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from engine.messages import SamplingParams

Ids = npt.NDArray[np.int64]
Counts = npt.NDArray[np.float32]


class PenaltyCounters:
    """Counters by slot. A slot is `reset` when its owner changes, so no request is penalised for another's tokens."""

    def __init__(self, num_slots: int) -> None:
        self._consumed = [_Consumed() for _ in range(num_slots)]
        self._generated = [_Generated() for _ in range(num_slots)]

    def reset(self, slot: int) -> None:
        """Forget everything about the slot."""
        self._consumed[slot], self._generated[slot] = _Consumed(), _Generated()

    def count(self, slot: int, token_ids: Sequence[int], params: SamplingParams) -> None:
        """Begin a slot that was just `reset` as if its request had generated `token_ids`."""
        self._consumed[slot].tokens.extend(token_ids)
        if _counts_tokens(params):
            self._generated[slot] = _Generated.after(token_ids, params.penalty_decay)

    def consume(self, slot: int, token_ids: Sequence[int]) -> None:
        """Note that the slot's request consumed tokens of its own: prompt, or generated ones fed back."""
        self._consumed[slot].tokens.extend(token_ids)

    def apply(self, logits: torch.Tensor, slots: Sequence[int], params: Sequence[SamplingParams]) -> None:
        """Penalise the rows of `logits[R, V]` in place: repetition, then presence and frequency."""
        self._apply_repetition(logits, [i for i, p in enumerate(params) if p.repetition_penalty != 1], slots, params)
        self._apply_counts(logits, [i for i, p in enumerate(params) if _counts_tokens(p)], slots, params)

    def generate(self, slots: Sequence[int], token_ids: Sequence[int], params: Sequence[SamplingParams]) -> None:
        """Count the tokens that were just sampled."""
        for slot, token_id, p in zip(slots, token_ids, params, strict=True):
            if _counts_tokens(p):
                self._generated[slot].add(token_id, p.penalty_decay)

    def _apply_repetition(
        self, logits: torch.Tensor, rows: list[int], slots: Sequence[int], params: Sequence[SamplingParams]
    ) -> None:
        if not rows:
            return
        ids = [self._consumed[slots[row]].distinct() for row in rows]
        penalties = [
            np.full(len(each), params[row].repetition_penalty, np.float32) for row, each in zip(rows, ids, strict=True)
        ]
        where, penalty = _places(logits, rows, ids), torch.from_numpy(np.concatenate(penalties)).to(logits.device)
        before = logits[where]
        logits[where] = torch.where(before > 0, before / penalty, before * penalty)

    def _apply_counts(
        self, logits: torch.Tensor, rows: list[int], slots: Sequence[int], params: Sequence[SamplingParams]
    ) -> None:
        if not rows:
            return
        found = [self._generated[slots[row]] for row in rows]
        penalties = [
            params[row].presence_penalty * (each.counts > 0).astype(np.float32)
            + params[row].frequency_penalty * each.counts
            for row, each in zip(rows, found, strict=True)
        ]
        where = _places(logits, rows, [each.ids for each in found])
        logits[where] -= torch.from_numpy(np.concatenate(penalties)).to(logits.device)


@dataclass(slots=True, eq=False)
class _Consumed:
    """Tokens a request consumed; looked through only once its penalty asks."""

    tokens: list[int] = field(default_factory=list)
    _seen: Ids = field(default_factory=lambda: np.empty(0, np.int64))
    _num_looked_at: int = 0

    def distinct(self) -> Ids:
        """Return every token that came, once."""
        new = self.tokens[self._num_looked_at :]
        if new:
            self._seen = np.union1d(self._seen, new)
            self._num_looked_at = len(self.tokens)
        return self._seen


@dataclass(slots=True, eq=False)
class _Generated:
    """Tokens a request generated, with their decayed counts."""

    ids: Ids = field(default_factory=lambda: np.empty(0, np.int64))
    counts: Counts = field(default_factory=lambda: np.empty(0, np.float32))
    _index: dict[int, int] = field(default_factory=dict)

    @classmethod
    def after(cls, token_ids: Sequence[int], decay: float) -> _Generated:
        """Return what `add` makes of all of `token_ids`, bit for bit, without growing token by token."""
        index = {token_id: place for place, token_id in enumerate(dict.fromkeys(token_ids))}
        counts = np.zeros(len(index), np.float32)
        for token_id in token_ids:
            counts *= np.float32(decay)
            counts[index[token_id]] += 1
        return cls(np.array(list(index), np.int64), counts, index)

    def add(self, token_id: int, decay: float) -> None:
        """Count one more token."""
        self.counts *= np.float32(decay)
        index = self._index.setdefault(token_id, len(self.ids))
        if index == len(self.ids):
            self.ids, self.counts = np.append(self.ids, token_id), np.append(self.counts, np.float32(0))
        self.counts[index] += 1


def _places(logits: torch.Tensor, rows: Sequence[int], ids: Sequence[Ids]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the index into `logits[R, V]` of every row's ids, row by row; no place comes twice."""
    row_of_each = np.repeat(np.array(rows, np.int64), [len(each) for each in ids])
    return torch.from_numpy(row_of_each).to(logits.device), torch.from_numpy(np.concatenate(ids)).to(logits.device)


def _counts_tokens(params: SamplingParams) -> bool:
    return params.presence_penalty != 0 or params.frequency_penalty != 0

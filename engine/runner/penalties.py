"""What each slot's request has consumed and generated, as far as its penalties need to know.

The repetition penalty looks at every token of the request, prompt included, once or more. Presence and frequency look
at generated tokens, with RWKV's decay: each generated token multiplies all counts by `penalty_decay`, then adds one to
its own. Rows of vocabulary size exist only once a request uses them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from engine.messages import SamplingParams


class PenaltyCounters:
    """Counters by slot. A slot is `reset` when its owner changes, so no request is penalised for another's tokens."""

    def __init__(self, num_slots: int, vocab_size: int, device: torch.device) -> None:
        self._device = device
        self._shape = (num_slots, vocab_size)
        self._consumed: list[list[int]] = [[] for _ in range(num_slots)]
        self._num_seen = [0] * num_slots  # how many of the consumed are marked in _seen
        self._seen: torch.Tensor | None = None  # [S, V] bool
        self._counts: torch.Tensor | None = None  # [S, V] float32
        self._dirty: set[int] = set()  # slots whose rows hold something

    def reset(self, slot: int) -> None:
        """Forget everything about the slot."""
        self._consumed[slot] = []
        self._num_seen[slot] = 0
        if slot in self._dirty:
            self._dirty.remove(slot)
            for rows in (self._seen, self._counts):
                if rows is not None:
                    rows[slot].zero_()

    def consume(self, slot: int, token_ids: Sequence[int]) -> None:
        """Note that the slot's request consumed tokens of its own: prompt, or generated ones fed back."""
        self._consumed[slot].extend(token_ids)

    def apply(self, logits: torch.Tensor, slots: Sequence[int], params: Sequence[SamplingParams]) -> None:
        """Penalise the rows of `logits[R, V]` in place: repetition, then presence and frequency."""
        self._apply_repetition(logits, [i for i, p in enumerate(params) if p.repetition_penalty != 1], slots, params)
        self._apply_counts(logits, [i for i, p in enumerate(params) if _counts_tokens(p)], slots, params)

    def generate(self, slots: Sequence[int], token_ids: Sequence[int], params: Sequence[SamplingParams]) -> None:
        """Count the tokens that were just sampled."""
        rows = [i for i, p in enumerate(params) if _counts_tokens(p)]
        if not rows:
            return
        counts = self._all_counts()
        chosen = self._ids(slots[i] for i in rows)
        decayed = counts.index_select(0, chosen) * self._column(params[i].penalty_decay for i in rows)
        decayed.scatter_add_(1, self._ids(token_ids[i] for i in rows)[:, None], torch.ones_like(decayed[:, :1]))
        counts.index_copy_(0, chosen, decayed)
        self._dirty.update(slots[i] for i in rows)

    def _apply_repetition(
        self, logits: torch.Tensor, rows: list[int], slots: Sequence[int], params: Sequence[SamplingParams]
    ) -> None:
        if not rows:
            return
        if self._seen is None:
            self._seen = torch.zeros(self._shape, dtype=torch.bool, device=self._device)
        for slot in (slots[i] for i in rows):
            new = self._consumed[slot][self._num_seen[slot] :]
            self._seen[slot].index_fill_(0, self._ids(new), True)
            self._num_seen[slot] += len(new)
            self._dirty.add(slot)
        chosen = self._ids(rows)
        before = logits.index_select(0, chosen)
        penalty = self._column(params[i].repetition_penalty for i in rows)
        penalised = torch.where(before > 0, before / penalty, before * penalty)
        seen = self._seen.index_select(0, self._ids(slots[i] for i in rows))
        logits.index_copy_(0, chosen, torch.where(seen, penalised, before))

    def _apply_counts(
        self, logits: torch.Tensor, rows: list[int], slots: Sequence[int], params: Sequence[SamplingParams]
    ) -> None:
        if not rows:
            return
        counts = self._all_counts().index_select(0, self._ids(slots[i] for i in rows))
        penalty = (counts > 0) * self._column(params[i].presence_penalty for i in rows)
        penalty += counts * self._column(params[i].frequency_penalty for i in rows)
        logits.index_add_(0, self._ids(rows), penalty, alpha=-1)

    def _all_counts(self) -> torch.Tensor:
        if self._counts is None:
            self._counts = torch.zeros(self._shape, device=self._device)
        return self._counts

    def _ids(self, values: Iterable[int]) -> torch.Tensor:
        return torch.tensor(list(values), dtype=torch.int64, device=self._device)

    def _column(self, values: Iterable[float]) -> torch.Tensor:
        return torch.tensor(list(values), dtype=torch.float32, device=self._device)[:, None]


def _counts_tokens(params: SamplingParams) -> bool:
    return params.presence_penalty != 0 or params.frequency_penalty != 0

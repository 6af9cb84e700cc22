"""Recorded steps, with the recording left out: on a card it is CUDA's, here a step just runs again."""

from __future__ import annotations

from collections.abc import Callable

import torch

import kernels
from engine.models.rwkv7 import RWKV7
from engine.runner.cuda_graphs import PADDING_SLOT, DecodeGraphs, DecodeStep
from engine.runner.graph_runner import GraphModelRunner
from engine.runner.input_batch import InputBatch
from engine.state.pool import StatePool

CPU = torch.device("cpu")
NOBODY = torch.zeros(0, dtype=torch.int64)


class RunAgain:
    """Implements `Graphs` without a card: what is recorded runs once now, and again when replayed."""

    def __init__(self) -> None:
        self.num_recorded = 0

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """Run, and let it be run again."""
        self.num_recorded += 1
        run()
        return run

    def mark(self) -> Callable[[], None]:
        """All is done already."""
        return lambda: None


def consumed(fields: dict[str, torch.Tensor], last_sampled: torch.Tensor) -> InputBatch:
    """Return what a step consumes; the slot of a row whose source ended or sampled nothing is padding's."""
    sources, starts = fields["sources"], fields["starts"]
    last_tokens = starts[1:] - 1  # an empty row's is some other's, or padding's: its slot says that nobody looks at it
    follows = sources >= 0
    sampled = last_sampled.index_select(0, sources.clamp(min=0))
    token_ids = torch.where(follows, sampled.clamp(min=0), fields["token_ids"])
    may_end, ending = follows.index_select(0, last_tokens), sampled.index_select(0, last_tokens)
    has_ended = may_end & ((ending < 0) | (ending[:, None] == fields["stop_ids"]).any(dim=1))
    return InputBatch(token_ids, fields["slots"].masked_fill(has_ended, PADDING_SLOT), starts, last_tokens)


def host_step(model: RWKV7, pool: StatePool, forbidden_ids: torch.Tensor = NOBODY) -> DecodeStep:
    """The step on operators that take no padding: it goes to the scratch slot instead."""

    def step(fields: dict[str, torch.Tensor], sampled: torch.Tensor) -> None:
        batch = consumed(fields, sampled)
        is_padding, starts = batch.slots == PADDING_SLOT, batch.starts
        slots = batch.slots.masked_fill(is_padding, pool.scratch_slot)
        has_tokens = starts.diff() > 0
        assert (has_tokens | is_padding).all()
        with torch.inference_mode():
            starts = torch.cat([starts[:-1][has_tokens], starts[-1:]])
            batch = InputBatch(batch.token_ids, slots[has_tokens], starts, batch.output_rows)
            logits = model.logits(model.forward(batch, pool))
            logits.index_fill_(1, forbidden_ids, -torch.inf)
            rules = [fields[name].double() for name in ("temperature", "top_k", "top_p", "min_p", "uniform")]
            token_ids = kernels.sample(logits, torch.stack(rules, dim=1)).masked_fill_(is_padding, -1)
        sampled[: len(token_ids)] = token_ids

    return step


class HostGraphRunner(GraphModelRunner):
    """The runner with steps that run again instead of graphs."""

    @torch.inference_mode()  # as on a card: what is made in it may be written in it only
    def _record(self, max_rows: int, max_tokens: int) -> DecodeGraphs:
        step = host_step(self.model, self.pool, self._forbidden_ids)
        return DecodeGraphs(step, max_rows, CPU, RunAgain(), max_tokens)

"""The model runner on a card: steps of plain rows are replayed from graphs, all others run as anywhere."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.messages import SamplingParams
from engine.models.rwkv7 import RWKV7
from engine.runner.cuda_graphs import MAX_STOP_IDS, CudaGraphs, DecodeGraphs, DecodeLaunch, DecodeRow, triton_step
from engine.runner.model_runner import BROKEN, TorchModelRunner
from engine.runner.plan import Chunk, ChunkOutput, Launch, StepOutput, StepPlan
from engine.state.spec import StateSpec

_GREEDY = SamplingParams(seed=0, temperature=0.0)  # of rows whose token nobody asked for


class GraphModelRunner(TorchModelRunner):
    """As `TorchModelRunner`, but a step of plain chunks is on its way when `launch` returns, and can be followed.

    A plain chunk asks for nothing but a sampled token, or not even that. Steps of up to `max_num_tokens` tokens are
    recorded, prompts included.
    """

    def __init__(
        self,
        model: RWKV7,
        num_slots: int,
        forbidden_ids: Sequence[int] = (),
        max_num_tokens: int = 512,
        state_spec: StateSpec | None = None,
    ) -> None:
        super().__init__(model, num_slots, forbidden_ids, state_spec)
        self._graphs = self._record(max(1, (num_slots - 1) // 2), max_num_tokens)
        self._last: GraphLaunch | None = None

    @torch.inference_mode()
    def _record(self, max_rows: int, max_tokens: int) -> DecodeGraphs:
        step = triton_step(self.model, self.pool, self._forbidden_ids)
        return DecodeGraphs(step, max_rows, self.model.device, CudaGraphs(), max_tokens)

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Launch:
        """Replay the plan from a graph, if there is one for it; else it runs when its output is asked for."""
        if not self._has_graph(0, plan.chunks):
            self._last = None
            return super().launch(plan)
        self._check_slots(plan)
        return self._launched(self._graphs.launch([_row(chunk) for chunk in plan.chunks]), 0, plan.chunks)

    def can_follow(self, rows: Sequence[int], chunks: Sequence[Chunk]) -> bool:
        """Say whether the last step can be followed, and there is a graph for its rows and the chunks together."""
        last = self._last
        if last is None or not last.can_be_followed or not all([last.samples[row] for row in rows]):
            return False
        return self._has_graph(len(rows), chunks)

    @torch.inference_mode()
    def follow(self, rows: Sequence[int], chunks: Sequence[Chunk] = ()) -> Launch:
        """Launch the step after the last one, rows taking their tokens where that one leaves them."""
        if not self.can_follow(rows, chunks):
            raise ValueError("the last step's rows cannot go on before it is read")
        self._check_slots(StepPlan(chunks))
        return self._launched(self._graphs.follow(rows, [_row(chunk) for chunk in chunks]), len(rows), chunks)

    def _launched(self, launched: DecodeLaunch, num_going: int, chunks: Sequence[Chunk]) -> Launch:
        """Take note of a step that consumes the tokens of so many rows of the last one, and of `chunks`."""
        for chunk in chunks:
            if chunk.sampling is None:  # a piece of a prompt: what samples it may yet be penalised for it
                self._penalties.consume(chunk.slot, chunk.token_ids[chunk.num_replayed :])
        samples = [True] * num_going + [chunk.sampling is not None for chunk in chunks]
        can_be_followed = all([len(chunk.stop_token_ids) <= MAX_STOP_IDS for chunk in chunks])
        self._last = GraphLaunch(launched, samples, can_be_followed)
        return self._last

    def _has_graph(self, num_going: int, chunks: Sequence[Chunk]) -> bool:
        lengths = [len(chunk.token_ids) for chunk in chunks]
        num_long = sum([length > 1 for length in lengths])
        has_size = self._graphs.size_of(num_going + sum(lengths), num_going + len(chunks), num_long) is not None
        return has_size and all(map(self._is_row, chunks))

    def _is_row(self, chunk: Chunk) -> bool:
        """Say whether a chunk can be a row of a graph; one with an impossible id is told so elsewhere."""
        if not chunk.token_ids or not chunk.is_plain:
            return False
        return self._knows(chunk.token_ids) and self._knows(chunk.stop_token_ids)


class GraphLaunch:
    """Implements `Launch`."""

    def __init__(self, launched: DecodeLaunch, samples: Sequence[bool], can_be_followed: bool) -> None:
        self.can_be_followed = can_be_followed
        self.samples = samples  # by row; the others' tokens were not asked for
        self._launched = launched

    def output(self) -> StepOutput:
        """Wait for the graph."""
        return StepOutput(
            [
                ChunkOutput(failed=BROKEN) if token_id < 0 else ChunkOutput(token_id if is_asked_for else None)
                for token_id, is_asked_for in zip(self._launched.token_ids(), self.samples, strict=True)
            ]
        )


def _row(chunk: Chunk) -> DecodeRow:
    return DecodeRow(
        chunk.slot,
        chunk.sampling or _GREEDY,
        chunk.position,
        chunk.token_ids[-1],
        earlier_ids=chunk.token_ids[:-1],
        stop_token_ids=tuple(chunk.stop_token_ids),
    )

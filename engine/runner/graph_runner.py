"""The model runner on a card: steps that only decode are replayed from graphs, all others run as anywhere."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.models.rwkv7 import RWKV7
from engine.runner.cuda_graphs import CudaGraphs, DecodeGraphs, DecodeRow, triton_step
from engine.runner.model_runner import BROKEN, Row, TorchModelRunner
from engine.runner.plan import Chunk, ChunkOutput


class GraphModelRunner(TorchModelRunner):
    """As `TorchModelRunner`. Each step's tokens are read before the next is launched, as the scheduler asks for it."""

    def __init__(self, model: RWKV7, num_slots: int, forbidden_ids: Sequence[int] = ()) -> None:
        super().__init__(model, num_slots, forbidden_ids)
        self._graphs = self._record(max_rows=max(1, (num_slots - 1) // 2))

    @torch.inference_mode()
    def _record(self, max_rows: int) -> DecodeGraphs:
        step = triton_step(self.model, self.pool, self._forbidden_ids)
        return DecodeGraphs(step, max_rows, self.model.device, CudaGraphs())

    def _run(self, rows: Sequence[Row]) -> list[ChunkOutput]:
        if len(rows) > self._graphs.max_rows or not all(is_plain_decode(row.chunk) for row in rows):
            return super()._run(rows)
        chunks = [row.chunk for row in rows]
        launch = self._graphs.launch([_decode_row(chunk) for chunk in chunks])
        for chunk in chunks:
            self._penalties.consume(chunk.slot, chunk.token_ids[chunk.num_replayed :])
        token_ids = launch.token_ids()
        drawn = [(chunk, token_id) for chunk, token_id in zip(chunks, token_ids, strict=True) if token_id >= 0]
        self._penalties.generate(
            [chunk.slot for chunk, _ in drawn],
            [token_id for _, token_id in drawn],
            [sampling for chunk, _ in drawn if (sampling := chunk.sampling)],
        )
        return [ChunkOutput(token_id) if token_id >= 0 else ChunkOutput(failed=BROKEN) for token_id in token_ids]


def is_plain_decode(chunk: Chunk) -> bool:
    """Say whether a chunk is one token and its sampling nothing but temperature, top-k, top-p and min-p."""
    p = chunk.sampling
    return (
        p is not None
        and len(chunk.token_ids) == 1
        and chunk.matcher is None
        and chunk.num_prompt_logprobs is None
        and (chunk.may_stop or not chunk.stop_token_ids)
        and not p.logit_bias
        and p.num_logprobs is None
        and p.presence_penalty == p.frequency_penalty == 0
        and p.repetition_penalty == 1
        and p.top_n_sigma == 0
        and p.typical_p == 1
    )


def _decode_row(chunk: Chunk) -> DecodeRow:
    if chunk.sampling is None:
        raise ValueError("only chunks that sample are rows of a graph")
    return DecodeRow(chunk.slot, chunk.sampling, chunk.position, chunk.token_ids[0])

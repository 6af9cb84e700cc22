"""Our kernels without the engine around them: `python -m tests.benchmarks.peers.ours MODEL THREADS [DTYPE]`."""

from __future__ import annotations

import sys

import torch

from engine.config import EngineConfig
from engine.runner.input_batch import InputBatch
from engine.runner.model_runner import load_runner
from engine.runner.plan import Chunk
from tests.benchmarks.peers.protocol import answer_questions


class Ours:
    """The model, its forward pass and its logits."""

    max_batch = 64
    max_prompt = 512

    def __init__(self, path: str, num_threads: int, dtype: str = "auto") -> None:
        config = EngineConfig(
            model_path=path, tokenizer="world", num_threads=num_threads, dtype=dtype, max_num_seqs=self.max_batch,
            max_num_batched_tokens=self.max_prompt,
        )  # fmt: skip
        self._runner = load_runner(config, lambda _: ())

    def begin(self, batch_size: int) -> None:
        """Clear the slots."""
        for slot in range(batch_size):
            self._runner.start(slot)

    def decode(self, token_ids: list[int]) -> None:
        """One token a slot."""
        self._logits = torch.empty(0)  # gives their memory back for the next ones, as the engine does
        self._logits = self._run([Chunk(slot, [token_id]) for slot, token_id in enumerate(token_ids)])

    def last_logits(self) -> list[float]:
        """Of the last slot."""
        logits: list[float] = self._logits[-1].tolist()
        return logits

    def prefill(self, token_ids: list[int]) -> list[float]:
        """A whole prompt in one chunk."""
        self._runner.start(0)
        logits: list[float] = self._run([Chunk(0, token_ids)])[0].tolist()
        return logits

    @torch.inference_mode()
    def _run(self, chunks: list[Chunk]) -> torch.Tensor:
        model = self._runner.model
        return model.logits(model.forward(InputBatch.from_chunks(chunks, model.device), self._runner.pool))


if __name__ == "__main__":
    answer_questions(Ours(sys.argv[1], int(sys.argv[2]), *sys.argv[3:]))

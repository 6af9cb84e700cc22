"""The `rwkv` package: `python rwkv_package.py MODEL THREADS`, in an environment that has it and PyTorch."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

os.environ |= {"RWKV_V7_ON": "1", "RWKV_JIT_ON": "1", "RWKV_CUDA_ON": "0"}

import torch
from protocol import answer_questions
from rwkv.model import RWKV  # type: ignore[import-not-found]
from safetensors.torch import load_file


class RwkvPackage:
    """Its model, fastest strategy on this processor; decodes one sequence at a time."""

    max_batch = 1
    max_prompt = 512

    def __init__(self, path: str, num_threads: int) -> None:
        torch.set_num_threads(num_threads)
        with tempfile.TemporaryDirectory() as directory:
            weights = load_file(path)
            # The package looks for the first layer's value rank, which official files have and nothing uses.
            weights |= {f"blocks.0.att.v{i}": weights[f"blocks.0.att.a{i}"] for i in range(3)}
            torch.save(weights, Path(directory) / "model.pth")
            # Without instructions for bfloat16, PyTorch is several times slower in it than in float32.
            dtype = "bf16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "fp32"
            self._model = RWKV(model=f"{directory}/model", strategy=f"cpu {dtype}")
        self._state: object = None

    def begin(self, batch_size: int) -> None:
        """An empty state."""
        assert batch_size == 1
        self._state = None

    def decode(self, token_ids: list[int]) -> None:
        """One token."""
        self._logits, self._state = self._model.forward(token_ids, self._state)

    def last_logits(self) -> list[float]:
        """Of the only sequence."""
        logits: list[float] = self._logits.float().tolist()
        return logits

    def prefill(self, token_ids: list[int]) -> list[float]:
        """A whole prompt."""
        logits: list[float] = self._model.forward(token_ids, None)[0].float().tolist()
        return logits


if __name__ == "__main__":
    answer_questions(RwkvPackage(sys.argv[1], int(sys.argv[2])))

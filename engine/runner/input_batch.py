"""A step's chunks as tensors: everything a model's forward pass needs, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

import numpy as np
import torch

from engine.runner.plan import Chunk


@dataclass(frozen=True, slots=True)
class InputBatch:
    """Packed tokens of B sequences, one after the other. All int64, on the model's device."""

    token_ids: torch.Tensor  # [T]
    slots: torch.Tensor  # [B] the pool's row of each sequence
    starts: torch.Tensor  # [B + 1] offsets of the sequences in the packed tokens
    output_rows: torch.Tensor  # [R] which tokens' hidden rows are wanted: the last of each sequence, then all targets'
    num_long: int | None = None  # at most so many sequences have several tokens; None: no bound is known

    @classmethod
    def from_chunks(cls, chunks: Sequence[Chunk], device: torch.device) -> InputBatch:
        """Pack `chunks`, none of them empty."""
        starts = list(accumulate([len(chunk.token_ids) for chunk in chunks], initial=0))
        output_rows = [end - 1 for end in starts[1:]]
        for start, chunk in zip(starts, chunks, strict=False):
            if chunk.target_ids is not None:
                output_rows += [start + i for i, _ in targets_of(chunk)]
        return cls(
            token_ids=_tensor(list(chain.from_iterable([chunk.token_ids for chunk in chunks])), device),
            slots=_tensor([chunk.slot for chunk in chunks], device),
            starts=_tensor(starts, device),
            output_rows=_tensor(output_rows, device),
            num_long=sum([len(chunk.token_ids) > 1 for chunk in chunks]),
        )


def targets_of(chunk: Chunk) -> list[tuple[int, int]]:
    """Return (index in the chunk, token that follows there) wherever a prompt log-probability is asked for."""
    if chunk.num_prompt_logprobs is None or chunk.target_ids is None:
        return []
    return [(i, target) for i, target in enumerate(chunk.target_ids) if target is not None]


def _tensor(values: list[int], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.array(values, np.int64)).to(device)  # through NumPy it costs half as much

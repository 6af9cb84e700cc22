"""What a step that follows another consumes, as the formula in PyTorch says."""

from __future__ import annotations

import pytest
import torch

from engine.runner.cuda_graphs import MAX_STOP_IDS
from tests.engine.runner.host_graphs import consumed as expected_of

sources = pytest.importorskip("kernels.triton.sources", reason="Triton is not installed: pip install sostenuto[cuda]")


@pytest.mark.parametrize(("num_tokens", "num_rows"), [(1, 1), (200, 200), (300, 7), (5, 5)])
def test_tokens_and_slots_are_those_of_the_formula(
    random: torch.Generator, device: torch.device, num_tokens: int, num_rows: int
) -> None:
    """Rows of one token and of many; sources that sampled nothing, a stop id, or something else."""
    lasts = torch.arange(1, num_rows + 1) * num_tokens // num_rows
    token_sources = torch.full((num_tokens,), -1)
    token_sources[lasts - 1] = torch.randint(-1, num_rows, (num_rows,), generator=random)
    stop_ids = torch.randint(0, 6, (num_rows, MAX_STOP_IDS), generator=random, dtype=torch.int32)
    stop_ids[torch.rand(stop_ids.shape, generator=random) < 0.8] = -1
    fields = {
        "sources": token_sources,
        "token_ids": torch.randint(0, 9, (num_tokens,), generator=random),
        "starts": torch.cat([torch.zeros(1, dtype=torch.int64), lasts]),
        "slots": torch.randint(-1, 9, (num_rows,), generator=random),
        "stop_ids": stop_ids,
    }
    last_sampled = torch.randint(-1, 6, (num_rows,), generator=random)
    expected = expected_of(fields, last_sampled)
    names = ("sources", "token_ids", "starts", "slots", "stop_ids")
    found = sources.consumed(*(fields[name].to(device) for name in names), last_sampled.to(device))
    for ours, theirs in zip(found, (expected.token_ids, expected.slots, expected.output_rows), strict=True):
        assert torch.equal(ours.cpu(), theirs)

"""Reported log-probabilities."""

from __future__ import annotations

import math

import pytest
import torch

from engine.runner.logprobs import report_logprobs

NONE_FORBIDDEN = torch.tensor([], dtype=torch.int64)


def test_values_are_natural_logarithms_of_the_distribution() -> None:
    """The token's own value, and the most likely ones in order."""
    (found,) = report_logprobs(torch.tensor([[0.1, 0.6, 0.3]]).log(), [2], [2], NONE_FORBIDDEN)
    assert found.logprob == pytest.approx(math.log(0.3))
    assert found.top_ids == [1, 2]
    assert found.top_logprobs == pytest.approx([math.log(0.6), math.log(0.3)])


def test_each_row_gets_as_many_alternatives_as_it_asked_for() -> None:
    """Zero is a number too: then only the token's own value is reported."""
    logits = torch.randn(3, 10, generator=torch.Generator().manual_seed(0))
    found = report_logprobs(logits, [0, 1, 2], [0, 3, 99], NONE_FORBIDDEN)
    assert [len(row.top_ids) for row in found] == [0, 3, 10]
    assert [len(row.top_logprobs) for row in found] == [0, 3, 10]


def test_the_most_likely_token_equals_the_first_alternative_bit_for_bit() -> None:
    """Evaluation tools decide by float equality whether a token was the greedy choice."""
    logits = torch.randn(200, 50, generator=torch.Generator().manual_seed(0))
    best = logits.argmax(-1).tolist()
    for token_id, row in zip(best, report_logprobs(logits, best, [1] * 200, NONE_FORBIDDEN), strict=True):
        assert row.top_ids == [token_id]
        assert row.top_logprobs == [row.logprob]


@pytest.mark.parametrize("num_top", [1, 2, 5])
def test_of_equally_likely_tokens_the_lowest_comes_first(num_top: int) -> None:
    """As greedy sampling takes it."""
    logits = torch.zeros(1, 300)
    logits[0, [290, 7, 100]] = 1.0
    (found,) = report_logprobs(logits, [7], [num_top], NONE_FORBIDDEN)
    assert found.top_ids[0] == 7
    assert len(set(found.top_ids)) == num_top


def test_forbidden_ids_are_no_alternatives_but_have_a_probability() -> None:
    """The distribution is over the whole vocabulary; ids that can't be sampled are left out of the list."""
    (found,) = report_logprobs(torch.tensor([[0.5, 0.3, 0.2]]).log(), [0], [2], torch.tensor([0]))
    assert found.logprob == pytest.approx(math.log(0.5))
    assert found.top_ids == [1, 2]

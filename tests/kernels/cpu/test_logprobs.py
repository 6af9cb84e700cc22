"""Log-probabilities without those of the whole vocabulary are those of float64."""

from __future__ import annotations

import pytest
import torch

from kernels import eager
from kernels.cpu.operators import Operators

V = 3001
EXCLUDED = torch.tensor([0, 7, 8, 2999, 3000])


def rows(num_rows: int, scale: float = 4.0) -> torch.Tensor:
    """Return rows as peaked as a model's."""
    return torch.randn(num_rows, V, generator=torch.Generator().manual_seed(num_rows)) * scale


@pytest.mark.parametrize("num_top", [0, 1, 5, 20, V])
def test_values_and_alternatives_are_those_of_float64(operators: Operators, num_top: int) -> None:
    """However many are asked for; never those that are excluded, not even as the last ones of all."""
    logits = rows(5)
    logits[1, EXCLUDED] = 40.0
    token_ids = torch.tensor([0, 7, 100, 2998, 3000])
    own, top, top_ids = operators.logprobs(logits, token_ids, num_top, EXCLUDED)
    exact = logits.double().log_softmax(-1)
    torch.testing.assert_close(own.double(), exact.gather(1, token_ids[:, None])[:, 0], rtol=1e-6, atol=2e-6)
    exact[:, EXCLUDED] = -torch.inf
    expected, expected_ids = exact.topk(min(num_top, V - len(EXCLUDED)))
    torch.testing.assert_close(top.double(), expected, rtol=1e-6, atol=2e-6)
    assert top_ids.equal(expected_ids)


@pytest.mark.parametrize("place", [3, 2996])
def test_of_equal_tokens_the_lowest_comes_first_and_equals_its_own(operators: Operators, place: int) -> None:
    """In both implementations, wherever they lie, with the same bits as when it is the token itself."""
    logits = rows(1, scale=0.1)
    logits[0, [place, place + 1, 2998]] = 9.0
    for logprobs in (operators.logprobs, eager.logprobs):
        for num_top in (1, 2, 4):
            own, top, top_ids = logprobs(logits, torch.tensor([place]), num_top, EXCLUDED)
            assert top_ids[0, 0] == place
            assert top[0, 0] == own[0]
            assert len(set(top_ids[0].tolist())) == num_top


def test_a_row_is_the_same_alone_and_strided(operators: Operators) -> None:
    """What is reported of a row does not depend on the others, nor on where it lies."""
    wide = torch.randn(4, V + 13)
    ids = torch.tensor([1, 2, 3, 4])
    together = operators.logprobs(wide[:, :V], ids, 6, EXCLUDED)
    for i in range(4):
        alone = operators.logprobs(wide[i : i + 1, :V].contiguous(), ids[i : i + 1], 6, EXCLUDED)
        assert all(row[i : i + 1].equal(other) for row, other in zip(together, alone, strict=True))


def test_impossible_tokens_are_alternatives_of_last_resort(operators: Operators) -> None:
    """Minus infinity is a logit like others."""
    logits = torch.full((1, 20), -torch.inf)
    logits[0, 11] = 0.0
    own, top, top_ids = operators.logprobs(logits, torch.tensor([11]), 3, torch.tensor([0], dtype=torch.int64))
    assert own.tolist() == [0.0]
    assert top.tolist() == [[0.0, -torch.inf, -torch.inf]]
    assert top_ids.tolist() == [[11, 1, 2]]

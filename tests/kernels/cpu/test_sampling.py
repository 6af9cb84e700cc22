"""Sampling without sorting picks what sorting in float64 picks."""

from __future__ import annotations

import pytest
import torch

from kernels.cpu.library import Team
from kernels.cpu.operators import Operators

V = 3001


def draw(
    operators: Operators, logits: torch.Tensor, cases: list[tuple[float, int, float, float]], uniform: float
) -> list[int]:
    """Draw one token for each row, under its (temperature, top_k, top_p, min_p)."""
    rules = torch.tensor([(*case, uniform) for case in cases], dtype=torch.float64)
    ids: list[int] = operators.sample(logits, rules).tolist()
    return ids


def expected_weights(logits: torch.Tensor, case: tuple[float, int, float, float]) -> torch.Tensor:
    """Return the weight of every id that `case` leaves of a row, in float64, by sorting."""
    temperature, top_k, top_p, min_p = case
    probs = logits.double().softmax(-1)
    ranked = probs.sort(descending=True).values
    cutoffs = [min_p * ranked[0]]
    if top_k:
        cutoffs.append(ranked[min(top_k, len(ranked)) - 1])
    if top_p < 1:
        cutoffs.append(ranked[int((ranked.cumsum(0) <= top_p).sum())])
    return torch.where(probs >= max(cutoffs), (logits.double() - logits.max()).div(temperature).exp(), 0.0)


CASES = [
    (temperature, top_k, top_p, min_p)
    for temperature in (1.0, 0.6, 1.7)
    for top_k, top_p, min_p in [(0, 1.0, 0.0), (1, 1.0, 0.0), (40, 1.0, 0.0), (0, 0.3, 0.0), (0, 0.97, 0.0),
                                (70, 0.9, 0.0), (2000, 0.9999, 0.0), (0, 1.0, 0.02), (9000, 0.5, 0.1)]
]  # fmt: skip


@pytest.mark.parametrize("spread", [0.05, 1.0, 3.0, 12.0], ids="spread {}".format)
def test_tokens_are_those_of_the_sorted_distribution(operators: Operators, spread: float) -> None:
    """For distributions from flat to peaked, each draw falls where float64 puts it."""
    random = torch.Generator().manual_seed(int(spread * 100))
    logits = torch.randn(len(CASES), V, generator=random) * spread
    for uniform in (0.0, 0.123, 0.5, 0.87, 1 - 2**-40):
        operators.team.poison()
        for row, token_id, case in zip(logits, draw(operators, logits, CASES, uniform), CASES, strict=True):
            weights = expected_weights(row, case)
            cumulative = weights.cumsum(0) / weights.sum()
            below = float(cumulative[token_id - 1]) if token_id else 0.0
            assert below - 1e-6 <= uniform <= float(cumulative[token_id]) + 1e-6
            assert weights[token_id] > 0


def test_draws_do_not_depend_on_the_batch_or_on_threads(operators: Operators) -> None:
    """A row alone, on one thread, draws the same token as among others."""
    logits = torch.randn(len(CASES), V, generator=torch.Generator().manual_seed(1)) * 2
    together = draw(operators, logits, CASES, 0.77)
    one_thread = Operators(Team(operators.team.library, 1))
    assert [draw(one_thread, logits[i : i + 1], CASES[i : i + 1], 0.77)[0] for i in range(len(CASES))] == together


def test_equal_likelihoods_stay_together(operators: Operators) -> None:
    """Tokens as likely as the last that stays, stay, however many there are."""
    logits = torch.zeros(1, 500)
    logits[0, 100:] = -1.0
    drawn = {draw(operators, logits, [(1.0, 3, 1.0, 0.0)], u / 200)[0] for u in range(200)}
    assert drawn == set(range(100))


def test_forbidden_ids_and_extreme_temperatures(operators: Operators) -> None:
    """Minus infinity is never drawn, nor does a tiny temperature overflow."""
    logits = torch.tensor([[-torch.inf, 1.0, 5.0, -torch.inf, 4.999, -torch.inf]])
    for temperature in (1e-30, 1e-3, 1.0, 1e30):
        for uniform in (0.0, 0.3, 0.999999):
            assert draw(operators, logits, [(temperature, 0, 1.0, 0.0)], uniform)[0] in (1, 2, 4)
    assert draw(operators, logits, [(1e-30, 0, 1.0, 0.0)], 0.5) == [2]
    assert draw(operators, logits, [(0.0, 0, 1.0, 0.0)], 0.5) == [2]


@pytest.mark.parametrize("vocab_size", [3, 16, 77, V])
@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_a_row_that_is_no_distribution_gives_minus_one(operators: Operators, vocab_size: int, broken: float) -> None:
    """Wherever the NaN or the infinity is; the other rows draw."""
    logits = torch.zeros(vocab_size + 1, vocab_size).fill_diagonal_(broken)
    cases = [(float(row % 2), 0, 1.0, 0.0) for row in range(vocab_size + 1)]
    ids = draw(operators, logits, cases, 0.0)
    assert ids == [-1] * vocab_size + [0]

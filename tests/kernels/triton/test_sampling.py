"""Sampling in Triton picks what sorting in float64 picks."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.cpu.test_sampling import expected_weights

sampling = pytest.importorskip("kernels.triton.sampling", reason="Triton is not installed: pip install sostenuto[cuda]")

V = 301

Case = tuple[float, int, float, float]

CASES: list[Case] = [
    (1.0, 0, 1.0, 0.0),
    (0.6, 1, 1.0, 0.0),
    (1.7, 40, 1.0, 0.0),
    (1.0, 0, 0.3, 0.0),
    (0.6, 0, 0.97, 0.0),
    (1.0, 70, 0.9, 0.0),
    (1.7, 200, 0.9999, 0.0),
    (1.0, 0, 1.0, 0.02),
    (1.0, 9000, 0.5, 0.1),
]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks a row, the last one not full; several blocks a program, and
    ranges of bits with more tokens than are collected.
    """
    monkeypatch.setattr(sampling, "BLOCK", 128)
    monkeypatch.setattr(sampling, "PIECE", 256)
    monkeypatch.setattr(sampling, "WEIGHED", {"BLOCK": 64, "PIECE": 16, "STAGES": 2, "num_warps": 4})
    monkeypatch.setattr(sampling, "MAX_PROGRAMS", 8)
    monkeypatch.setattr(sampling, "CANDIDATES", 16)


def draw(logits: torch.Tensor, cases: list[Case], uniforms: list[float], device: torch.device) -> list[int]:
    """Draw one token for each row, under its (temperature, top_k, top_p, min_p)."""
    rules = [(*case, uniform) for case, uniform in zip(cases, uniforms, strict=True)]
    rows = sampling.SamplingRows.from_host(torch.tensor(rules, dtype=torch.float64), device)
    ids: list[int] = sampling.sample_rows(logits.to(device), rows).tolist()
    return ids


@pytest.mark.parametrize("spread", [0.05, 2.0, 12.0], ids="spread {}".format)
def test_tokens_are_those_of_the_sorted_distribution(device: torch.device, spread: float) -> None:
    """For distributions from flat to peaked, each draw falls where float64 puts it."""
    random = torch.Generator().manual_seed(int(spread * 100))
    logits = torch.randn(len(CASES), V, generator=random) * spread
    uniforms = [(0.0, 0.123, 0.5, 0.87, 1 - 2**-40)[i % 5] for i in range(len(CASES))]
    token_ids = draw(logits, CASES, uniforms, device)
    for row, token_id, uniform, case in zip(logits, token_ids, uniforms, CASES, strict=True):
        weights = expected_weights(row, case)
        cumulative = weights.cumsum(0) / weights.sum()
        below = float(cumulative[token_id - 1]) if token_id else 0.0
        assert below - 1e-6 <= uniform <= float(cumulative[token_id]) + 1e-6
        assert weights[token_id] > 0


def test_draws_do_not_depend_on_the_batch(device: torch.device) -> None:
    """A row alone draws the same token as among others."""
    cases = [CASES[0], CASES[5], CASES[7]]
    logits = torch.randn(3, V, generator=torch.Generator().manual_seed(1)) * 2
    together = draw(logits, cases, [0.77] * 3, device)
    assert [draw(logits[i : i + 1], cases[i : i + 1], [0.77], device)[0] for i in range(3)] == together


def test_equal_likelihoods_stay_together(device: torch.device) -> None:
    """Tokens as likely as the last that stays, stay, however many there are; none else does."""
    logits = torch.zeros(4, 130)
    logits[:, 40:] = -1.0
    uniforms = [0.0, 0.26, 0.51, 0.999]
    assert draw(logits, [(1.0, 3, 1.0, 0.0)] * 4, uniforms, device) == [0, 10, 20, 39]


def test_the_most_likely_token_is_the_lowest_id_among_equals(device: torch.device) -> None:
    """At temperature 0, across blocks and lanes."""
    logits = torch.zeros(2, V)
    logits[0, [130, 131, 290]] = 3.0
    assert draw(logits, [(0.0, 0, 1.0, 0.0)] * 2, [0.9] * 2, device) == [130, 0]


def test_forbidden_ids_and_extreme_temperatures(device: torch.device) -> None:
    """Minus infinity is never drawn, nor does a tiny temperature overflow."""
    logits = torch.tensor([[-torch.inf, 1.0, 5.0, -torch.inf, 4.999, -torch.inf]]).repeat(5, 1)
    cases: list[Case] = [(temperature, 0, 1.0, 0.0) for temperature in (1e-40, 1e-30, 1e-3, 1.0, 1e30)]
    for uniform in (0.0, 0.3, 0.999999):
        ids = draw(logits, cases, [uniform] * 5, device)
        assert ids[:2] == [2, 2]
        assert set(ids) <= {1, 2, 4}


@pytest.mark.parametrize("vocab_size", [3, 130])
def test_a_row_that_is_no_distribution_gives_minus_one(device: torch.device, vocab_size: int) -> None:
    """Wherever the NaN or the infinity is; the other rows draw."""
    logits = torch.zeros(6, vocab_size)
    logits[0, 0] = logits[1, -1] = torch.nan
    logits[2, 1] = logits[3, -1] = torch.inf
    logits[4] = -torch.inf
    for temperature in (0.0, 1.0):
        assert draw(logits, [(temperature, 5, 0.9, 0.0)] * 6, [0.0] * 6, device) == [-1] * 5 + [0]


def test_rows_of_no_slot_draw_nothing(device: torch.device) -> None:
    """And what is drawn goes where it is wanted."""
    logits = torch.randn(4, V, generator=torch.Generator().manual_seed(1)).to(device)
    rules = torch.tensor([[1.0, 0, 0.9, 0, 0.5]] * 2 + [[0.0, 0, 1, 0, 0]] * 2, dtype=torch.float64)
    rows = sampling.SamplingRows.from_host(rules, device)
    expected = sampling.sample_rows(logits, rows).tolist()
    drawn = torch.full((6,), 7, device=device)
    slots = torch.tensor([3, -1, -1, 0], device=device)
    sampling.sample_rows(logits, rows, slots, drawn[:4])
    assert drawn.tolist() == [expected[0], -1, -1, expected[3], 7, 7]

"""Sampling: the order of the steps, truncation, temperature, and randomness that keeps no state."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.messages import SamplingParams
from engine.runner.sampler import hash_seeds, restrict, sample, truncate, uniforms

pytestmark = pytest.mark.usefixtures("implementation")

GOLDEN = [0.36818951565166813, 0.9140224628702995, 0.39221646242353003]
NONE_FORBIDDEN = torch.tensor([], dtype=torch.int64)


def uniform(seed: int, position: int) -> float:
    """Return the number of one seed and position, in Python's integers."""
    return (splitmix64(splitmix64(seed) ^ position) >> 16) * 2.0**-48


def splitmix64(value: int) -> int:
    """Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014."""
    value = (value + 0x9E3779B97F4A7C15) % 2**64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) % 2**64
    return value ^ (value >> 31)


def logits_of(*probabilities: float) -> torch.Tensor:
    """Return one row of logits with these probabilities."""
    return torch.tensor([probabilities]).log()


def possible(logits: torch.Tensor, params: SamplingParams, num_draws: int = 3000) -> dict[int, float]:
    """Return which ids come up, and how often, over many positions."""
    rows = logits.expand(num_draws, -1).clone()
    drawn = Counter(sample(rows, [params] * num_draws, range(num_draws)))
    return {token_id: count / num_draws for token_id, count in drawn.items()}


def test_temperature_zero_takes_the_first_of_the_most_likely() -> None:
    """Greedy sampling is the arg-max, and the lowest id wins a tie."""
    rows = torch.tensor([[0.0, 2.0, 2.0], [3.0, 1.0, 3.0]])
    assert sample(rows, [SamplingParams(seed=n, temperature=0) for n in range(2)], [0, 0]) == [1, 0]


def test_frequencies_follow_the_distribution() -> None:
    """At temperature 1 without truncation each token comes as often as its probability says."""
    found = possible(logits_of(0.5, 0.3, 0.15, 0.05), SamplingParams(seed=3), 20_000)
    for token_id, probability in enumerate((0.5, 0.3, 0.15, 0.05)):
        assert found[token_id] == pytest.approx(probability, abs=0.015)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_reshapes_what_truncation_left(temperature: float) -> None:
    """Truncation is decided at temperature 1; then p ** (1 / T) decides among what is left."""
    params = SamplingParams(seed=5, temperature=temperature, top_p=0.79)
    found = possible(logits_of(0.5, 0.3, 0.15, 0.05), params, 20_000)
    weights = [0.5 ** (1 / temperature), 0.3 ** (1 / temperature)]
    assert found.keys() == {0, 1}
    assert found[0] == pytest.approx(weights[0] / sum(weights), abs=0.015)


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.0001, {0}), (0.49, {0}), (0.79, {0, 1}), (0.9, {0, 1, 2}), (0.9501, {0, 1, 2, 3}), (1.0, {0, 1, 2, 3})],
)
def test_top_p_keeps_the_smallest_set_whose_mass_exceeds_it(top_p: float, kept: set[int]) -> None:
    """The token that crosses the border stays."""
    assert possible(logits_of(0.5, 0.3, 0.15, 0.05), SamplingParams(seed=1, top_p=top_p)).keys() == kept


def test_top_p_exactly_at_a_border_keeps_the_next_token() -> None:
    """Mass has to exceed top_p: with 0.5 of [0.5, 0.25, 0.25] the equals that follow stay, as in RWKV's samplers."""
    assert possible(logits_of(0.5, 0.25, 0.25), SamplingParams(seed=1, top_p=0.5)).keys() == {0, 1, 2}


@pytest.mark.parametrize(("top_k", "kept"), [(0, {0, 1, 2, 3}), (1, {1}), (2, {0, 1}), (99, {0, 1, 2, 3})])
def test_top_k_keeps_the_most_likely(top_k: int, kept: set[int]) -> None:
    """0 switches it off, more than the vocabulary keeps all."""
    assert possible(logits_of(0.3, 0.5, 0.15, 0.05), SamplingParams(seed=1, top_k=top_k)).keys() == kept


@pytest.mark.parametrize(("min_p", "kept"), [(0.0, {0, 1, 2}), (0.29, {0, 1}), (0.61, {0}), (1.0, {0})])
def test_min_p_is_relative_to_the_most_likely(min_p: float, kept: set[int]) -> None:
    """A token stays if it is at least min_p times as likely as the first."""
    assert possible(logits_of(0.5, 0.3, 0.1), SamplingParams(seed=1, min_p=min_p)).keys() == kept


def test_all_cuts_must_be_passed() -> None:
    """top_k, top_p and min_p are each decided on the full distribution; a token must pass all three."""
    logits = logits_of(0.4, 0.3, 0.2, 0.1)
    assert possible(logits, SamplingParams(seed=1, top_k=3, top_p=0.95, min_p=0.6)).keys() == {0, 1}
    assert possible(logits, SamplingParams(seed=1, top_k=3, top_p=0.95)).keys() == {0, 1, 2}


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**32),
    spread=st.floats(0.01, 8),
    top_p=st.floats(0.01, 1),
    top_k=st.integers(0, 700),
    min_p=st.floats(0, 0.5),
)
def test_truncation_is_that_of_a_full_sort(seed: int, spread: float, top_p: float, top_k: int, min_p: float) -> None:
    """Flat or peaked, over a vocabulary larger than what is looked at first, no token outside the cuts is drawn."""
    V = 600
    logits = torch.randn(1, V, generator=torch.Generator().manual_seed(seed)) * spread
    probs, ids = torch.softmax(logits[0].double(), -1).sort(descending=True)
    exceeds = (probs.cumsum(-1) > top_p + 1e-6).nonzero()
    last = min(int(exceeds[0]) if top_p < 1 and len(exceeds) else V - 1, (top_k or V) - 1, V - 1)
    kept = set(ids[(probs >= probs[last] * (1 - 1e-5)) & (probs >= min_p * probs[0] * (1 - 1e-5))].tolist())
    params = SamplingParams(seed=seed, top_p=top_p, top_k=top_k, min_p=min_p)
    drawn = set(sample(logits.expand(50, -1).clone(), [params] * 50, range(50)))
    assert drawn <= kept


def test_rows_do_not_depend_on_their_neighbours() -> None:
    """Mixed settings in one batch: every row draws what it draws alone."""
    random = torch.Generator().manual_seed(2)
    logits = torch.randn(6, 500, generator=random) * torch.tensor([0.05, 1, 3, 3, 1, 5])[:, None]
    params = [
        SamplingParams(seed=1, top_p=0.9),
        SamplingParams(seed=2, temperature=0),
        SamplingParams(seed=3, temperature=0.7, top_k=5),
        SamplingParams(seed=4),
        SamplingParams(seed=5, min_p=0.2, temperature=2),
        SamplingParams(seed=6, top_p=0.5, top_k=400),
    ]
    positions = [3, 1, 4, 1, 5, 9]
    together = sample(logits.clone(), params, positions)
    assert together == [sample(logits[i : i + 1].clone(), [params[i]], [positions[i]])[0] for i in range(len(params))]


def test_extreme_temperatures_do_not_break() -> None:
    """Almost zero is greedy, very large is uniform over what is left; neither overflows."""
    logits = torch.tensor([[200.0, 100.0, -3e4]])
    assert possible(logits, SamplingParams(seed=1, temperature=1e-6)).keys() == {0}
    assert possible(logits_of(0.7, 0.2, 0.1), SamplingParams(seed=1, temperature=1e6)).keys() == {0, 1, 2}


def test_forbidden_ids_are_never_drawn_whatever_the_bias() -> None:
    """Ids without bytes are out, however likely and however favoured."""
    logits = logits_of(0.1, 0.8, 0.1)
    params = [SamplingParams(seed=1, temperature=0, logit_bias={1: 100.0, 2: 0.5})]
    restrict(logits, params, torch.tensor([1]))
    assert sample(logits, params, [0]) == [2]


def test_logit_bias_is_added_to_its_row_alone() -> None:
    """Each row has its own biases."""
    logits = torch.zeros(3, 4)
    params = [SamplingParams(seed=1, logit_bias=bias) for bias in ({0: 2.0, 3: -1.0}, {}, {0: -5.0})]
    restrict(logits, params, NONE_FORBIDDEN)
    assert logits.tolist() == [[2, 0, 0, -1], [0, 0, 0, 0], [-5, 0, 0, 0]]


def numbers_of(*keys: tuple[int, int]) -> list[float]:
    """Return the numbers of rows with these seeds and positions."""
    seeds, positions = (np.array(column, np.uint64) for column in zip(*keys, strict=True))
    return uniforms(hash_seeds(seeds), positions).tolist()


def test_the_random_number_is_a_function_of_seed_and_position() -> None:
    """These values are part of the contract: a conversation resumed by another version draws the same tokens."""
    assert numbers_of((1, 0), (1, 1), (2, 0)) == GOLDEN


def test_random_numbers_are_uniform_over_seeds_and_over_positions() -> None:
    """Neither neighbouring positions nor neighbouring seeds are related."""
    for numbers in (numbers_of(*((7, n) for n in range(4000))), numbers_of(*((n, 7) for n in range(4000)))):
        assert all(0 <= number < 1 for number in numbers)
        counts = Counter(int(number * 10) for number in numbers)
        assert all(abs(counts[i] - 400) < 6 * math.sqrt(400) for i in range(10))
        mean = sum(numbers) / len(numbers)
        lagged = sum((a - mean) * (b - mean) for a, b in pairwise(numbers)) / len(numbers)
        assert abs(lagged) < 6 / 12 / math.sqrt(len(numbers))


@pytest.mark.parametrize("seed", [0, 2**64 - 1])
def test_every_seed_works(seed: int) -> None:
    """The whole range of 64 bits, at large positions too."""
    assert 0 <= numbers_of((seed, 10**12))[0] < 1


def left(logits: torch.Tensor, **sampling: float) -> list[list[int]]:
    """Return the ids that are left in each row after the early truncation."""
    rows = logits.clone()
    truncate(rows, [SamplingParams(seed=0, **sampling)] * len(rows))  # type: ignore[arg-type]
    return [row.isfinite().nonzero()[:, 0].tolist() for row in rows]


def test_typical_tokens_are_as_surprising_as_expected() -> None:
    """The entropy of this row is that of its middle tokens: they come first, the likeliest and the rarest last."""
    row = logits_of(0.5, 0.2, 0.2, 0.1)
    # expected surprise 1.22 nats; distances: 0.53, 0.39, 0.39, 1.08
    assert left(row, typical_p=0.19) == [[1]]
    assert left(row, typical_p=0.39) == [[1, 2]]
    assert left(row, typical_p=0.89) == [[0, 1, 2]]
    assert left(row, typical_p=0.95) == [[0, 1, 2, 3]]


def test_typical_p_ignores_what_is_forbidden() -> None:
    """Ids that are out stay out, and weigh nothing in what is expected."""
    row = torch.tensor([[0.0, -math.inf, 0.0, -math.inf]])
    assert left(row, typical_p=0.9) == [[0, 2]]


def test_top_n_sigma_keeps_logits_near_the_greatest() -> None:
    """So many standard deviations of the logits that are left, whatever the temperature."""
    row = torch.tensor([[4.0, 3.0, 0.0, 0.0, 0.0, -math.inf]])  # deviation of the five: 1.74
    assert left(row, top_n_sigma=0.5) == [[0]]
    assert left(row, top_n_sigma=1.0) == [[0, 1]]
    assert left(row, top_n_sigma=1.0, temperature=2.0) == [[0, 1]]
    assert left(row, top_n_sigma=3.0) == [[0, 1, 2, 3, 4]]
    assert left(row[:, 5:], top_n_sigma=1.0) == [[]]


def test_the_later_truncations_see_what_the_early_ones_left() -> None:
    """`top_p` is of the mass that is left."""
    row = logits_of(0.5, 0.2, 0.2, 0.1)
    params = SamplingParams(seed=0, typical_p=0.39, top_p=0.4)
    truncate(row, [params])
    assert set(possible(row, params)) == {1, 2}  # as likely as the last that stays


def test_greedy_sampling_is_not_truncated() -> None:
    """The most likely token need not be a typical one; temperature 0 takes it anyway."""
    assert left(logits_of(0.5, 0.2, 0.2, 0.1), typical_p=0.1, temperature=0.0) == [[0, 1, 2, 3]]


def test_a_row_without_early_truncation_is_untouched_beside_one_that_has_it() -> None:
    """Row by row, as everything here."""
    rows = logits_of(0.5, 0.2, 0.2, 0.1).repeat(2, 1)
    before = rows[1].clone()
    truncate(rows, [SamplingParams(seed=0, typical_p=0.2, top_n_sigma=1.0), SamplingParams(seed=0)])
    assert torch.equal(rows[1], before)
    assert rows[0].isfinite().sum() == 1


def test_a_mask_adds_and_does_not_write() -> None:
    """A row that is not a number stays one: it must be seen to be broken."""
    rows = torch.tensor([[1.0, math.nan, 2.0], [1.0, 0.0, 2.0], [1.0, 0.0, 2.0]])
    mask = np.array([True, False, True])
    params = [SamplingParams(seed=0, temperature=0)] * 3
    restrict(rows, params, NONE_FORBIDDEN, [[], [2], []], [mask, mask, None])
    assert sample(rows, params, [0] * 3) == [-1, 0, 2]


@given(st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**40)), min_size=1, max_size=20))
def test_the_numbers_of_many_rows_are_those_of_each(keys: list[tuple[int, int]]) -> None:
    """Bit for bit, words wrapping around as they should."""
    assert numbers_of(*keys) == [uniform(seed, position) for seed, position in keys]

"""The operators against the reference, and the promises that every implementation makes."""

from __future__ import annotations

import math

import pytest
import torch

import kernels
from kernels import reference
from tests.kernels.wkv_case import NUM_SLOTS, WkvCase, starts_of

pytestmark = pytest.mark.usefixtures("implementation")

C = 48
LENGTHS = [5, 1, 3, 1]
SLOTS = torch.tensor([4, 0, 2, 5])


@pytest.fixture
def random() -> torch.Generator:
    """Numbers that are the same in every run."""
    return torch.Generator().manual_seed(7)


@pytest.mark.parametrize("v_first", [False, True], ids=["first layer", "later layer"])
def test_wkv7_equals_the_formulas(random: torch.Generator, v_first: bool) -> None:
    """Packed sequences of mixed lengths give the reference's results and states, slot by slot."""
    case = WkvCase(random, sum(LENGTHS), v_first)
    starts = starts_of(LENGTHS).tolist()
    expected = [case.expected(range(starts[i], starts[i + 1]), int(SLOTS[i])) for i in range(len(LENGTHS))]
    result = case.run(kernels.wkv7, slice(None), SLOTS, LENGTHS)
    torch.testing.assert_close(result.double(), torch.cat([rows for rows, _ in expected]), rtol=1e-5, atol=1e-5)
    for slot, (_, S) in zip(SLOTS.tolist(), expected, strict=True):
        torch.testing.assert_close(case.state[slot].double(), S, rtol=1e-5, atol=1e-5)


def test_wkv7_keeps_float16_states(random: torch.Generator) -> None:
    """Rounded after every token and not in between: token by token gives the bits of a whole prompt."""
    case = WkvCase(random, sum(LENGTHS), v_first=True)
    case.state = case.state.half()
    before, starts = case.state.clone(), starts_of(LENGTHS).tolist()
    expected = [case.expected(range(starts[i], starts[i + 1]), int(SLOTS[i])) for i in range(len(LENGTHS))]
    result = case.run(kernels.wkv7, slice(None), SLOTS, LENGTHS)
    torch.testing.assert_close(result.double(), torch.cat([rows for rows, _ in expected]), rtol=4e-3, atol=4e-3)
    for slot, (_, S) in zip(SLOTS.tolist(), expected, strict=True):
        torch.testing.assert_close(case.state[slot].double(), S, rtol=4e-3, atol=4e-3)
    after = case.state.clone()
    case.state.copy_(before)
    alone = [
        case.run(kernels.wkv7, slice(t, t + 1), SLOTS[i : i + 1], [1])
        for i in range(len(LENGTHS))
        for t in range(starts[i], starts[i + 1])
    ]
    assert torch.equal(result, torch.cat(alone))
    assert torch.equal(after, case.state)
    assert not torch.equal(after, before)


def test_a_float16_state_decays_however_slowly(random: torch.Generator) -> None:
    """Rounded to the nearest it would stay as it is."""
    case = WkvCase(random, 256, v_first=False)
    case.only_decays()
    case.run(kernels.wkv7, slice(None), SLOTS[:1], [256])
    assert float(case.state[SLOTS[0]].float().mean()) == pytest.approx(1.5 * math.exp(-(2**-4)), rel=2e-3)


def test_wkv7_leaves_other_slots_alone(random: torch.Generator) -> None:
    """Slots that are not named, and the other layers of those that are, keep their bytes."""
    case = WkvCase(random, sum(LENGTHS), v_first=True)
    pool = case.state._base
    assert pool is not None
    before = pool.clone()
    case.run(kernels.wkv7, slice(None), SLOTS, LENGTHS)
    untouched = [slot for slot in range(NUM_SLOTS) if slot not in SLOTS.tolist()]
    assert torch.equal(pool[:, 0], before[:, 0])
    assert torch.equal(pool[untouched], before[untouched])
    assert not torch.equal(pool[:, 1], before[:, 1])


@pytest.mark.parametrize("tile_bytes", [1, 2 * 4 * 3 * 16 * 16, 1 << 20], ids=["row by row", "pairs", "all at once"])
def test_wkv7_does_not_depend_on_tiles_or_batch(
    random: torch.Generator, monkeypatch: pytest.MonkeyPatch, tile_bytes: int
) -> None:
    """A row's result is bitwise the same alone, in a batch, and however the batch is cut into tiles."""
    monkeypatch.setitem(kernels.eager.TILE_BYTES, "cpu", tile_bytes)
    case = WkvCase(random, len(SLOTS), v_first=True)
    before = case.state.clone()
    together = case.run(kernels.wkv7, slice(None), SLOTS, [1] * len(SLOTS))
    after = case.state.clone()
    case.state.copy_(before)
    alone = [case.run(kernels.wkv7, slice(i, i + 1), SLOTS[i : i + 1], [1]) for i in range(len(SLOTS))]
    assert torch.equal(together, torch.cat(alone))
    assert torch.equal(after, case.state)


def test_wkv7_with_one_head_does_not_depend_on_the_batch() -> None:
    """A single matrix goes the same way as a batch of matrices (a lone `bmm` rounds differently)."""
    random = torch.Generator().manual_seed(3)
    S, x = torch.randn(5, 64, 64, generator=random), torch.randn(5, 64, generator=random)
    together = kernels.eager._matvec(S, x)
    assert torch.equal(together, torch.cat([kernels.eager._matvec(S[i : i + 1], x[i : i + 1]) for i in range(5)]))


def test_shift_mix_equals_the_formulas(random: torch.Generator) -> None:
    """Each token is blended with the one before it in its own sequence, and the slot remembers the last."""
    x, mix = torch.randn(sum(LENGTHS), C, generator=random), torch.rand(6, C, generator=random)
    weight, bias = torch.randn(C, generator=random), torch.randn(C, generator=random)
    shift = torch.randn(NUM_SLOTS, 2, C, generator=random)[:, 1]
    starts = starts_of(LENGTHS)
    expected = torch.empty(6, len(x), C, dtype=torch.float64)
    expected_shift = shift.double().clone()
    for i, slot in enumerate(SLOTS.tolist()):
        for t in range(int(starts[i]), int(starts[i + 1])):
            h = reference.layer_norm(x[t].double(), {"weight": weight.double(), "bias": bias.double()})
            expected[:, t] = h + (expected_shift[slot] - h) * mix.double()
            expected_shift[slot] = h
    result = kernels.shift_mix(x, weight, bias, 1e-5, shift, mix, SLOTS, starts, torch.float32)
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(shift.double(), expected_shift, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_is_the_matrix_product_and_does_not_depend_on_the_number_of_rows(
    random: torch.Generator, dtype: torch.dtype
) -> None:
    """One row and many give the same bits (on CPU through oneDNN; CUDA waits for our own kernels)."""
    weight, x = torch.randn(40, C, generator=random).to(dtype), torch.randn(33, C, generator=random).to(dtype)
    linear = kernels.Linear(weight)
    together = linear(x)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(together.double(), x.double() @ weight.double().T, rtol=tolerance, atol=tolerance)
    for rows in (1, 2, 3, 5, 8, 17):
        assert torch.equal(linear(x[:rows]), together[:rows])


def test_low_rank_equals_the_formula(random: torch.Generator) -> None:
    """Down, activation, up, bias, output activation, in the asked dtype."""
    x, bias = torch.randn(5, C, generator=random), torch.randn(C, generator=random)
    down, up = torch.randn(8, C, generator=random) * 0.2, torch.randn(C, 8, generator=random)
    low_rank = kernels.LowRank(down, up, bias, torch.float32, "tanh", "sigmoid")
    expected = torch.sigmoid(torch.tanh(x.double() @ down.double().T) @ up.double().T + bias.double())
    torch.testing.assert_close(low_rank(x).double(), expected, rtol=1e-5, atol=1e-5)


def test_relu_squared_keeps_its_input() -> None:
    """Negative values become zero, others their square, in a new tensor."""
    x = torch.tensor([-2.0, 0.0, 3.0])
    assert kernels.relu_squared(x).tolist() == [0.0, 0.0, 9.0]
    assert x.tolist() == [-2.0, 0.0, 3.0]


def test_sample_says_which_rows_are_no_distribution() -> None:
    """NaN and plus infinity give -1, minus infinity is only never drawn."""
    logits = torch.zeros(4, 33)
    logits[0, 7], logits[1, 32], logits[2, :32] = torch.nan, torch.inf, -torch.inf
    for temperature in (0.0, 1.0):
        rules = [[temperature, top_k, top_p, 0, 0.2] for top_k, top_p in ((0, 1), (5, 1), (0, 0.5), (5, 0.5))]
        ids = kernels.sample(logits, torch.tensor(rules, dtype=torch.float64))
        assert ids[:3].tolist() == [-1, -1, 32]
        assert ids[3] >= 0

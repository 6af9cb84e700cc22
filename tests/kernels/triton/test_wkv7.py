"""The recurrence in Triton: the formulas, slots, padding, chunks."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from engine.scheduler import scheduler
from tests.kernels.wkv_case import NUM_SLOTS, WkvCase, starts_of

wkv7 = pytest.importorskip("kernels.triton.wkv7", reason="Triton is not installed: pip install sostenuto[cuda]")

SLOTS = torch.tensor([4, 0, 2, 5])


def check(case: WkvCase, lengths: list[int], tolerance: float) -> None:
    """Compare results and states of packed sequences with the formulas in float64."""
    starts, slots = starts_of(lengths).tolist(), SLOTS[: len(lengths)].tolist()
    expected = [case.expected(range(starts[i], starts[i + 1]), slot) for i, slot in enumerate(slots)]
    result = case.run(wkv7.wkv7, slice(None), SLOTS[: len(lengths)], lengths)
    close = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(result.double(), torch.cat([rows for rows, _ in expected]), **close)
    for slot, (_, S) in zip(slots, expected, strict=True):
        torch.testing.assert_close(case.state[slot].double(), S, **close)


@pytest.mark.parametrize("v_first", [False, True], ids=["first layer", "later layer"])
@pytest.mark.parametrize("head_size", [16, 64])
def test_a_step_equals_the_formulas(
    random: torch.Generator, device: torch.device, v_first: bool, head_size: int
) -> None:
    """One token for each of four sequences."""
    check(WkvCase(random, 4, v_first, 2, head_size, device), [1] * 4, 1e-5)


@pytest.mark.parametrize("head_size", [16, 64])
def test_prompts_equal_the_formulas(random: torch.Generator, device: torch.device, head_size: int) -> None:
    """Chunks, what is left of them, and a decode beside them."""
    lengths = [5, 1, 2 * wkv7.CHUNK_LEN + 3]
    check(WkvCase(random, sum(lengths), True, 2, head_size, device), lengths, 1e-5)


def test_a_state_may_be_float16(random: torch.Generator, device: torch.device) -> None:
    """The state is rounded where it is stored, arithmetic is float32's."""
    case = WkvCase(random, 4, True, 2, 16, device)
    case.state = case.state.half()
    check(case, [1] * 4, 2e-3)


def test_a_float16_state_decays_however_slowly(random: torch.Generator, device: torch.device) -> None:
    """Token by token; rounded to the nearest it would stay as it is. NaN stays NaN, whatever its bits."""
    case = WkvCase(random, 64, False, 1, 16, device)
    case.only_decays()
    for token in range(64):
        case.run(wkv7.wkv7, slice(token, token + 1), SLOTS[:1], [1])
    kept = case.state[SLOTS[0]].float()
    assert float(kept.mean()) == pytest.approx(1.5 * math.exp(-(2**-6)), rel=2e-3)
    assert kept.unique().numel() > 2
    case.v[0, 0] = torch.tensor(-1, dtype=torch.int32).view(torch.float32)
    case.run(wkv7.wkv7, slice(1), SLOTS[:1], [1])
    assert case.state[SLOTS[0], 0, 0].isnan().all()


def test_prompts_may_have_float16_states(random: torch.Generator, device: torch.device) -> None:
    """Rounded after every chunk, so a cut where one ends changes no bit, and nothing is far from float64."""
    L, end = wkv7.CHUNK_LEN, 2 * wkv7.CHUNK_LEN + 4
    case = WkvCase(random, end, True, num_heads=1, device=device)
    case.state = case.state.half()
    before = case.state.clone()
    check(case, [end], 4e-3)
    whole = case.state[SLOTS[0]].clone()
    case.state.copy_(before)
    for begin, stop in pairwise([0, L, end]):
        case.run(wkv7.wkv7, slice(begin, stop), SLOTS[:1], [stop - begin])
    assert torch.equal(case.state[SLOTS[0]], whole)


@pytest.mark.parametrize("lengths", [[1, 1, 1], [3, 1, 17]], ids=["step", "prompts"])
def test_a_padding_row_touches_nothing(random: torch.Generator, device: torch.device, lengths: list[int]) -> None:
    """A row with slot -1 leaves every state as it is, and its result is zero."""
    case = WkvCase(random, sum(lengths), True, device=device)
    pool = case.state._base
    assert pool is not None
    before = pool.clone()
    result = case.run(wkv7.wkv7, slice(None), torch.tensor([3, -1, 6]), lengths)
    untouched = [slot for slot in range(NUM_SLOTS) if slot not in (3, 6)]
    assert torch.equal(pool[untouched], before[untouched])
    assert torch.equal(pool[:, 0], before[:, 0])
    assert not any(torch.equal(case.state[slot], before[slot, 1]) for slot in (3, 6))
    padding = slice(lengths[0], lengths[0] + lengths[1])
    assert torch.equal(result[padding], torch.zeros_like(result[padding]))
    assert not result.isnan().any()


def test_a_decode_is_the_same_alone_in_a_batch_and_beside_a_prompt(
    random: torch.Generator, device: torch.device
) -> None:
    """Bitwise, result and state."""
    case = WkvCase(random, 25, True, device=device)
    before = case.state.clone()
    seen = []
    for tokens, slots, lengths in [
        (slice(0, 1), [4], [1]),
        (slice(0, 3), [4, 1, 2], [1, 1, 1]),
        (slice(0, 25), [4, 1], [1, 24]),
    ]:
        case.state.copy_(before)
        result = case.run(wkv7.wkv7, tokens, torch.tensor(slots), lengths)
        seen.append((result[0].clone(), case.state[4].clone()))
    assert all(torch.equal(row, seen[0][0]) and torch.equal(state, seen[0][1]) for row, state in seen)


def test_cuts_at_chunk_borders_change_no_bit(random: torch.Generator, device: torch.device) -> None:
    """One call or several, as long as they are cut where a chunk ends."""
    L, end = wkv7.CHUNK_LEN, 3 * wkv7.CHUNK_LEN + 4
    case = WkvCase(random, end, True, num_heads=1, device=device)
    before = case.state.clone()
    seen = []
    for cuts in ([], [L], [L, 2 * L, 3 * L]):
        case.state.copy_(before)
        rows = [
            case.run(wkv7.wkv7, slice(begin, stop), torch.tensor([2]), [stop - begin])
            for begin, stop in pairwise([0, *cuts, end])
        ]
        seen.append((torch.cat(rows), case.state[2].clone()))
    assert all(torch.equal(row, seen[0][0]) and torch.equal(state, seen[0][1]) for row, state in seen)


def test_thousands_of_tokens_do_not_drift(random: torch.Generator, device: torch.device) -> None:
    """Repeated keys and slow decay, where an inverse by doubling would cancel; against PyTorch token by token."""
    num_tokens = 20 * wkv7.CHUNK_LEN
    case = WkvCase(random, num_tokens, False, 1, 16, device)
    case.k[:] = case.k[0]
    case.decay[:] = -6.0
    check(case, [num_tokens], 1e-4)


def test_the_scheduler_cuts_where_chunks_end() -> None:
    """Otherwise a prompt that is cut by the budget would have other bits than one that is not."""
    assert scheduler.CHUNK_LEN % wkv7.CHUNK_LEN == 0

"""The pool of states."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from engine.state.pool import StatePool
from engine.state.spec import RecurrentState, StateSpec, TensorSpec

SPEC = StateSpec(
    fingerprint="ab",
    generation="7",
    layout="value_key",
    tensors=(TensorSpec("wkv", (2, 3, 4, 4), torch.float32), TensorSpec("shift", (2, 2, 12), torch.float32)),
)
CPU = torch.device("cpu")


@pytest.fixture
def pool() -> StatePool:
    """Four slots of random content."""
    pool = StatePool(SPEC, 4, CPU)
    pool.wkv.copy_(torch.randn(pool.wkv.shape, generator=torch.Generator().manual_seed(1)))
    pool.shift.copy_(torch.randn(pool.shift.shape, generator=torch.Generator().manual_seed(2)))
    return pool


def contents(pool: StatePool, slot: int) -> list[torch.Tensor]:
    """Return copies of a slot's tensors."""
    return [pool.wkv[slot].clone(), pool.shift[slot].clone()]


def are_equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    """Compare bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_state_is_one_contiguous_block(pool: StatePool) -> None:
    """Slot-major: all layers of a slot lie side by side, so a state moves in one copy."""
    assert pool.wkv.shape == (4, 2, 3, 4, 4)
    assert pool.shift.shape == (4, 2, 2, 12)
    assert pool.wkv.stride(0) * 4 == pool.shift.stride(0) * 4 == SPEC.num_bytes
    assert pool.wkv[1].is_contiguous()
    assert pool.shift[1].is_contiguous()
    assert pool.wkv[1].data_ptr() + pool.wkv[1].nbytes == pool.shift[1].data_ptr()


def test_saving_and_loading_moves_every_byte(pool: StatePool) -> None:
    """A state saved from one slot and loaded into another is the same, and the slots between keep theirs."""
    others = [contents(pool, slot) for slot in (0, 1, 3)]
    state = pool.save(1, 7, b"chain")
    assert (state.num_tokens, state.chain, state.num_bytes) == (7, b"chain", SPEC.num_bytes)
    pool.load(2, state)
    assert are_equal(contents(pool, 2), contents(pool, 1))
    assert all(are_equal(contents(pool, slot), before) for slot, before in zip((0, 1, 3), others, strict=True))


def test_a_saved_state_does_not_change_with_its_slot(pool: StatePool) -> None:
    """The slot may be reused at once."""
    expected = contents(pool, 1)
    state = pool.save(1, 0, b"")
    pool.clear(1)
    assert are_equal([state.tensors["wkv"], state.tensors["shift"]], expected)


def test_a_loaded_state_does_not_change_with_the_slot(pool: StatePool) -> None:
    """Host states are shared between conversations that fork: a slot that goes on must not write to them."""
    state = pool.save(1, 0, b"")
    pool.load(2, state)
    pool.wkv[2].fill_(5)
    assert are_equal([state.tensors["wkv"], state.tensors["shift"]], contents(pool, 1))


def test_clear_and_copy_touch_one_slot(pool: StatePool) -> None:
    """A cleared slot is all zeros, a copied one equal to its source."""
    untouched = [contents(pool, slot) for slot in (0, 3)]
    pool.clear(1)
    assert not pool.wkv[1].any()
    assert not pool.shift[1].any()
    pool.copy(3, 2)
    assert are_equal(contents(pool, 2), contents(pool, 3))
    assert all(are_equal(contents(pool, slot), before) for slot, before in zip((0, 3), untouched, strict=True))


@pytest.mark.parametrize(
    "tensors",
    [
        {"wkv": torch.zeros(2, 3, 4, 4)},
        {"wkv": torch.zeros(2, 3, 4, 4), "shift": torch.zeros(2, 2, 13)},
        {"wkv": torch.zeros(2, 3, 4, 4), "shift": torch.zeros(2, 2, 12, dtype=torch.float16)},
        {"wkv": torch.zeros(1, 1, 1, 1), "shift": torch.zeros(2, 2, 12)},
    ],
    ids=["missing", "width", "dtype", "broadcastable"],
)
def test_a_state_that_does_not_fit_writes_nothing(pool: StatePool, tensors: dict[str, torch.Tensor]) -> None:
    """Shapes and dtypes are compared before the first byte is written."""
    before = contents(pool, 1)
    with pytest.raises(ValueError, match="not those of this pool"):
        pool.load(1, RecurrentState(0, b"", tensors))
    assert are_equal(contents(pool, 1), before)


def test_matrices_may_be_float16() -> None:
    """Side by side with float32 rows; what is saved is what is loaded, half as large."""
    spec = replace(SPEC, tensors=(replace(SPEC.tensors[0], dtype=torch.float16), SPEC.tensors[1]))
    pool = StatePool(spec, 4, CPU)
    pool.wkv.copy_(torch.randn(pool.wkv.shape, generator=torch.Generator().manual_seed(1)))
    pool.shift.copy_(torch.randn(pool.shift.shape, generator=torch.Generator().manual_seed(2)))
    assert (pool.wkv.dtype, pool.shift.dtype) == (torch.float16, torch.float32)
    expected = contents(pool, 1)
    state = pool.save(1, 3, b"chain")
    assert state.num_bytes == spec.num_bytes == 2 * 96 + 4 * 48
    pool.load(2, state)
    pool.copy(1, 3)
    pool.clear(1)
    assert are_equal(contents(pool, 2), expected)
    assert are_equal(contents(pool, 3), expected)
    assert not any(tensor.any() for tensor in contents(pool, 1))
    with pytest.raises(ValueError, match="not those of this pool"):
        StatePool(SPEC, 4, CPU).load(2, state)


def test_a_tensor_that_would_shift_the_next_one_is_refused() -> None:
    """Three heads of 3 x 3 float16 numbers end in the middle of a float32 one."""
    spec = replace(SPEC, tensors=(TensorSpec("wkv", (1, 3, 3, 3), torch.float16), SPEC.tensors[1]))
    with pytest.raises(ValueError, match="whole 4 bytes"):
        StatePool(spec, 4, CPU)

"""States whose copy is on its way: whoever reads one waits for it, and nobody else does."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace

import pytest
import torch

from engine.state.checkpoint import decode_state, encode_state
from engine.state.checkpointer import Checkpointer
from engine.state.memory_store import MemoryStore
from engine.state.pool import StatePool
from engine.state.spec import Arrival, RecurrentState, StateSpec, TensorSpec
from engine.state.transfers import AtOnce

SPEC = StateSpec("ab", "7", "value_key", (TensorSpec("wkv", (2, 3, 4, 4), torch.float32),
                                          TensorSpec("shift", (2, 2, 12), torch.float32)))  # fmt: skip
CPU = torch.device("cpu")
PATIENCE = 20


class LateArrival:
    """Implements `Arrival`: copies when somebody waits, once it may."""

    def __init__(self, copy: Callable[[], object]) -> None:
        self.may_arrive = threading.Event()
        self.may_arrive.set()
        self._copy = copy

    def wait(self) -> None:
        """Wait, and copy."""
        assert self.may_arrive.wait(PATIENCE)
        self._copy()

    def wait_on_device(self) -> None:
        """What the device is asked for happens at once here."""
        self.wait()


class Late:
    """Implements `Transfers`: nothing is there before it is waited for."""

    def to_host(self, data: torch.Tensor) -> tuple[torch.Tensor, Arrival | None]:
        """Copy the data as it is now, when somebody waits."""
        staged, host = data.clone(), torch.full_like(data, 0xFF)  # as floats: NaN
        return host, LateArrival(lambda: host.copy_(staged))


@pytest.fixture
def pool() -> StatePool:
    """Three slots of random content, saved late."""
    pool = StatePool(SPEC, 3, CPU, Late())
    for view in (pool.wkv, pool.shift):
        view.copy_(torch.randn(view.shape, generator=torch.Generator().manual_seed(1)))
    return pool


def arrival_of(state: RecurrentState) -> LateArrival:
    """Return when the state is there."""
    assert isinstance(state.arrival, LateArrival)
    return state.arrival


def test_a_state_that_is_loaded_before_it_arrived_is_waited_for(pool: StatePool) -> None:
    """Its slot was used again meanwhile."""
    before = pool.wkv[0].clone(), pool.shift[0].clone()
    state = pool.save(0, 0, b"")
    pool.clear(0)
    assert state.tensors["wkv"].isnan().all()
    pool.load(1, state)
    assert torch.equal(pool.wkv[1], before[0])
    assert torch.equal(pool.shift[1], before[1])


def test_a_checkpoint_is_written_when_its_state_arrives_and_nobody_waits_for_that(pool: StatePool) -> None:
    """The wait is the writer's thread's."""
    state = pool.save(0, 5, b"c" * 16)
    arrival_of(state).may_arrive.clear()
    store = MemoryStore()
    with closing(Checkpointer(store, SPEC, 60.0)) as checkpointer:
        future = checkpointer.save(state)
        assert not future.done()
        arrival_of(state).may_arrive.set()
        ref = future.result(PATIENCE).ref
        read = decode_state(store.get(ref.checkpoint_id), SPEC, ref)
    assert torch.equal(read.tensors["wkv"], pool.wkv[0])
    assert torch.equal(read.tensors["shift"], pool.shift[0])


def test_a_state_that_never_arrives_is_no_checkpoint(pool: StatePool) -> None:
    """What went wrong is the answer of who wanted it written."""

    def fail() -> None:
        raise RuntimeError("the device is gone")

    state = replace(pool.save(0, 5, b"c" * 16), arrival=LateArrival(fail))
    with closing(Checkpointer(MemoryStore(), SPEC, 60.0)) as checkpointer:
        future = checkpointer.save(state)
        with pytest.raises(RuntimeError, match="the device is gone"):
            future.result(PATIENCE)


def test_whether_a_state_is_finite_is_said_of_what_arrived(pool: StatePool) -> None:
    """Before, its memory is anything."""
    assert pool.save(0, 0, b"").is_finite


def test_a_copy_made_at_once_is_there(pool: StatePool) -> None:
    """And is a copy."""
    data = torch.arange(3.0)
    copy, arrival = AtOnce().to_host(data)
    data.zero_()
    assert arrival is None
    assert copy.tolist() == [0.0, 1.0, 2.0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a card")
def test_a_card_goes_on_while_a_state_is_copied() -> None:
    """States saved between steps of a busy stream are those of their moment, loaded or encoded before they arrive."""
    device = torch.device("cuda")
    pool = StatePool(SPEC, 4, device)
    busy = torch.randn(2048, 2048, device=device)
    states = []
    for n in range(8):
        for _ in range(10):
            busy = busy @ busy
            busy /= busy.norm()
        pool.wkv[0] = float(n)
        pool.shift[0] = -float(n)
        states.append(pool.save(0, n, bytes(16)))
    pool.load(1, states[3])
    assert pool.wkv[1].eq(3).all()
    assert pool.shift[1].eq(-3).all()
    for n, state in enumerate(states):
        encode_state(state, SPEC)
        assert state.tensors["wkv"].eq(n).all()
        assert state.tensors["shift"].eq(-n).all()

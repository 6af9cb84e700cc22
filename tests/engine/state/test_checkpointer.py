from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import closing

import msgspec
import pytest

from engine.errors import CheckpointMissing, CheckpointRejected, StoreUnavailable
from engine.messages import CheckpointRef
from engine.state.checkpoint import encode_state
from engine.state.checkpointer import NUM_WRITERS, SWEEP_SECONDS, Checkpointer
from engine.state.memory_store import MemoryStore
from engine.state.spec import RecurrentState
from tests.engine.stub_runner import STUB_SPEC, state_of, tokens_of

STATE = state_of([1, 2, 3], b"c" * 16)
PATIENCE = 20


class Store(MemoryStore):
    """A store in memory that can be made to wait or to fail."""

    def __init__(self) -> None:
        super().__init__()
        self.open = threading.Event()
        self.open.set()
        self.is_down = False
        self.deletions: list[list[str]] = []
        self.num_sweeps = 0

    def put(self, checkpoint_id: str, blob: bytes | bytearray | memoryview, ttl_seconds: float) -> None:
        """As a store does, when it may."""
        assert self.open.wait(PATIENCE)
        if self.is_down:
            raise StoreUnavailable("down")
        super().put(checkpoint_id, blob, ttl_seconds)

    def delete(self, checkpoint_ids: Iterable[str]) -> None:
        """As a store does, remembering what was asked for in one go."""
        ids = list(checkpoint_ids)
        self.deletions.append(ids)
        if self.is_down:
            raise StoreUnavailable("down")
        super().delete(ids)

    def quarantine(self, checkpoint_id: str) -> None:
        """As a store does."""
        if self.is_down:
            raise StoreUnavailable("down")
        super().quarantine(checkpoint_id)

    def sweep(self) -> int:
        """Count."""
        self.num_sweeps += 1
        if self.is_down:
            raise StoreUnavailable("down")
        return 0


@pytest.fixture
def store() -> Store:
    """A fresh store."""
    return Store()


@pytest.fixture
def rings() -> list[None]:
    """One entry for each time the engine was woken."""
    return []


@pytest.fixture
def checkpointer(store: Store, rings: list[None]) -> Iterator[Checkpointer]:
    """A checkpointer on the store."""
    with closing(Checkpointer(store, STUB_SPEC, 60, lambda: rings.append(None))) as it:
        yield it
        store.open.set()


def test_what_was_saved_is_fetched(checkpointer: Checkpointer, rings: list[None]) -> None:
    """Under a name of its own, and the engine is woken for both."""
    stored = checkpointer.save(STATE).result(PATIENCE)
    assert (stored.ref.num_tokens, stored.ref.chain, stored.tier) == (3, STATE.chain, "memory")
    assert stored.ref.num_bytes > STATE.num_bytes
    state = checkpointer.fetch(stored.ref).result(PATIENCE)
    assert tokens_of(state) == [1, 2, 3]
    checkpointer.close()
    assert len(rings) == 2


def test_names_are_never_used_twice(checkpointer: Checkpointer) -> None:
    """Equal states are different checkpoints."""
    ids = {checkpointer.save(STATE).result(PATIENCE).ref.checkpoint_id for _ in range(5)}
    assert len(ids) == 5


def test_a_missing_checkpoint_is_missing(checkpointer: Checkpointer) -> None:
    """It may have expired."""
    ref = CheckpointRef(checkpoint_id="0" * 32, num_tokens=3, chain=STATE.chain)
    with pytest.raises(CheckpointMissing):
        checkpointer.fetch(ref).result(PATIENCE)


def test_another_state_than_the_one_wanted_is_rejected_and_put_away(checkpointer: Checkpointer, store: Store) -> None:
    """A checkpoint that is whole, but of another history, is as bad as a damaged one."""
    ref = checkpointer.save(STATE).result(PATIENCE).ref
    wrong = CheckpointRef(checkpoint_id=ref.checkpoint_id, num_tokens=3, chain=b"d" * 16)
    with pytest.raises(CheckpointRejected) as caught:
        checkpointer.fetch(wrong).result(PATIENCE)
    assert caught.value.reason == "chain"
    assert list(store.quarantined) == [ref.checkpoint_id]


def test_a_rejected_checkpoint_that_cannot_be_put_away_is_rejected_all_the_same(
    checkpointer: Checkpointer, store: Store
) -> None:
    """The store's trouble does not hide what is wrong with the blob."""
    ref = checkpointer.save(STATE).result(PATIENCE).ref
    store.is_down = True
    wrong = CheckpointRef(checkpoint_id=ref.checkpoint_id, num_tokens=4, chain=STATE.chain)
    with pytest.raises(CheckpointRejected):
        checkpointer.fetch(wrong).result(PATIENCE)


def test_a_store_that_is_down_is_said_to_be(checkpointer: Checkpointer, store: Store) -> None:
    """The save fails, and nothing else does."""
    store.is_down = True
    with pytest.raises(StoreUnavailable):
        checkpointer.save(STATE).result(PATIENCE)
    store.is_down = False
    assert checkpointer.save(STATE).result(PATIENCE).ref.num_tokens == 3


def test_slow_writes_do_not_hold_up_reads(checkpointer: Checkpointer, store: Store) -> None:
    """A resume has threads of its own."""
    ref = checkpointer.save(STATE).result(PATIENCE).ref
    store.open.clear()
    slow = [checkpointer.save(STATE) for _ in range(2 * NUM_WRITERS)]
    assert tokens_of(checkpointer.fetch(ref).result(PATIENCE)) == [1, 2, 3]
    assert not any(future.done() for future in slow)


def test_deletions_that_pile_up_go_together(checkpointer: Checkpointer, store: Store) -> None:
    """What gathers while the writers are busy is deleted by as few calls as there are writers."""
    store.open.clear()
    busy = [checkpointer.save(STATE) for _ in range(NUM_WRITERS)]
    for number in range(5):
        checkpointer.delete([f"{number:032x}"])
    store.open.set()
    for future in busy:
        future.result(PATIENCE)
    while sum(map(len, store.deletions)) < 5:
        checkpointer.save(STATE).result(PATIENCE)
    assert sorted(id for ids in store.deletions for id in ids) == [f"{number:032x}" for number in range(5)]
    assert len(store.deletions) <= NUM_WRITERS


def test_the_store_is_swept_at_first_and_then_now_and_then(store: Store) -> None:
    """Calling more often costs nothing; a store that is down does not break it."""
    now = [0.0]
    checkpointer = Checkpointer(store, STUB_SPEC, 60, clock=lambda: now[0])
    store.is_down = True
    for now[0], num_sweeps in [(0, 1), (1, 1), (SWEEP_SECONDS - 0.5, 1), (SWEEP_SECONDS, 2), (SWEEP_SECONDS + 1, 2)]:
        checkpointer.sweep_when_due()
        while store.num_sweeps < num_sweeps:
            time.sleep(0.01)
    checkpointer.close()
    assert store.num_sweeps == 2


def uploaded(store: Store, state: RecurrentState) -> CheckpointRef:
    """Put a state into the store as an import does."""
    ref = CheckpointRef(checkpoint_id="ab" * 16, num_tokens=state.num_tokens, chain=state.chain)
    store.put(ref.checkpoint_id, encode_state(state, STUB_SPEC), 60.0)
    return ref


def test_a_state_from_elsewhere_is_adopted_under_its_new_chain(store: Store, checkpointer: Checkpointer) -> None:
    """The same tokens under a fresh id; what was adopted stays where it was."""
    ref = uploaded(store, STATE)
    stored = checkpointer.adopt(ref, b"n" * 16).result(PATIENCE)
    assert stored.adopted == ref.checkpoint_id
    assert (stored.ref.chain, stored.ref.num_tokens) == (b"n" * 16, 3)
    assert tokens_of(checkpointer.fetch(stored.ref).result(PATIENCE)) == [1, 2, 3]
    assert tokens_of(checkpointer.fetch(ref).result(PATIENCE)) == [1, 2, 3]


@pytest.mark.parametrize("wrong", [{"num_tokens": 2}, {"chain": b"x" * 16}], ids=str)
def test_a_state_of_other_tokens_is_not_adopted(
    store: Store, checkpointer: Checkpointer, wrong: dict[str, object]
) -> None:
    """Nothing is written, and the quarantine is not for what was never ours."""
    ref = msgspec.structs.replace(uploaded(store, STATE), **wrong)
    with pytest.raises(CheckpointRejected):
        checkpointer.adopt(ref, b"n" * 16).result(PATIENCE)
    assert not store.quarantined
    assert list(store._blobs) == [ref.checkpoint_id]


def test_a_state_that_is_not_of_numbers_is_not_adopted(store: Store, checkpointer: Checkpointer) -> None:
    """No model makes one, however well its digest is computed."""
    broken = state_of([1, 2, 3], b"c" * 16)
    broken.tensors["tape"][7] = float("nan")
    with pytest.raises(CheckpointRejected, match="numbers"):
        checkpointer.adopt(uploaded(store, broken), b"n" * 16).result(PATIENCE)

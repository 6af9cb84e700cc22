"""What every state store must do. Each test runs on each implementation."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from engine.errors import CheckpointMissing, CheckpointRejected
from engine.state.redis_store import CHUNK_BYTES, MAX_QUARANTINED
from tests.engine.state.stores import HOUR, StoreUnderTest, new_id

SIZES = [0, 1, 1000, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 2 * CHUNK_BYTES, 3 * CHUNK_BYTES + 7, 21_000_000]


@pytest.mark.parametrize("num_bytes", SIZES)
def test_a_blob_comes_back_byte_for_byte(tested: StoreUnderTest, num_bytes: int) -> None:
    """`get` returns exactly what `put` was given, as memory that the caller may write to."""
    checkpoint_id, blob = new_id(), random.Random(num_bytes).randbytes(num_bytes)
    tested.store.put(checkpoint_id, blob, HOUR)
    returned = tested.store.get(checkpoint_id)
    assert isinstance(returned, bytearray)
    assert returned == blob


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, lambda blob: memoryview(blob).cast("I")])
def test_any_contiguous_bytes_can_be_put(tested: StoreUnderTest, kind: type[bytes]) -> None:
    """A blob may be bytes, a bytearray, or a view of either, of any item size."""
    checkpoint_id, blob = new_id(), random.Random(1).randbytes(4096)
    tested.store.put(checkpoint_id, kind(blob), HOUR)
    assert tested.store.get(checkpoint_id) == blob


def test_a_stored_blob_is_the_stores_own(tested: StoreUnderTest) -> None:
    """Writing to what was put, or to what came back, changes nothing in the store."""
    checkpoint_id, blob = new_id(), bytearray(b"state")
    tested.store.put(checkpoint_id, blob, HOUR)
    blob[:] = b"other"
    tested.store.get(checkpoint_id)[:] = b"thing"
    assert tested.store.get(checkpoint_id) == b"state"


def test_an_unknown_name_is_missing(tested: StoreUnderTest) -> None:
    """What was never put cannot be got, and can be deleted or quarantined without harm."""
    checkpoint_id = new_id()
    with pytest.raises(CheckpointMissing):
        tested.store.get(checkpoint_id)
    tested.store.delete([checkpoint_id])
    tested.store.quarantine(checkpoint_id)
    tested.store.delete([])


def test_a_state_may_be_written_under_its_name_by_several_at_once(tested: StoreUnderTest) -> None:
    """Names that follow from what a state is: whoever writes last, the blob is whole and lives from then on."""
    checkpoint_id, blob = new_id(), random.Random(2).randbytes(2 * CHUNK_BYTES + 5)
    with ThreadPoolExecutor(4) as pool:
        for _ in pool.map(lambda _: tested.store.put(checkpoint_id, blob, HOUR), range(8)):
            assert tested.store.get(checkpoint_id) == blob
    assert tested.names() == {checkpoint_id}
    tested.travel(HOUR - 60)
    tested.store.put(checkpoint_id, blob, HOUR)
    tested.travel(120)
    assert tested.store.get(checkpoint_id) == blob


def test_a_blob_ends(tested: StoreUnderTest) -> None:
    """A blob is missing after its time to live, however often it was read, and takes up no room after a sweep."""
    short, long = new_id(), new_id()
    tested.store.put(short, b"short", HOUR)
    tested.store.put(long, b"long", 3 * HOUR)
    tested.travel(HOUR - 1)
    assert tested.store.get(short) == b"short"
    tested.travel(2)
    with pytest.raises(CheckpointMissing):
        tested.store.get(short)
    tested.store.sweep()
    assert tested.names() == {long}
    assert tested.store.sweep() == 0
    assert tested.store.get(long) == b"long"


def test_deleted_blobs_are_gone(tested: StoreUnderTest) -> None:
    """`delete` removes what it names and nothing else."""
    ids = [new_id() for _ in range(4)]
    for checkpoint_id in ids:
        tested.store.put(checkpoint_id, checkpoint_id.encode(), HOUR)
    tested.store.delete(ids[:2])
    assert tested.names() == set(ids[2:])
    for checkpoint_id in ids[2:]:
        assert tested.store.get(checkpoint_id) == checkpoint_id.encode()


def test_a_quarantined_blob_is_kept_out_of_reach(tested: StoreUnderTest) -> None:
    """After `quarantine` the blob is missing for the engine, and whole for an operator."""
    checkpoint_id = new_id()
    tested.store.put(checkpoint_id, b"suspect", HOUR)
    tested.store.quarantine(checkpoint_id)
    with pytest.raises(CheckpointMissing):
        tested.store.get(checkpoint_id)
    assert tested.quarantined() == {checkpoint_id: b"suspect"}
    assert tested.names() == set()


def test_the_quarantine_keeps_the_newest(tested: StoreUnderTest) -> None:
    """A storm of bad checkpoints cannot fill the store."""
    ids = [new_id() for _ in range(MAX_QUARANTINED + 3)]
    for checkpoint_id in ids:
        tested.store.put(checkpoint_id, b"suspect", HOUR)
        tested.store.quarantine(checkpoint_id)
        tested.travel(1)
    assert set(tested.quarantined()) == set(ids[3:])


@pytest.mark.parametrize(
    "name",
    ["", "abc", "../../etc/passwd", "0" * 31, "0" * 33, "0" * 31 + "/", "A" * 32, "0" * 32 + "\n", "\u0660" * 32],
)
def test_other_names_reach_no_store(tested: StoreUnderTest, name: str) -> None:
    """What is not 128 bits in lower-case hex is refused before it becomes a path or a key."""
    calls = (
        lambda: tested.store.put(name, b"", HOUR),
        lambda: tested.store.get(name),
        lambda: tested.store.delete([name]),
        lambda: tested.store.quarantine(name),
    )
    for call in calls:
        with pytest.raises(CheckpointRejected):
            call()
    assert tested.names() == set()


def test_threads_share_a_store(tested: StoreUnderTest) -> None:
    """Concurrent uploads and downloads of several chunks keep apart."""
    blobs = {new_id(): random.Random(seed).randbytes(CHUNK_BYTES * 2 + seed) for seed in range(6)}
    barrier = threading.Barrier(len(blobs))

    def go_round(checkpoint_id: str, blob: bytes) -> bool:
        barrier.wait(timeout=30)
        tested.store.put(checkpoint_id, blob, HOUR)
        return tested.store.get(checkpoint_id) == blob

    with ThreadPoolExecutor(len(blobs)) as threads:
        assert all(threads.map(go_round, *zip(*blobs.items(), strict=True)))

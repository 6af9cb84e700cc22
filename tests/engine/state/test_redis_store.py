"""What only Redis does: chunks, evictions, outages."""

from __future__ import annotations

import pytest

from engine.errors import CheckpointMissing, StoreUnavailable
from engine.state.redis_store import CHUNK_BYTES, MAX_QUARANTINED, RedisStateStore
from tests.conftest import ROOT
from tests.engine.state.stores import HOUR, RedisUnderTest, new_id
from tests.redis_server import RedisServer, free_port


def test_chunks_are_fields_of_one_ending_key(redis: RedisUnderTest) -> None:
    """A checkpoint is one hash of 1 MiB chunks and its size, and lives as long as it was told."""
    checkpoint_id = new_id()
    redis.store.put(checkpoint_id, bytes(2 * CHUNK_BYTES + 5), HOUR)
    assert redis.raw.keys() == [f"rk:b:{checkpoint_id}".encode()]
    lengths = {name: len(value) for name, value in redis.raw.hgetall(f"rk:b:{checkpoint_id}").items()}
    assert lengths == {b"0": CHUNK_BYTES, b"1": CHUNK_BYTES, b"2": 5, b"size": 7}
    assert 0 < redis.raw.ttl(f"rk:b:{checkpoint_id}") <= HOUR


@pytest.mark.parametrize(
    "damage",
    [
        ("HDEL", "{key}", "size"),
        ("HDEL", "{key}", "1"),
        ("HSET", "{key}", "1", "short"),
        ("HSET", "{key}", "3", "too many"),
        ("HSET", "{key}", "size", "12"),
        ("HSET", "{key}", "size", str(2**63)),
        ("HSET", "{key}", "size", "-1"),
        ("HSET", "{key}", "size", "big"),
    ],
)
def test_an_incomplete_checkpoint_is_missing(redis: RedisUnderTest, damage: tuple[str, ...]) -> None:
    """Chunks that are not exactly those of the stated size are never put together, nor is room made for them."""
    checkpoint_id = new_id()
    redis.store.put(checkpoint_id, bytes(2 * CHUNK_BYTES + 5), HOUR)
    redis.raw.execute_command(*(part.format(key=f"rk:b:{checkpoint_id}") for part in damage))
    with pytest.raises(CheckpointMissing):
        redis.store.get(checkpoint_id)


def test_an_upload_that_stops_goes_away(redis: RedisUnderTest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a dying process has uploaded cannot be read, and ends within minutes."""
    checkpoint_id, chunks_sent = new_id(), []

    def die(chunk: int) -> slice:
        if len(chunks_sent) == 2:
            raise KeyboardInterrupt
        chunks_sent.append(chunk)
        return slice(chunk * CHUNK_BYTES, (chunk + 1) * CHUNK_BYTES)

    monkeypatch.setattr("engine.state.redis_store._slice", die)
    with pytest.raises(KeyboardInterrupt):
        redis.store.put(checkpoint_id, bytes(4 * CHUNK_BYTES), HOUR)
    assert redis.raw.hlen(f"rk:b:{checkpoint_id}") == 2
    assert 0 < redis.raw.ttl(f"rk:b:{checkpoint_id}") <= 600
    with pytest.raises(CheckpointMissing):
        redis.store.get(checkpoint_id)


def test_a_full_redis_evicts_what_was_not_used(redis: RedisUnderTest) -> None:
    """Under the shipped policy a full Redis drops checkpoints that were not used, whole, and takes the new one."""
    used = redis.raw.info("memory")["used_memory"]
    redis.raw.config_set("maxmemory", used + 12 * CHUNK_BYTES)
    try:
        ids = [new_id() for _ in range(6)]
        for number, checkpoint_id in enumerate(ids):
            redis.store.put(checkpoint_id, bytes([number]) * (3 * CHUNK_BYTES), HOUR)
            key = f"rk:b:{checkpoint_id}"  # Redis counts idle time in whole seconds: let some pass at once
            redis.raw.restore(key, 3_600_000, redis.raw.dump(key), replace=True, idletime=100 - number)
        assert redis.store.get(ids[-1]) == bytes([5]) * (3 * CHUNK_BYTES)
        evicted = set(ids) - redis.names()
        assert evicted
        for checkpoint_id in evicted:
            with pytest.raises(CheckpointMissing):
                redis.store.get(checkpoint_id)
    finally:
        redis.raw.config_set("maxmemory", "4gb")


def test_a_redis_without_room_is_unavailable_and_left_clean(redis: RedisUnderTest) -> None:
    """Without eviction a full Redis refuses; nothing half-uploaded stays; what is there can still be read."""
    kept = new_id()
    redis.store.put(kept, b"state", HOUR)
    used = redis.raw.info("memory")["used_memory"]
    redis.raw.config_set("maxmemory-policy", "noeviction")
    redis.raw.config_set("maxmemory", used + 5 * CHUNK_BYTES)
    try:
        with pytest.raises(StoreUnavailable):
            redis.store.put(new_id(), bytes(10 * CHUNK_BYTES), HOUR)
        assert redis.names() == {kept}
        redis.raw.config_set("maxmemory", 1)
        assert redis.store.get(kept) == b"state"
    finally:
        redis.raw.config_set("maxmemory", "4gb")
        redis.raw.config_set("maxmemory-policy", "volatile-lru")


def test_a_hanging_redis_is_unavailable_and_recovers(redis_server: RedisServer) -> None:
    """While Redis answers nothing every call ends with `StoreUnavailable`; then all works again."""
    store, checkpoint_id = RedisStateStore(redis_server.url, timeout_seconds=0.2), new_id()
    store.put(checkpoint_id, b"state", HOUR)
    calls = (
        lambda: store.put(new_id(), b"state", HOUR),
        lambda: store.get(checkpoint_id),
        lambda: store.delete([checkpoint_id]),
        lambda: store.quarantine(checkpoint_id),
    )
    redis_server.pause()
    try:
        for call in calls:
            with pytest.raises(StoreUnavailable):
                call()
    finally:
        redis_server.resume()
    store.put(checkpoint_id, b"state", HOUR)
    assert store.get(checkpoint_id) == b"state"
    store.close()


def test_a_restart_between_two_calls_is_no_error(redis_server: RedisServer) -> None:
    """A connection that Redis has closed in the meantime is replaced."""
    store, checkpoint_id = RedisStateStore(redis_server.url), new_id()
    store.put(checkpoint_id, b"state", HOUR)
    redis_server.stop()
    redis_server.start()
    assert store.get(checkpoint_id) == b"state"
    store.close()


def test_an_absent_redis_is_unavailable() -> None:
    """Nothing listens: the store says so, and shows no password."""
    store = RedisStateStore(f"redis://somebody:hunter2@127.0.0.1:{free_port()}/0")
    with pytest.raises(StoreUnavailable) as refusal:
        store.get(new_id())
    assert "hunter2" not in f"{store!r} {refusal.value} {refusal.value.__cause__!r}"
    store.close()


def test_the_shipped_rights_suffice(redis: RedisUnderTest, lasting_redis: RedisServer) -> None:
    """The user of `users.acl` may do everything a store does."""
    rules = dict(line.split(maxsplit=2)[1:] for line in (ROOT / "deploy/redis/users.acl").read_text().splitlines())
    redis.raw.execute_command("ACL", "SETUSER", "sostenuto-state", *rules["sostenuto-state"].split())
    store = RedisStateStore(lasting_redis.url.replace("redis://", "redis://sostenuto-state:change-me-too@"))
    ids = [new_id() for _ in range(MAX_QUARANTINED + 1)]
    for checkpoint_id in ids:
        store.put(checkpoint_id, bytes(CHUNK_BYTES + 1), HOUR)
        assert store.get(checkpoint_id) == bytes(CHUNK_BYTES + 1)
        store.quarantine(checkpoint_id)
    store.delete(ids)
    store.sweep()
    store.close()

"""Checkpoints in Redis: one immutable hash per checkpoint, its fields chunks of 1 MiB.

A chunk is small enough that other clients are not kept waiting, and a blob never passes through Lua. A checkpoint can
be read once its size is written, after all its chunks; until then it lives only minutes, so that what a dying process
left behind goes away. Eviction is welcome on this server: losing a checkpoint costs time, never data.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError, RedisError, ResponseError
from redis.retry import Retry

from engine.errors import CheckpointMissing, StoreUnavailable
from engine.state.store import require_checkpoint_id

CHUNK_BYTES = 1 << 20
CHUNKS_IN_FLIGHT = 2
UPLOAD_SECONDS = 600
TIMEOUT_SECONDS = 2.0  # of one exchange, at most CHUNKS_IN_FLIGHT chunks
QUARANTINE_SECONDS = 7 * 86_400
MAX_QUARANTINED = 16
QUARANTINE = "rk:q"  # list: ids, newest first; each is kept under this name, a colon and its id

SIZE = "size"  # the field that makes a checkpoint complete


class RedisStateStore:
    """Checkpoints in the Redis at `url`. Connects when it is first used."""

    tier = "redis"

    def __init__(self, url: str, *, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
        self._redis = Redis.from_url(
            url,
            socket_timeout=timeout_seconds,
            socket_connect_timeout=timeout_seconds,
            retry=Retry(NoBackoff(), 1, (ConnectionError,)),  # a restart of Redis is no error; no command here minds
            decode_responses=False,
        )

    def put(self, checkpoint_id: str, blob: bytes | bytearray | memoryview, ttl_seconds: float) -> None:
        """See `StateStore.put`. When it returns, the blob is in the memory of Redis."""
        key = _key(checkpoint_id)
        with _unavailable_on_redis_error():
            try:
                self._upload(key, memoryview(blob).cast("B"), ttl_seconds)
            except (ResponseError, StoreUnavailable):
                self._redis.unlink(key)  # it stands in the way of others if the memory is full
                raise

    def get(self, checkpoint_id: str) -> bytearray:
        """See `StateStore.get`."""
        key = _key(checkpoint_id)
        with _unavailable_on_redis_error():
            blob = bytearray(self._complete_size(key))
            for chunks in _batches(len(blob)):
                received = self._redis.hmget(key, [str(chunk) for chunk in chunks])
                for chunk, data in zip(chunks, received, strict=True):
                    place = _slice(chunk)
                    if not isinstance(data, bytes) or len(data) != len(range(*place.indices(len(blob)))):
                        raise CheckpointMissing(f"checkpoint {checkpoint_id} is incomplete, or went while it was read")
                    blob[place] = data
        return blob

    def delete(self, checkpoint_ids: Iterable[str]) -> None:
        """See `StateStore.delete`."""
        keys = [_key(checkpoint_id) for checkpoint_id in checkpoint_ids]
        with _unavailable_on_redis_error():
            if keys:
                self._redis.unlink(*keys)

    def quarantine(self, checkpoint_id: str) -> None:
        """See `StateStore.quarantine`. The newest few are kept for a week under `rk:q:` and their id."""
        key = _key(checkpoint_id)
        with _unavailable_on_redis_error():
            if not self._redis.exists(key):
                return
            self._redis.rename(key, f"{QUARANTINE}:{checkpoint_id}")
            with self._redis.pipeline(transaction=True) as pipeline:
                pipeline.expire(f"{QUARANTINE}:{checkpoint_id}", QUARANTINE_SECONDS)
                pipeline.lpush(QUARANTINE, checkpoint_id)
                pipeline.lrange(QUARANTINE, MAX_QUARANTINED, -1)
                pipeline.ltrim(QUARANTINE, 0, MAX_QUARANTINED - 1)
                pipeline.expire(QUARANTINE, QUARANTINE_SECONDS)
                _, _, oldest, _, _ = pipeline.execute()
            if oldest:
                self._redis.unlink(*(f"{QUARANTINE}:{name.decode()}" for name in oldest))

    def sweep(self) -> int:
        """See `StateStore.sweep`. Redis itself removes what expired or was left half-written."""
        return 0

    def close(self) -> None:
        """See `StateStore.close`."""
        self._redis.close()

    def _upload(self, key: str, blob: memoryview, ttl_seconds: float) -> None:
        for chunks in _batches(len(blob)):
            with self._redis.pipeline(transaction=True) as pipeline:
                for chunk in chunks:
                    pipeline.hset(key, str(chunk), bytes(blob[_slice(chunk)]))
                pipeline.expire(key, UPLOAD_SECONDS)
                pipeline.execute()
        with self._redis.pipeline(transaction=True) as pipeline:
            pipeline.hset(key, SIZE, len(blob))
            pipeline.pexpire(key, round(ttl_seconds * 1000))
            pipeline.hlen(key)
            *_, num_fields = pipeline.execute()
        if num_fields != _num_chunks(len(blob)) + 1:
            raise StoreUnavailable("Redis evicted a checkpoint while it was uploaded: its memory is too small")

    def _complete_size(self, key: str) -> int:
        """Return the size of a blob whose chunks are all there, as far as their number tells; so it can be trusted."""
        with self._redis.pipeline(transaction=False) as pipeline:  # a full Redis refuses transactions, even to read
            pipeline.hget(key, SIZE)
            pipeline.hlen(key)
            size, num_fields = pipeline.execute()
        if size is None or not size.isdigit() or num_fields != _num_chunks(int(size)) + 1:
            raise CheckpointMissing(f"no whole checkpoint in {key}")
        return int(size)


def _key(checkpoint_id: str) -> str:
    require_checkpoint_id(checkpoint_id)
    return f"rk:b:{checkpoint_id}"


def _num_chunks(num_bytes: int) -> int:
    return -(-num_bytes // CHUNK_BYTES)


def _batches(num_bytes: int) -> Iterator[range]:
    """Yield the indices of the chunks that travel together."""
    num_chunks = _num_chunks(num_bytes)
    for first in range(0, num_chunks, CHUNKS_IN_FLIGHT):
        yield range(first, min(first + CHUNKS_IN_FLIGHT, num_chunks))


def _slice(chunk: int) -> slice:
    return slice(chunk * CHUNK_BYTES, (chunk + 1) * CHUNK_BYTES)


@contextmanager
def _unavailable_on_redis_error() -> Iterator[None]:
    try:
        yield
    except (RedisError, OSError) as error:
        raise StoreUnavailable(f"the state store's Redis did not do as asked: {error}") from error

"""Checkpoints in this process's memory, for tests and embedding: they survive nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from engine.errors import CheckpointMissing
from engine.state.store import require_checkpoint_id

MAX_QUARANTINED = 16


@dataclass(frozen=True, slots=True)
class StoredBlob:
    """A checkpoint, and when it ends."""

    data: bytes
    expires_at: float


class MemoryStore:
    """Checkpoints in a dictionary. `clock` returns seconds, and must not jump."""

    tier = "memory"

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.quarantined: dict[str, bytes] = {}
        self._clock = clock
        self._blobs: dict[str, StoredBlob] = {}
        self._lock = threading.Lock()

    def put(self, checkpoint_id: str, blob: bytes | bytearray | memoryview, ttl_seconds: float) -> None:
        """See `StateStore.put`."""
        require_checkpoint_id(checkpoint_id)
        with self._lock:
            self._blobs[checkpoint_id] = StoredBlob(bytes(blob), self._clock() + ttl_seconds)

    def get(self, checkpoint_id: str) -> bytearray:
        """See `StateStore.get`."""
        require_checkpoint_id(checkpoint_id)
        with self._lock:
            stored = self._blobs.get(checkpoint_id)
        if stored is None or stored.expires_at <= self._clock():
            raise CheckpointMissing(f"no checkpoint {checkpoint_id} in memory")
        return bytearray(stored.data)

    def delete(self, checkpoint_ids: Iterable[str]) -> None:
        """See `StateStore.delete`."""
        for checkpoint_id in checkpoint_ids:
            require_checkpoint_id(checkpoint_id)
            with self._lock:
                self._blobs.pop(checkpoint_id, None)

    def quarantine(self, checkpoint_id: str) -> None:
        """See `StateStore.quarantine`. The newest few stay in `quarantined`."""
        require_checkpoint_id(checkpoint_id)
        with self._lock:
            stored = self._blobs.pop(checkpoint_id, None)
            if stored is None:
                return
            self.quarantined[checkpoint_id] = stored.data
            while len(self.quarantined) > MAX_QUARANTINED:
                del self.quarantined[next(iter(self.quarantined))]

    def sweep(self) -> int:
        """See `StateStore.sweep`."""
        now = self._clock()
        with self._lock:
            expired = [name for name, stored in self._blobs.items() if stored.expires_at <= now]
            for checkpoint_id in expired:
                del self._blobs[checkpoint_id]
        return len(expired)

    def close(self) -> None:
        """See `StateStore.close`. Nothing to release."""

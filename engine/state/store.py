"""Where state checkpoints are kept: a contract for immutable blobs that may vanish, but never change.

Used by the engine's checkpoint threads only, hence synchronous. An implementation promises: `put` is whole or nothing;
`get` returns exactly the bytes of one `put`, or raises; every blob lives at most `ttl_seconds`, extended by nobody.
What a blob means is `engine.state.checkpoint`'s business.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol


class StateStore(Protocol):
    """A store of checkpoints. Thread-safe. Implementations: memory, files, Redis."""

    tier: str  # memory | file | redis: a metric label

    def put(self, checkpoint_id: str, blob: bytes | bytearray | memoryview, ttl_seconds: float) -> None:
        """Store `blob` under a name that was never used before; raises `StoreUnavailable`."""
        ...

    def get(self, checkpoint_id: str) -> bytearray:
        """Return the blob; raises `CheckpointMissing` or `StoreUnavailable`."""
        ...

    def delete(self, checkpoint_ids: Iterable[str]) -> None:
        """Remove blobs; absent ones are no error. Raises `StoreUnavailable`."""
        ...

    def quarantine(self, checkpoint_id: str) -> None:
        """Put a rejected blob where `get` no longer finds it but an operator does (promise P13)."""
        ...

    def sweep(self) -> int:
        """Remove what expired or was left half-written; returns how many. Called at start and now and then."""
        ...

    def close(self) -> None:
        """Release connections."""
        ...

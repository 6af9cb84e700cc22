"""Where state checkpoints are kept: a contract for immutable blobs that may vanish, but never change.

Used by the engine's checkpoint threads only, hence synchronous. An implementation promises: `put` is whole or nothing;
`get` returns exactly the bytes of one `put`, or raises; every blob lives at most `ttl_seconds` from its last `put`.
What a blob means is `engine.state.checkpoint`'s business.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Protocol

from engine.errors import CheckpointRejected

CHECKPOINT_ID = re.compile("[0-9a-f]{32}")


def require_checkpoint_id(checkpoint_id: str) -> None:
    """Raise `CheckpointRejected` unless this is 128 bits in hex, the only kind of name that reaches a store.

    Names come out of the ledger: a damaged one must not become a path or a key.
    """
    if CHECKPOINT_ID.fullmatch(checkpoint_id) is None:
        raise CheckpointRejected("id", f"no checkpoint has the name {checkpoint_id[:64]!r}")


class StateStore(Protocol):
    """A store of checkpoints. Thread-safe. Implementations: memory, files, Redis.

    Every method that takes a name raises `CheckpointRejected` for what `require_checkpoint_id` refuses.
    """

    tier: str  # memory | file | redis: a metric label

    def put(self, checkpoint_id: str, blob: bytes | bytearray | memoryview, ttl_seconds: float) -> None:
        """Store `blob` under its name; raises `StoreUnavailable`.

        A name is used for one state only: fresh, or derived from what the state is. Several may write the latter, at
        once too; what is then read is whole, or (if they wrote different bytes) is rejected by its digest.
        """
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

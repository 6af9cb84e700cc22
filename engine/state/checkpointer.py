"""States to the store and back, off the engine's thread.

Nobody here waits for anybody: each method returns a future, and `notify` is called from a worker thread whenever one is
done. Writing is behind the turn it belongs to and must never delay a resume, so the two have threads of their own.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from queue import Empty, SimpleQueue
from typing import TypeVar

import msgspec

from engine.errors import CheckpointError, CheckpointMissing, CheckpointRejected
from engine.messages import CheckpointRef, CheckpointStored
from engine.state.checkpoint import decode_state, encode_state
from engine.state.spec import RecurrentState, StateSpec
from engine.state.store import StateStore

_log = logging.getLogger(__name__)

NUM_READERS = 4
NUM_WRITERS = 2
SWEEP_SECONDS = 600.0

T = TypeVar("T")


class Checkpointer:
    """Writes and reads the checkpoints of one model in one store. Its methods are for the engine's thread only."""

    def __init__(
        self,
        store: StateStore,
        spec: StateSpec,
        ttl_seconds: float,
        notify: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._spec = spec
        self._ttl_seconds = ttl_seconds
        self._notify = notify
        self._clock = clock
        self._readers = ThreadPoolExecutor(NUM_READERS, thread_name_prefix="checkpoint-reader")
        self._writers = ThreadPoolExecutor(NUM_WRITERS, thread_name_prefix="checkpoint-writer")
        self._unwanted: SimpleQueue[str] = SimpleQueue()
        self._swept_at: float | None = None

    def save(self, state: RecurrentState, checkpoint_id: str | None = None) -> Future[CheckpointStored]:
        """Write `state` under a fresh id, or one that names just this state. The future raises `StoreUnavailable`."""
        return self._submit(self._writers, self._save, state, checkpoint_id or secrets.token_hex(16))

    def fetch(self, ref: CheckpointRef) -> Future[RecurrentState]:
        """Read the state that `ref` names, verified whole.

        The future raises `CheckpointMissing`, `StoreUnavailable`, or `CheckpointRejected`: then the checkpoint has been
        put where nobody finds it again.
        """
        return self._submit(self._readers, self._fetch, ref)

    def fetch_first(self, refs: Sequence[CheckpointRef]) -> Future[RecurrentState]:
        """Read the first of `refs` that is there; the future raises as that of `fetch` does, once none is left."""
        return self._submit(self._readers, self._fetch_first, refs)

    def adopt(self, ref: CheckpointRef, chain: bytes) -> Future[CheckpointStored]:
        """Verify the state that `ref` names, which came from elsewhere, and write it under a fresh id as `chain`'s.

        The future raises as that of `fetch` and of `save`; what is rejected stays where it is, for it was never ours.
        """
        return self._submit(self._writers, self._adopt, ref, chain)

    def delete(self, checkpoint_ids: Iterable[str]) -> None:
        """Remove checkpoints, some time soon. What cannot be removed expires by itself."""
        for checkpoint_id in checkpoint_ids:
            self._unwanted.put(checkpoint_id)
        self._submit(self._writers, self._delete_unwanted)

    def sweep_when_due(self) -> None:
        """Clear the store of what has expired, at first and then every ten minutes; costs nothing in between."""
        now = self._clock()
        if self._swept_at is None or now - self._swept_at >= SWEEP_SECONDS:
            self._swept_at = now
            self._submit(self._writers, self._sweep)

    def close(self) -> None:
        """Wait for what is being read or written, drop what has not begun, and close the store."""
        self._readers.shutdown(cancel_futures=True)
        self._writers.shutdown(cancel_futures=True)
        self._store.close()

    def _submit(self, pool: ThreadPoolExecutor, work: Callable[..., T], *arguments: object) -> Future[T]:
        future = pool.submit(work, *arguments)
        future.add_done_callback(lambda _: self._notify())
        return future

    def _save(self, state: RecurrentState, checkpoint_id: str) -> CheckpointStored:
        began_at = self._clock()
        blob = encode_state(state, self._spec)
        self._store.put(checkpoint_id, blob, self._ttl_seconds)
        ref = CheckpointRef(
            checkpoint_id=checkpoint_id, num_tokens=state.num_tokens, chain=state.chain, num_bytes=len(blob)
        )
        return CheckpointStored(ref=ref, save_seconds=self._clock() - began_at, tier=self._store.tier)

    def _fetch_first(self, refs: Sequence[CheckpointRef]) -> RecurrentState:
        reason: CheckpointMissing | CheckpointRejected = CheckpointMissing("none of these states is in the store")
        for ref in refs:
            try:
                return self._fetch(ref)
            except CheckpointMissing:
                continue
            except CheckpointRejected as rejected:
                reason = rejected
        raise reason

    def _fetch(self, ref: CheckpointRef) -> RecurrentState:
        blob = self._store.get(ref.checkpoint_id)
        try:
            return decode_state(blob, self._spec, ref)
        except CheckpointRejected as error:
            _log.error("checkpoint %s is rejected (%s): %s", ref.checkpoint_id, error.reason, error)
            self._quarantine(ref.checkpoint_id)
            raise

    def _adopt(self, ref: CheckpointRef, chain: bytes) -> CheckpointStored:
        state = decode_state(self._store.get(ref.checkpoint_id), self._spec, ref)
        if not state.is_finite:
            raise CheckpointRejected("numbers", "not all of it are numbers")
        stored = self._save(replace(state, chain=chain), secrets.token_hex(16))
        return msgspec.structs.replace(stored, adopted=ref.checkpoint_id)

    def _quarantine(self, checkpoint_id: str) -> None:
        try:
            self._store.quarantine(checkpoint_id)
        except CheckpointError:
            _log.warning("checkpoint %s could not be put into quarantine", checkpoint_id, exc_info=True)

    def _delete_unwanted(self) -> None:
        """Delete all that is unwanted by now: of several calls in a row the first does the work."""
        unwanted: list[str] = []
        with suppress(Empty):
            while True:
                unwanted.append(self._unwanted.get_nowait())
        if not unwanted:
            return
        try:
            self._store.delete(unwanted)
        except CheckpointError:
            _log.warning("%d checkpoints could not be deleted; they will expire", len(unwanted), exc_info=True)

    def _sweep(self) -> None:
        try:
            num_removed = self._store.sweep()
        except CheckpointError:
            _log.warning("the state store could not be swept", exc_info=True)
        else:
            _log.info("swept %d expired checkpoints", num_removed)

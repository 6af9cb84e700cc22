"""The embedded ledger: a SQLite file, and the one thread that touches it.

A commit that returned is on the disk (`synchronous=FULL`). Exactly one connection reads, writes and checkpoints: two
can corrupt a write-ahead log (SQLite up to 3.51.2), and one needs no locks.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ParamSpec, TypeVar

from engine.messages import CheckpointRef
from server.conversations.ledger import (
    Conversation,
    Document,
    Durability,
    Lease,
    LedgerCorrupt,
    LedgerUnavailable,
    Turn,
)
from server.conversations.sqlite_documents import SqliteDocuments
from server.conversations.sqlite_file import SqliteFile
from server.conversations.sqlite_log import SqliteLog, steady_clock
from server.conversations.uninterrupted import UninterruptedCalls

TOMBSTONE_SECONDS = 7 * 86_400.0  # promise P14

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

logger = logging.getLogger(__name__)


class SqliteLedger:
    """A ledger in the file at `path`, alone in its directory; without a path, in memory.

    `clock` returns seconds since the epoch, and must not jump: leases and times to live are measured with it.
    """

    is_shared = False

    def __init__(
        self,
        path: Path | None,
        *,
        tombstone_seconds: float = TOMBSTONE_SECONDS,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self.durability = Durability.MEMORY if path is None else Durability.FSYNCED
        clock = clock or steady_clock()
        self._file = SqliteFile(path)
        self._log = SqliteLog(self._file, tombstone_seconds, clock)
        self._documents = SqliteDocuments(self._file, clock)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ledger")
        self._calls = UninterruptedCalls()
        self._failure: str | None = None  # why no call is taken any more

    async def open(self) -> None:
        """See `Ledger.open`."""
        try:
            await self._run(self._file.open)
            await self._run(self._log.open)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """See `Ledger.close`. The ledger can't be opened again."""
        self._failure = "the ledger is closed"
        await self._calls.wait()
        await asyncio.wrap_future(self._thread.submit(self._file.close))
        self._thread.shutdown()

    async def create(self, conversation: Conversation, turns: Sequence[Turn] = ()) -> None:
        """See `Ledger.create`."""
        await self._run(self._log.create, conversation, turns)

    async def get(self, conversation_id: str) -> Conversation:
        """See `Ledger.get`."""
        return await self._run(self._log.get, conversation_id)

    async def update(
        self, conversation_id: str, *, metadata: dict[str, str] | None = None, ttl_seconds: float | None = None
    ) -> Conversation:
        """See `Ledger.update`."""
        return await self._run(self._log.update, conversation_id, metadata, ttl_seconds)

    async def turns(self, conversation_id: str, after_version: int = 0) -> list[Turn]:
        """See `Ledger.turns`."""
        return await self._run(self._log.turns, conversation_id, after_version)

    async def find_reply(self, conversation_id: str, reply_id: str) -> Turn | None:
        """See `Ledger.find_reply`."""
        return await self._run(self._log.find_reply, conversation_id, reply_id)

    async def acquire(self, conversation_id: str, owner: str, ttl_seconds: float) -> tuple[Lease, Conversation]:
        """See `Ledger.acquire`. A lease that arrives after its caller was cancelled is given back."""
        call = self._in_thread(self._log.acquire, conversation_id, owner, ttl_seconds)
        return await self._calls.run(call, undo=lambda acquired: self.release(acquired[0]))

    async def renew(self, lease: Lease) -> None:
        """See `Ledger.renew`."""
        await self._run(self._log.renew, lease)

    async def release(self, lease: Lease) -> None:
        """See `Ledger.release`."""
        await self._run(self._log.release, lease)

    async def commit(self, lease: Lease, turn: Turn) -> None:
        """See `Ledger.commit`. A turn that is the head already counts as committed."""
        await self._run(self._log.commit, lease, turn)

    async def point(
        self, conversation_id: str, version: int, checkpoint: CheckpointRef, drop: Collection[int] = ()
    ) -> list[CheckpointRef]:
        """See `Ledger.point`."""
        return await self._run(self._log.point, conversation_id, version, checkpoint, drop)

    async def delete(self, conversation_id: str) -> Conversation:
        """See `Ledger.delete`."""
        return await self._run(self._log.delete, conversation_id)

    async def sweep(self) -> list[CheckpointRef]:
        """See `Ledger.sweep`."""
        await self._run(self._documents.sweep)
        return await self._run(self._log.sweep)

    async def put_document(self, document: Document, *, if_absent: bool = False) -> bool:
        """See `Ledger.put_document`."""
        return await self._run(self._documents.put, document, if_absent)

    async def get_document(self, kind: str, document_id: str) -> Document | None:
        """See `Ledger.get_document`."""
        return await self._run(self._documents.get, kind, document_id)

    async def delete_document(self, kind: str, document_id: str) -> bool:
        """See `Ledger.delete_document`."""
        return await self._run(self._documents.delete, kind, document_id)

    async def documents(
        self, kind: str, *, after: str | None = None, limit: int = 100, newest_first: bool = False
    ) -> list[Document]:
        """See `Ledger.documents`."""
        return await self._run(self._documents.list, kind, after, limit, newest_first)

    async def _run(
        self, operation: Callable[Parameters, Result], *args: Parameters.args, **kwargs: Parameters.kwargs
    ) -> Result:
        return await self._calls.run(self._in_thread(operation, *args, **kwargs))

    async def _in_thread(
        self, operation: Callable[Parameters, Result], *args: Parameters.args, **kwargs: Parameters.kwargs
    ) -> Result:
        if self._failure is not None:
            raise LedgerUnavailable(self._failure)
        try:
            return await asyncio.wrap_future(self._thread.submit(operation, *args, **kwargs))
        except (sqlite3.Error, OSError) as error:
            raise self._translate(error) from error

    def _translate(self, error: sqlite3.Error | OSError) -> LedgerUnavailable | LedgerCorrupt:
        name = getattr(error, "sqlite_errorname", "")
        if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
            return LedgerCorrupt(f"the ledger's file is damaged: {error}")
        if name.endswith("FSYNC"):
            # After a failed fsync the kernel may drop the pages and report success next time: nothing that is
            # acknowledged from here on would be known to be on the disk.
            self._failure = "the ledger's disk failed to sync; check the disk and restart the server"
            logger.critical("%s (%s)", self._failure, name)
        return LedgerUnavailable(f"the ledger's file cannot be used: {error}")

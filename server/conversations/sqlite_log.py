"""The ledger's SQLite file: one transaction a method. Synchronous, for one thread; knows no event loop.

One process at a time has the file, proven by a lock on its directory. So leases live in this process's memory: they
cost no disk write, and die with the process that held them.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.messages import CheckpointRef
from server.conversations import records
from server.conversations.ledger import (
    Conversation,
    ConversationBusy,
    ConversationExists,
    ConversationExpired,
    ConversationNotFound,
    Lease,
    LeaseLost,
    LedgerCorrupt,
    LedgerUnavailable,
    Turn,
    VersionConflict,
)

SCHEMA_VERSION = 1

SCHEMA = """
CREATE TABLE conversations (
    conversation_id TEXT PRIMARY KEY,
    head BLOB NOT NULL,
    version INTEGER NOT NULL,
    chain BLOB NOT NULL,
    num_tokens INTEGER NOT NULL,
    request_id TEXT,
    ttl_seconds REAL NOT NULL,
    expires_at REAL NOT NULL,
    checkpoint BLOB,
    checkpoint_version INTEGER NOT NULL
) STRICT;
CREATE INDEX conversations_by_expiry ON conversations (expires_at);
CREATE TABLE turns (
    conversation_id TEXT NOT NULL,
    version INTEGER NOT NULL,
    record BLOB NOT NULL,
    PRIMARY KEY (conversation_id, version)
) STRICT;
CREATE TABLE tombstones (conversation_id TEXT PRIMARY KEY, until REAL NOT NULL) STRICT;
CREATE TABLE epoch (number INTEGER NOT NULL) STRICT;
INSERT INTO epoch VALUES (0);
"""

# Deleted text is overwritten, not only forgotten (promise P20); the rest keeps the file small and suspects it.
PRAGMAS = (
    "PRAGMA synchronous = FULL",
    "PRAGMA secure_delete = ON",
    "PRAGMA journal_size_limit = 67108864",
    "PRAGMA trusted_schema = OFF",
    "PRAGMA cell_size_check = ON",
)


def steady_clock() -> Callable[[], float]:
    """Return a clock that reads the time of day once, and only counts from there: nobody can set it."""
    offset = time.time() - time.monotonic()
    return lambda: offset + time.monotonic()


@dataclass(frozen=True, slots=True)
class HeldLease:
    """A lease as the ledger remembers it."""

    fence: int
    until: float


class SqliteLog:
    """A ledger's tables in one file, or in memory when `path` is None. Every method belongs to one thread."""

    def __init__(self, path: Path | None, tombstone_seconds: float, clock: Callable[[], float]) -> None:
        self._path = path
        self._tombstone_seconds = tombstone_seconds
        self._clock = clock
        self._leases: dict[str, HeldLease] = {}
        self._fences: Iterator[int] = itertools.count()
        self._directory_lock: int | None = None
        self._connection: sqlite3.Connection | None = None

    # -- opening ----------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Lock the directory, check the file, and bring its schema up to date."""
        if self._path is not None:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock_directory(self._path.parent)
            _create_private(self._path)
        self._connection = sqlite3.connect(self._path or ":memory:", timeout=2.0, isolation_level=None)
        journal_mode = self._value("PRAGMA journal_mode = WAL")
        if journal_mode != ("memory" if self._path is None else "wal"):
            raise LedgerUnavailable(f"{self._path}: this file system does not support SQLite's write-ahead log")
        for pragma in PRAGMAS:
            self._database.execute(pragma)
        self._check_integrity()
        self._migrate()
        self._fences = itertools.count(self._next_epoch() << 32)

    def close(self) -> None:
        """Close the file and let another process have it."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._directory_lock is not None:
            os.close(self._directory_lock)
            self._directory_lock = None

    def _lock_directory(self, directory: Path) -> None:
        self._directory_lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._directory_lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise LedgerUnavailable(f"another process has the ledger in {directory} open") from error

    def _check_integrity(self) -> None:
        problem = self._value("PRAGMA integrity_check(1)")
        if problem != "ok":
            raise LedgerCorrupt(f"{self._path} is damaged: {problem}")

    def _migrate(self) -> None:
        version = self._value("PRAGMA user_version")
        if version > SCHEMA_VERSION:
            raise LedgerUnavailable(
                f"{self._path} has schema {version}, written by a newer release; this one knows up to {SCHEMA_VERSION}"
            )
        if version == 0:
            self._database.executescript(f"BEGIN; {SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")

    def _next_epoch(self) -> int:
        """Return a number that no earlier process had: fences grow from one process to the next."""
        with self._transaction():
            self._database.execute("UPDATE epoch SET number = number + 1")
            return int(self._value("SELECT number FROM epoch"))

    # -- conversations ----------------------------------------------------------------------------------------------

    def create(self, conversation: Conversation) -> None:
        """See `Ledger.create`."""
        with self._transaction():
            self._refuse_taken(conversation.conversation_id)
            self._database.execute(
                "INSERT INTO conversations VALUES (?, ?, 0, ?, ?, NULL, ?, ?, NULL, 0)",
                (
                    conversation.conversation_id,
                    records.encode_head(conversation),
                    conversation.chain,
                    conversation.num_tokens,
                    conversation.ttl_seconds,
                    self._clock() + conversation.ttl_seconds,
                ),
            )

    def get(self, conversation_id: str) -> Conversation:
        """See `Ledger.get`."""
        row = self._row(
            "SELECT head, version, chain, num_tokens, checkpoint, checkpoint_version, expires_at"
            " FROM conversations WHERE conversation_id = ?",
            conversation_id,
        )
        if row is None:
            if self._row("SELECT 1 FROM tombstones WHERE conversation_id = ?", conversation_id):
                raise ConversationExpired(f"conversation {conversation_id!r} is gone")
            raise ConversationNotFound(f"there is no conversation {conversation_id!r}")
        head, version, chain, num_tokens, checkpoint, checkpoint_version, expires_at = row
        if expires_at <= self._clock() and not self._is_leased(conversation_id):
            raise ConversationExpired(f"conversation {conversation_id!r} has expired")
        return records.decode_head(
            head,
            conversation_id,
            version=version,
            chain=chain,
            num_tokens=num_tokens,
            checkpoint=checkpoint,
            checkpoint_version=checkpoint_version,
        )

    def turns(self, conversation_id: str, after_version: int) -> list[Turn]:
        """See `Ledger.turns`."""
        head = self.get(conversation_id)
        rows = self._database.execute(
            "SELECT record FROM turns WHERE conversation_id = ? AND version > ? ORDER BY version",
            (conversation_id, after_version),
        )
        return records.decode_turns([record for (record,) in rows], head, after_version)

    def delete(self, conversation_id: str) -> Conversation:
        """See `Ledger.delete`."""
        with self._transaction():
            head = self.get(conversation_id)
            self._bury(conversation_id, self._clock() + self._tombstone_seconds)
        self._leases.pop(conversation_id, None)
        # The log may still hold what was deleted; empty it into the file, where it is overwritten.
        self._database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return head

    def sweep(self) -> list[CheckpointRef]:
        """See `Ledger.sweep`."""
        now = self._clock()
        with self._transaction():
            expired = self._database.execute(
                "SELECT conversation_id, expires_at, checkpoint FROM conversations WHERE expires_at <= ?", (now,)
            ).fetchall()
            gone = [row for row in expired if not self._is_leased(row[0])]
            for conversation_id, expires_at, _ in gone:
                self._bury(conversation_id, expires_at + self._tombstone_seconds)
            self._database.execute("DELETE FROM tombstones WHERE until <= ?", (now,))
        return [records.decode_checkpoint(checkpoint) for _, _, checkpoint in gone if checkpoint is not None]

    def _refuse_taken(self, conversation_id: str) -> None:
        try:
            self.get(conversation_id)
        except ConversationNotFound:
            return
        raise ConversationExists(f"conversation {conversation_id!r} exists")

    def _bury(self, conversation_id: str, until: float) -> None:
        self._database.execute("DELETE FROM turns WHERE conversation_id = ?", (conversation_id,))
        self._database.execute("DELETE FROM conversations WHERE conversation_id = ?", (conversation_id,))
        self._database.execute("INSERT INTO tombstones VALUES (?, ?)", (conversation_id, until))

    # -- leases -----------------------------------------------------------------------------------------------------

    def acquire(self, conversation_id: str, owner: str, ttl_seconds: float) -> tuple[Lease, Conversation]:
        """See `Ledger.acquire`."""
        head = self.get(conversation_id)
        if self._is_leased(conversation_id):
            raise ConversationBusy(conversation_id, self._leases[conversation_id].until - self._clock())
        held = HeldLease(next(self._fences), self._clock() + ttl_seconds)
        self._leases[conversation_id] = held
        return Lease(conversation_id=conversation_id, owner=owner, fence=held.fence, ttl_seconds=ttl_seconds), head

    def renew(self, lease: Lease) -> None:
        """See `Ledger.renew`."""
        self._require(lease)
        self._leases[lease.conversation_id] = HeldLease(lease.fence, self._clock() + lease.ttl_seconds)

    def release(self, lease: Lease) -> None:
        """See `Ledger.release`."""
        if self._holds(lease):
            del self._leases[lease.conversation_id]

    def _is_leased(self, conversation_id: str) -> bool:
        held = self._leases.get(conversation_id)
        return held is not None and held.until > self._clock()

    def _holds(self, lease: Lease) -> bool:
        return self._is_leased(lease.conversation_id) and self._leases[lease.conversation_id].fence == lease.fence

    def _require(self, lease: Lease) -> None:
        if not self._holds(lease):
            raise LeaseLost(f"the lease on conversation {lease.conversation_id!r} has ended")

    # -- turns ------------------------------------------------------------------------------------------------------

    def commit(self, lease: Lease, turn: Turn) -> None:
        """See `Ledger.commit`."""
        conversation_id = lease.conversation_id
        with self._transaction():
            if self._is_committed(conversation_id, turn):
                return
            self._require(lease)
            head = self.get(conversation_id)
            if head.version != turn.version - 1:
                raise VersionConflict(conversation_id, turn.version - 1, head.version)
            self._database.execute(
                "INSERT INTO turns VALUES (?, ?, ?)",
                (conversation_id, turn.version, records.encode_turn(conversation_id, turn)),
            )
            self._database.execute(
                "UPDATE conversations SET version = ?, chain = ?, num_tokens = ?, request_id = ?,"
                " expires_at = ? + ttl_seconds WHERE conversation_id = ?",
                (turn.version, turn.chain, turn.num_tokens, turn.request_id, self._clock(), conversation_id),
            )
        self.release(lease)

    def point(self, conversation_id: str, version: int, checkpoint: CheckpointRef) -> CheckpointRef | None:
        """See `Ledger.point`."""
        with self._transaction():
            try:
                head = self.get(conversation_id)
            except (ConversationNotFound, ConversationExpired):
                return checkpoint
            if head.checkpoint == checkpoint:
                return None
            turn = self._row(
                "SELECT 1 FROM turns WHERE conversation_id = ? AND version = ? AND substr(record, 1, 16) = ?",
                conversation_id,
                version,
                checkpoint.chain,
            )
            # A state of another history must never become this conversation's.
            if turn is None or version <= head.checkpoint_version:
                return checkpoint
            self._database.execute(
                "UPDATE conversations SET checkpoint = ?, checkpoint_version = ? WHERE conversation_id = ?",
                (records.encode_checkpoint(checkpoint), version, conversation_id),
            )
            return head.checkpoint

    def _is_committed(self, conversation_id: str, turn: Turn) -> bool:
        """Say whether `turn` is the head: the reply to its commit was lost, and it is committed again."""
        row = self._row(
            "SELECT 1 FROM conversations WHERE conversation_id = ? AND version = ? AND chain = ? AND request_id = ?",
            conversation_id,
            turn.version,
            turn.chain,
            turn.request_id,
        )
        return row is not None

    # -- SQL --------------------------------------------------------------------------------------------------------

    @property
    def _database(self) -> sqlite3.Connection:
        if self._connection is None:
            raise LedgerUnavailable("the ledger is not open")
        return self._connection

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        database = self._database
        database.execute("BEGIN IMMEDIATE")
        try:
            yield
            database.execute("COMMIT")
        except BaseException:
            if database.in_transaction:
                database.execute("ROLLBACK")
            raise

    def _row(self, query: str, *parameters: str | int | bytes) -> tuple[Any, ...] | None:
        row: tuple[Any, ...] | None = self._database.execute(query, parameters).fetchone()
        return row

    def _value(self, query: str) -> Any:
        (value,) = self._database.execute(query).fetchone()
        return value


def _create_private(path: Path) -> None:
    """Create the file if it is new, readable by its owner alone; SQLite gives its log the same permissions.

    To be called before SQLite opens the file: closing any descriptor of it drops all of SQLite's locks on it.
    """
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    os.fchmod(descriptor, 0o600)
    os.close(descriptor)

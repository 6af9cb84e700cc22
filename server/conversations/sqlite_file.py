"""The ledger's SQLite file: opened by one process, checked, brought to the newest schema. Knows no conversation."""

from __future__ import annotations

import fcntl
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from server.conversations.ledger import LedgerCorrupt, LedgerUnavailable

# The script at index n takes a file from schema n to n + 1.
SCHEMAS = (
    """
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
""",
    """
CREATE TABLE checkpoints (
    conversation_id TEXT NOT NULL,
    version INTEGER NOT NULL,
    record BLOB NOT NULL,
    PRIMARY KEY (conversation_id, version)
) STRICT;
INSERT INTO checkpoints
    SELECT conversation_id, checkpoint_version, checkpoint FROM conversations WHERE checkpoint IS NOT NULL;
ALTER TABLE conversations DROP COLUMN checkpoint;
ALTER TABLE conversations DROP COLUMN checkpoint_version;
ALTER TABLE conversations ADD COLUMN metadata BLOB;
ALTER TABLE turns ADD COLUMN reply_id TEXT;
CREATE INDEX turns_by_reply ON turns (conversation_id, reply_id) WHERE reply_id IS NOT NULL;
CREATE TABLE documents (
    kind TEXT NOT NULL,
    document_id TEXT NOT NULL,
    record BLOB NOT NULL,
    created_at REAL NOT NULL,
    expires_at REAL NOT NULL,
    PRIMARY KEY (kind, document_id)
) STRICT;
CREATE INDEX documents_by_creation ON documents (kind, created_at, document_id);
CREATE INDEX documents_by_expiry ON documents (expires_at);
""",
)

# Deleted text is overwritten, not only forgotten (promise P20); the rest keeps the file small and suspects it.
PRAGMAS = (
    "PRAGMA synchronous = FULL",
    "PRAGMA secure_delete = ON",
    "PRAGMA journal_size_limit = 67108864",
    "PRAGMA trusted_schema = OFF",
    "PRAGMA cell_size_check = ON",
)


class SqliteFile:
    """The one connection to the file at `path`, or to memory when that is None. Every method belongs to one thread.

    One process at a time has the file, proven by a lock on its directory.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._directory_lock: int | None = None
        self._connection: sqlite3.Connection | None = None

    def open(self) -> None:
        """Lock the directory, check the file, and bring its schema up to date."""
        if self._path is not None:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock_directory(self._path.parent)
            _create_private(self._path)
        self._connection = sqlite3.connect(self._path or ":memory:", timeout=2.0, isolation_level=None)
        journal_mode = self.value("PRAGMA journal_mode = WAL")
        if journal_mode != ("memory" if self._path is None else "wal"):
            raise LedgerUnavailable(f"{self._path}: this file system does not support SQLite's write-ahead log")
        for pragma in PRAGMAS:
            self.execute(pragma)
        self._check_integrity()
        self._migrate()

    def close(self) -> None:
        """Close the file and let another process have it."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._directory_lock is not None:
            os.close(self._directory_lock)
            self._directory_lock = None

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Do what follows as a whole, or not at all."""
        database = self._database
        database.execute("BEGIN IMMEDIATE")
        try:
            yield
            database.execute("COMMIT")
        except BaseException:
            if database.in_transaction:
                database.execute("ROLLBACK")
            raise

    def execute(self, statement: str, *parameters: str | float | bytes | None) -> sqlite3.Cursor:
        """Run one statement."""
        return self._database.execute(statement, parameters)

    def row(self, query: str, *parameters: str | float | bytes) -> tuple[Any, ...] | None:
        """Return the first row that `query` finds."""
        row: tuple[Any, ...] | None = self._database.execute(query, parameters).fetchone()
        return row

    def value(self, query: str) -> Any:
        """Return the one value that `query` finds."""
        (value,) = self._database.execute(query).fetchone()
        return value

    def erase_log(self) -> None:
        """Empty the write-ahead log, which may hold what was deleted, into the file, where it is overwritten."""
        self.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    @property
    def _database(self) -> sqlite3.Connection:
        if self._connection is None:
            raise LedgerUnavailable("the ledger is not open")
        return self._connection

    def _lock_directory(self, directory: Path) -> None:
        self._directory_lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._directory_lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise LedgerUnavailable(f"another process has the ledger in {directory} open") from error

    def _check_integrity(self) -> None:
        problem = self.value("PRAGMA integrity_check(1)")
        if problem != "ok":
            raise LedgerCorrupt(f"{self._path} is damaged: {problem}")

    def _migrate(self) -> None:
        version = self.value("PRAGMA user_version")
        newest = len(SCHEMAS)
        if version > newest:
            raise LedgerUnavailable(
                f"{self._path} has schema {version}, written by a newer release; this one knows up to {newest}"
            )
        if version < newest:
            steps = "".join(SCHEMAS[version:])
            self._database.executescript(f"BEGIN IMMEDIATE; {steps} PRAGMA user_version = {newest}; COMMIT;")


def _create_private(path: Path) -> None:
    """Create the file if it is new, readable by its owner alone; SQLite gives its log the same permissions.

    To be called before SQLite opens the file: closing any descriptor of it drops all of SQLite's locks on it.
    """
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    os.fchmod(descriptor, 0o600)
    os.close(descriptor)

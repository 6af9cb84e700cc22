"""The documents in the ledger's SQLite file: one transaction a method. Synchronous, for one thread."""

from __future__ import annotations

from collections.abc import Callable

from server.conversations import records
from server.conversations.ledger import Document, DocumentNotFound
from server.conversations.sqlite_file import SqliteFile


class SqliteDocuments:
    """The documents in `file`. What has expired is not there, whether it was swept yet or not."""

    def __init__(self, file: SqliteFile, clock: Callable[[], float]) -> None:
        self._file = file
        self._clock = clock

    def put(self, document: Document, if_absent: bool) -> bool:
        """See `Ledger.put_document`."""
        with self._file.transaction():
            if if_absent and self.get(document.kind, document.document_id) is not None:
                return False
            self._file.execute(
                "INSERT OR REPLACE INTO documents (kind, document_id, record, created_at, expires_at)"
                " VALUES (?, ?, ?, ?, ?)",
                document.kind,
                document.document_id,
                records.encode_document(document),
                document.created_at,
                self._clock() + document.ttl_seconds,
            )
        return True

    def get(self, kind: str, document_id: str) -> Document | None:
        """See `Ledger.get_document`."""
        row = self._file.row(
            "SELECT record FROM documents WHERE kind = ? AND document_id = ? AND expires_at > ?",
            kind,
            document_id,
            self._clock(),
        )
        return None if row is None else records.decode_document(row[0], kind, document_id)

    def delete(self, kind: str, document_id: str) -> bool:
        """See `Ledger.delete_document`."""
        with self._file.transaction():
            was_there = self._creation(kind, document_id) is not None
            self._file.execute("DELETE FROM documents WHERE kind = ? AND document_id = ?", kind, document_id)
        self._file.erase_log()
        return was_there

    def list(self, kind: str, after: str | None, limit: int, newest_first: bool) -> list[Document]:
        """See `Ledger.documents`."""
        condition = ""
        position: tuple[float | str, ...] = ()
        if after is not None:
            created_at = self._creation(kind, after)
            if created_at is None:
                raise DocumentNotFound(f"there is no {kind} document {after!r}")
            condition = f" AND (created_at, document_id) {'<' if newest_first else '>'} (?, ?)"
            position = (created_at, after)
        direction = "DESC" if newest_first else "ASC"
        rows = self._file.execute(
            f"SELECT document_id, record FROM documents WHERE kind = ? AND expires_at > ?{condition}"
            f" ORDER BY created_at {direction}, document_id {direction} LIMIT ?",
            kind,
            self._clock(),
            *position,
            max(0, limit),
        )
        return [records.decode_document(record, kind, document_id) for document_id, record in rows]

    def sweep(self) -> None:
        """Remove what has expired."""
        self._file.execute("DELETE FROM documents WHERE expires_at <= ?", self._clock())

    def _creation(self, kind: str, document_id: str) -> float | None:
        row = self._file.row(
            "SELECT created_at FROM documents WHERE kind = ? AND document_id = ? AND expires_at > ?",
            kind,
            document_id,
            self._clock(),
        )
        return None if row is None else row[0]

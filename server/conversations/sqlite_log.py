"""The logs in the ledger's SQLite file: one transaction a method. Synchronous, for one thread; knows no event loop.

One process at a time has the file, so leases live in this process's memory: they cost no disk write, and die with the
process that held them.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

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
    Turn,
    VersionConflict,
)
from server.conversations.sqlite_file import SqliteFile


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
    """The logs in `file`, and the leases on them. Every method belongs to one thread."""

    def __init__(self, file: SqliteFile, tombstone_seconds: float, clock: Callable[[], float]) -> None:
        self._file = file
        self._tombstone_seconds = tombstone_seconds
        self._clock = clock
        self._leases: dict[str, HeldLease] = {}
        self._fences: Iterator[int] = itertools.count()

    def open(self) -> None:
        """Begin with the leases of this process; the file is open."""
        self._fences = itertools.count(self._next_epoch() << 32)

    def _next_epoch(self) -> int:
        """Return a number that no earlier process had: fences grow from one process to the next."""
        with self._file.transaction():
            self._file.execute("UPDATE epoch SET number = number + 1")
            return int(self._file.value("SELECT number FROM epoch"))

    # -- conversations ----------------------------------------------------------------------------------------------

    def create(self, conversation: Conversation, turns: Sequence[Turn]) -> None:
        """See `Ledger.create`."""
        conversation_id = conversation.conversation_id
        turn_records = records.encode_first_turns(conversation_id, turns)
        last = turns[-1] if turns else None
        with self._file.transaction():
            self._refuse_taken(conversation_id)
            self._file.execute(
                "INSERT INTO conversations (conversation_id, head, version, chain, num_tokens, request_id, ttl_seconds,"
                " expires_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                conversation_id,
                records.encode_head(conversation),
                len(turns),
                (last or conversation).chain,
                (last or conversation).num_tokens,
                None if last is None else last.request_id,
                conversation.ttl_seconds,
                self._clock() + conversation.ttl_seconds,
            )
            for turn, record in zip(turns, turn_records, strict=True):
                self._insert(conversation_id, turn, record)

    def get(self, conversation_id: str) -> Conversation:
        """See `Ledger.get`."""
        row = self._file.row(
            "SELECT head, version, chain, num_tokens, ttl_seconds, metadata, expires_at"
            " FROM conversations WHERE conversation_id = ?",
            conversation_id,
        )
        if row is None:
            if self._file.row("SELECT 1 FROM tombstones WHERE conversation_id = ?", conversation_id):
                raise ConversationExpired(f"conversation {conversation_id!r} is gone")
            raise ConversationNotFound(f"there is no conversation {conversation_id!r}")
        head, version, chain, num_tokens, ttl_seconds, metadata, expires_at = row
        if expires_at <= self._clock() and not self._is_leased(conversation_id):
            raise ConversationExpired(f"conversation {conversation_id!r} has expired")
        return records.decode_head(
            head,
            conversation_id,
            version=version,
            chain=chain,
            num_tokens=num_tokens,
            ttl_seconds=ttl_seconds,
            metadata=metadata,
            checkpoints=self._checkpoints(conversation_id),
        )

    def update(self, conversation_id: str, metadata: dict[str, str] | None, ttl_seconds: float | None) -> Conversation:
        """See `Ledger.update`."""
        with self._file.transaction():
            self.get(conversation_id)
            if metadata is not None:
                self._file.execute(
                    "UPDATE conversations SET metadata = ? WHERE conversation_id = ?",
                    records.encode_metadata(metadata),
                    conversation_id,
                )
            if ttl_seconds is not None:
                self._file.execute(
                    "UPDATE conversations SET ttl_seconds = ?, expires_at = ? WHERE conversation_id = ?",
                    ttl_seconds,
                    self._clock() + ttl_seconds,
                    conversation_id,
                )
            return self.get(conversation_id)

    def turns(self, conversation_id: str, after_version: int) -> list[Turn]:
        """See `Ledger.turns`."""
        head = self.get(conversation_id)
        rows = self._file.execute(
            "SELECT record FROM turns WHERE conversation_id = ? AND version > ? ORDER BY version",
            conversation_id,
            after_version,
        )
        return records.decode_turns([record for (record,) in rows], head, after_version)

    def find_reply(self, conversation_id: str, reply_id: str) -> Turn | None:
        """See `Ledger.find_reply`."""
        self.get(conversation_id)
        row = self._file.row(
            "SELECT version, record FROM turns WHERE conversation_id = ? AND reply_id = ? ORDER BY version DESC",
            conversation_id,
            reply_id,
        )
        return None if row is None else records.decode_reply(row[1], conversation_id, row[0], reply_id)

    def delete(self, conversation_id: str) -> Conversation:
        """See `Ledger.delete`."""
        with self._file.transaction():
            head = self.get(conversation_id)
            self._bury(conversation_id, self._clock() + self._tombstone_seconds)
        self._leases.pop(conversation_id, None)
        self._file.erase_log()
        return head

    def sweep(self) -> list[CheckpointRef]:
        """See `Ledger.sweep`."""
        now = self._clock()
        unreferenced: set[bytes] = set()
        with self._file.transaction():
            expired = self._file.execute(
                "SELECT conversation_id, expires_at FROM conversations WHERE expires_at <= ?", now
            ).fetchall()
            for conversation_id, expires_at in expired:
                if not self._is_leased(conversation_id):
                    unreferenced.update(self._checkpoints(conversation_id).values())
                    self._bury(conversation_id, expires_at + self._tombstone_seconds)
            self._file.execute("DELETE FROM tombstones WHERE until <= ?", now)
        return [records.decode_checkpoint(record) for record in unreferenced]

    def _refuse_taken(self, conversation_id: str) -> None:
        try:
            self.get(conversation_id)
        except ConversationNotFound:
            return
        raise ConversationExists(f"conversation {conversation_id!r} exists")

    def _bury(self, conversation_id: str, until: float) -> None:
        for table in ("turns", "checkpoints", "conversations"):
            self._file.execute(f"DELETE FROM {table} WHERE conversation_id = ?", conversation_id)
        self._file.execute("INSERT INTO tombstones VALUES (?, ?)", conversation_id, until)

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
        record = records.encode_turn(conversation_id, turn)
        with self._file.transaction():
            if self._is_committed(conversation_id, turn):
                return
            self._require(lease)
            head = self.get(conversation_id)
            if head.version != turn.version - 1:
                raise VersionConflict(conversation_id, turn.version - 1, head.version)
            self._insert(conversation_id, turn, record)
            self._file.execute(
                "UPDATE conversations SET version = ?, chain = ?, num_tokens = ?, request_id = ?,"
                " expires_at = ? + ttl_seconds WHERE conversation_id = ?",
                turn.version,
                turn.chain,
                turn.num_tokens,
                turn.request_id,
                self._clock(),
                conversation_id,
            )
        self.release(lease)

    def _insert(self, conversation_id: str, turn: Turn, record: bytes) -> None:
        self._file.execute(
            "INSERT INTO turns (conversation_id, version, record, reply_id) VALUES (?, ?, ?, ?)",
            conversation_id,
            turn.version,
            record,
            turn.reply_id or None,
        )

    def _is_committed(self, conversation_id: str, turn: Turn) -> bool:
        """Say whether `turn` is the head: the reply to its commit was lost, and it is committed again."""
        row = self._file.row(
            "SELECT 1 FROM conversations WHERE conversation_id = ? AND version = ? AND chain = ? AND request_id = ?",
            conversation_id,
            turn.version,
            turn.chain,
            turn.request_id,
        )
        return row is not None

    # -- checkpoints ------------------------------------------------------------------------------------------------

    def point(
        self, conversation_id: str, version: int, checkpoint: CheckpointRef, drop: Collection[int]
    ) -> list[CheckpointRef]:
        """See `Ledger.point`."""
        record = records.encode_checkpoint(checkpoint)
        with self._file.transaction():
            before = self._checkpoints(conversation_id)
            removed = {record}
            if self._is_history(conversation_id, version, checkpoint.chain):
                removed = {before[after] for after in (version, *drop) if after in before}
                for after in drop:
                    self._file.execute(
                        "DELETE FROM checkpoints WHERE conversation_id = ? AND version = ?", conversation_id, after
                    )
                self._file.execute(
                    "INSERT OR REPLACE INTO checkpoints VALUES (?, ?, ?)", conversation_id, version, record
                )
            removed -= set(self._checkpoints(conversation_id).values())
        return [records.decode_checkpoint(record) for record in removed]

    def _checkpoints(self, conversation_id: str) -> dict[int, bytes]:
        rows = self._file.execute("SELECT version, record FROM checkpoints WHERE conversation_id = ?", conversation_id)
        return dict(rows.fetchall())

    def _is_history(self, conversation_id: str, version: int, chain: bytes) -> bool:
        """Say whether `chain` is that of entry `version`: a state of another history must never become this one's."""
        try:
            self.get(conversation_id)
        except (ConversationNotFound, ConversationExpired):
            return False
        row = self._file.row(
            "SELECT 1 FROM turns WHERE conversation_id = ? AND version = ? AND substr(record, 1, 16) = ?",
            conversation_id,
            version,
            chain,
        )
        return row is not None

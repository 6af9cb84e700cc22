"""The ledger in Redis: for several servers, and conversations that move between them.

Each operation that writes is one Lua script beside this file, decided inside Redis by its own clock. Keys of one
conversation share a hash tag. What the server must be set to is in docs/ledger.md.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import quote, unquote

from engine.messages import CheckpointRef
from server.conversations import records
from server.conversations.ledger import (
    Conversation,
    ConversationBusy,
    ConversationExists,
    ConversationExpired,
    ConversationNotFound,
    Document,
    Durability,
    Lease,
    LeaseLost,
    LedgerCorrupt,
    Turn,
    VersionConflict,
)
from server.conversations.redis_documents import DOCUMENT_SCRIPTS, RedisDocuments
from server.conversations.redis_scripts import RedisScripts, milliseconds, new_call_id

TOMBSTONE_SECONDS = 7 * 86_400.0  # promise P14
TIMEOUT_SECONDS = 2.0  # promise P11: an answer or an error, whatever became of Redis
SWEEP_PAGE = 500

SCRIPTS = (
    "create",
    "read",
    "update",
    "find_reply",
    "acquire",
    "renew",
    "release",
    "commit",
    "point",
    "delete",
    "expire",
    *DOCUMENT_SCRIPTS,
)

# Fields of the head with the checkpoints: one for each, with its version; of format 1 one, with the version beside it.
CHECKPOINT_PREFIX = b"checkpoint:"
ONLY_CHECKPOINT, ONLY_CHECKPOINT_VERSION = b"checkpoint", b"checkpoint_version"


class RedisLedger:
    """A ledger in the Redis at `url`. Servers that share it share their conversations."""

    is_shared = True

    def __init__(
        self, url: str, *, tombstone_seconds: float = TOMBSTONE_SECONDS, timeout_seconds: float = TIMEOUT_SECONDS
    ) -> None:
        self.durability = Durability.ACKED  # until `open` knows better
        self._redis = RedisScripts(url, SCRIPTS, timeout_seconds)
        self._documents = RedisDocuments(self._redis)
        self._tombstone_ms = milliseconds(tombstone_seconds)

    def __repr__(self) -> str:
        return f"RedisLedger({self._redis.address!r})"

    async def open(self) -> None:
        """See `Ledger.open`. Warns when the server is set so that it cannot keep what a ledger promises."""
        self.durability = await self._redis.open()

    async def close(self) -> None:
        """See `Ledger.close`."""
        await self._redis.close()

    # -- conversations ----------------------------------------------------------------------------------------------

    async def create(self, conversation: Conversation, turns: Sequence[Turn] = ()) -> None:
        """See `Ledger.create`."""
        conversation_id = conversation.conversation_id
        turn_records = records.encode_first_turns(conversation_id, turns)
        last = turns[-1] if turns else None
        entries = [part for turn, record in zip(turns, turn_records, strict=True) for part in (record, turn.reply_id)]
        status, *_ = await self._run(
            "create",
            conversation_id,
            new_call_id(),
            records.encode_head(conversation),
            (last or conversation).chain,
            (last or conversation).num_tokens,
            "" if last is None else last.request_id,
            milliseconds(conversation.ttl_seconds),
            self._tombstone_ms,
            *entries,
        )
        if status == b"alive":
            raise ConversationExists(f"conversation {conversation_id!r} exists")
        _check(status, conversation_id)

    async def get(self, conversation_id: str) -> Conversation:
        """See `Ledger.get`."""
        status, *reply = await self._run("read", conversation_id)
        _check(status, conversation_id)
        return _decode_head(reply[0], conversation_id)

    async def update(
        self, conversation_id: str, *, metadata: dict[str, str] | None = None, ttl_seconds: float | None = None
    ) -> Conversation:
        """See `Ledger.update`."""
        status, *reply = await self._run(
            "update",
            conversation_id,
            b"" if metadata is None else records.encode_metadata(metadata),
            "" if ttl_seconds is None else milliseconds(ttl_seconds),
            self._tombstone_ms,
        )
        _check(status, conversation_id)
        return _decode_head(reply[0], conversation_id)

    async def turns(self, conversation_id: str, after_version: int = 0) -> list[Turn]:
        """See `Ledger.turns`."""
        head = await self.get(conversation_id)
        if after_version >= head.version:
            return []
        # What is in the log up to the head never changes, so it may be read later, and outside of Lua.
        log: list[bytes] = await self._redis.command(
            "LRANGE", _turns_key(conversation_id), after_version, head.version - 1
        )
        try:
            return records.decode_turns(log, head, after_version)
        except LedgerCorrupt:
            await self.get(conversation_id)  # if it has gone since, then that is the answer
            raise

    async def find_reply(self, conversation_id: str, reply_id: str) -> Turn | None:
        """See `Ledger.find_reply`."""
        status, *reply = await self._run("find_reply", conversation_id, reply_id)
        _check(status, conversation_id)
        if not reply:
            return None
        version, record = reply
        return records.decode_reply(record, conversation_id, version, reply_id)

    async def delete(self, conversation_id: str) -> Conversation:
        """See `Ledger.delete`."""
        status, *reply = await self._run("delete", conversation_id, self._tombstone_ms)
        _check(status, conversation_id)
        return _decode_head(reply[0], conversation_id)

    async def sweep(self) -> list[CheckpointRef]:
        """See `Ledger.sweep`. Redis forgets old tombstones and documents by itself."""
        unreferenced: list[CheckpointRef] = []
        cursor: int | None = None
        while cursor != 0:
            cursor, expired_ids = await self._scan_expired(cursor or 0)
            for conversation_id in expired_ids:
                _, *reply = await self._run("expire", conversation_id, self._tombstone_ms)
                unreferenced += map(records.decode_checkpoint, reply)
        return unreferenced

    async def _scan_expired(self, cursor: int) -> tuple[int, list[str]]:
        """Return where to go on, and which conversations of one page of the keys are past their time to live."""
        cursor, keys = await self._redis.scan(cursor, "rk:{*}:m", SWEEP_PAGE)
        now_ms, expiries = await self._redis.read_field(keys, "expires_at")
        expired_ids = [
            _conversation_id(key)
            for key, expiry in zip(keys, expiries, strict=True)
            # What is no time is damaged, and whoever asks for that conversation is told so.
            if isinstance(expiry, bytes) and expiry.isdigit() and 0 < int(expiry) <= now_ms
        ]
        return cursor, expired_ids

    # -- leases -----------------------------------------------------------------------------------------------------

    async def acquire(self, conversation_id: str, owner: str, ttl_seconds: float) -> tuple[Lease, Conversation]:
        """See `Ledger.acquire`. A lease that arrives after its caller was cancelled is given back."""
        return await self._redis.calls.run(
            self._acquire(conversation_id, owner, ttl_seconds), undo=lambda acquired: self.release(acquired[0])
        )

    async def renew(self, lease: Lease) -> None:
        """See `Ledger.renew`."""
        status, *_ = await self._run("renew", lease.conversation_id, lease.fence, milliseconds(lease.ttl_seconds))
        _check(status, lease.conversation_id)

    async def release(self, lease: Lease) -> None:
        """See `Ledger.release`."""
        await self._run("release", lease.conversation_id, lease.fence)

    async def _acquire(self, conversation_id: str, owner: str, ttl_seconds: float) -> tuple[Lease, Conversation]:
        call_id = new_call_id()
        status, *reply = await self._run("acquire", conversation_id, call_id, owner, milliseconds(ttl_seconds))
        if status == b"busy":
            raise ConversationBusy(conversation_id, reply[0] / 1000)
        _check(status, conversation_id)
        fence, fields = reply
        lease = Lease(conversation_id=conversation_id, owner=owner, fence=fence, ttl_seconds=ttl_seconds)
        return lease, _decode_head(fields, conversation_id)

    # -- turns ------------------------------------------------------------------------------------------------------

    async def commit(self, lease: Lease, turn: Turn) -> None:
        """See `Ledger.commit`. A turn that is the head already counts as committed.

        After `LedgerUnavailable` the outcome is unknown: ask again with the same turn. It cannot change any more once
        the lease has ended.
        """
        conversation_id = lease.conversation_id
        status, *reply = await self._run(
            "commit",
            conversation_id,
            lease.fence,
            turn.version,
            turn.chain,
            turn.num_tokens,
            turn.request_id,
            records.encode_turn(conversation_id, turn),
            turn.reply_id,
            self._tombstone_ms,
        )
        if status == b"conflict":
            raise VersionConflict(conversation_id, turn.version - 1, reply[0])
        _check(status, conversation_id)

    async def point(
        self, conversation_id: str, version: int, checkpoint: CheckpointRef, drop: Collection[int] = ()
    ) -> list[CheckpointRef]:
        """See `Ledger.point`."""
        record = records.encode_checkpoint(checkpoint)
        _, *reply = await self._run("point", conversation_id, version, checkpoint.chain, record, *drop)
        return [records.decode_checkpoint(unreferenced) for unreferenced in reply]

    # -- documents --------------------------------------------------------------------------------------------------

    async def put_document(self, document: Document, *, if_absent: bool = False) -> bool:
        """See `Ledger.put_document`."""
        return await self._documents.put(document, if_absent)

    async def get_document(self, kind: str, document_id: str) -> Document | None:
        """See `Ledger.get_document`."""
        return await self._documents.get(kind, document_id)

    async def delete_document(self, kind: str, document_id: str) -> bool:
        """See `Ledger.delete_document`."""
        return await self._documents.delete(kind, document_id)

    async def documents(
        self, kind: str, *, after: str | None = None, limit: int = 100, newest_first: bool = False
    ) -> list[Document]:
        """See `Ledger.documents`."""
        return await self._documents.list(kind, after, limit, newest_first)

    async def _run(self, script: str, conversation_id: str, *arguments: str | bytes | float) -> list[Any]:
        """Run one script on one conversation; return its status and what follows."""
        head_key = _head_key(conversation_id)
        keys = [head_key, _turns_key(conversation_id), f"{head_key[:-1]}r"]
        return await self._redis.run(script, keys, *arguments)


def _check(status: bytes, conversation_id: str) -> None:
    """Raise what a script's status means, unless it is ok."""
    match status:
        case b"ok":
            return
        case b"missing":
            raise ConversationNotFound(f"there is no conversation {conversation_id!r}")
        case b"expired":
            raise ConversationExpired(f"conversation {conversation_id!r} is gone")
        case b"lost":
            raise LeaseLost(f"the lease on conversation {conversation_id!r} has ended")
        case _:
            raise LedgerCorrupt(f"conversation {conversation_id!r} has lost turns: its log does not reach its version")


def _decode_head(flat: Sequence[bytes], conversation_id: str) -> Conversation:
    """Return the head in a hash as Lua returns it: names and values by turns."""
    fields = dict(zip(flat[::2], flat[1::2], strict=True))
    try:
        return records.decode_head(
            fields[b"head"],
            conversation_id,
            version=int(fields[b"version"]),
            chain=fields[b"chain"],
            num_tokens=int(fields[b"num_tokens"]),
            ttl_seconds=int(fields[b"ttl_ms"]) / 1000,
            metadata=fields.get(b"metadata"),
            checkpoints=dict(_checkpoints(fields)),
        )
    except (KeyError, ValueError) as error:
        raise LedgerCorrupt(f"the head of conversation {conversation_id!r} is damaged: {error!r}") from error


def _checkpoints(fields: Mapping[bytes, bytes]) -> Iterable[tuple[int, bytes]]:
    """Yield the version and the record of each checkpoint."""
    if ONLY_CHECKPOINT in fields:
        yield int(fields[ONLY_CHECKPOINT_VERSION]), fields[ONLY_CHECKPOINT]
    for name, record in fields.items():
        if name.startswith(CHECKPOINT_PREFIX):
            yield int(name.removeprefix(CHECKPOINT_PREFIX)), record


def _head_key(conversation_id: str) -> str:
    # Quoted, so that no id can break the hash tag that keeps a conversation's keys on one node of a cluster.
    return f"rk:{{{quote(conversation_id, safe=':')}}}:m"


def _turns_key(conversation_id: str) -> str:
    return f"{_head_key(conversation_id)[:-1]}t"


def _conversation_id(head_key: bytes) -> str:
    return unquote(head_key.removeprefix(b"rk:{").removesuffix(b"}:m").decode())

"""The ledger in Redis: for several servers, and conversations that move between them.

Each operation that writes is one Lua script beside this file, decided inside Redis by its own clock. Keys of one
conversation share a hash tag. What the server must be set to is in docs/ledger.md.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, unquote, urlsplit

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError, RedisError, ResponseError

from engine.messages import CheckpointRef
from server.conversations import records
from server.conversations.ledger import (
    Conversation,
    ConversationBusy,
    ConversationExists,
    ConversationExpired,
    ConversationNotFound,
    Durability,
    Lease,
    LeaseLost,
    LedgerCorrupt,
    LedgerUnavailable,
    Turn,
    VersionConflict,
)
from server.conversations.uninterrupted import UninterruptedCalls

TOMBSTONE_SECONDS = 7 * 86_400.0  # promise P14
TIMEOUT_SECONDS = 2.0  # promise P11: an answer or an error, whatever became of Redis
MAX_CONNECTIONS = 32
SWEEP_PAGE = 500

SCRIPTS = ("create", "read", "acquire", "renew", "release", "commit", "point", "delete", "expire")

Result = TypeVar("Result")

logger = logging.getLogger(__name__)


class RedisLedger:
    """A ledger in the Redis at `url`. Servers that share it share their conversations."""

    def __init__(
        self, url: str, *, tombstone_seconds: float = TOMBSTONE_SECONDS, timeout_seconds: float = TIMEOUT_SECONDS
    ) -> None:
        self.durability = Durability.ACKED  # until `open` knows better
        self._address = _without_credentials(url)
        self._tombstone_ms = _milliseconds(tombstone_seconds)
        self._timeout_seconds = timeout_seconds
        self._calls = UninterruptedCalls()
        pool = BlockingConnectionPool.from_url(
            url,
            max_connections=MAX_CONNECTIONS,
            timeout=timeout_seconds,
            socket_timeout=timeout_seconds,
            socket_connect_timeout=timeout_seconds,
            retry=Retry(NoBackoff(), 0),  # whether an operation can be repeated is decided here
            decode_responses=False,
        )
        self._redis = Redis.from_pool(pool)
        prelude = _script("prelude")
        self._scripts = {name: self._redis.register_script(prelude + _script(name)) for name in SCRIPTS}

    def __repr__(self) -> str:
        return f"RedisLedger({self._address!r})"

    async def open(self) -> None:
        """See `Ledger.open`. Warns when the server is set so that it cannot keep what a ledger promises."""
        try:
            await self._call(self._redis.ping)
            self.durability = await self._call(self._read_durability)
            await self._call(self._warn_if_evicting)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """See `Ledger.close`."""
        await self._calls.wait()
        await self._redis.aclose()

    # -- conversations ----------------------------------------------------------------------------------------------

    async def create(self, conversation: Conversation) -> None:
        """See `Ledger.create`."""
        conversation_id = conversation.conversation_id
        status, *_ = await self._run(
            "create",
            conversation_id,
            secrets.token_hex(16),
            records.encode_head(conversation),
            conversation.chain,
            conversation.num_tokens,
            _milliseconds(conversation.ttl_seconds),
            self._tombstone_ms,
        )
        if status == b"alive":
            raise ConversationExists(f"conversation {conversation_id!r} exists")
        _check(status, conversation_id)

    async def get(self, conversation_id: str) -> Conversation:
        """See `Ledger.get`."""
        status, *reply = await self._run("read", conversation_id)
        _check(status, conversation_id)
        return _decode_head(reply[0], conversation_id)

    async def turns(self, conversation_id: str, after_version: int = 0) -> list[Turn]:
        """See `Ledger.turns`."""
        head = await self.get(conversation_id)
        if after_version >= head.version:
            return []
        # What is in the log up to the head never changes, so it may be read later, and outside of Lua.
        log: list[bytes] = await self._call(
            self._redis.execute_command, "LRANGE", _turns_key(conversation_id), after_version, head.version - 1
        )
        try:
            return records.decode_turns(log, head, after_version)
        except LedgerCorrupt:
            await self.get(conversation_id)  # if it has gone since, then that is the answer
            raise

    async def delete(self, conversation_id: str) -> Conversation:
        """See `Ledger.delete`."""
        status, *reply = await self._run("delete", conversation_id, self._tombstone_ms)
        _check(status, conversation_id)
        return _decode_head(reply[0], conversation_id)

    async def sweep(self) -> list[CheckpointRef]:
        """See `Ledger.sweep`. Redis forgets old tombstones by itself."""
        unreferenced: list[CheckpointRef] = []
        cursor: int | None = None
        while cursor != 0:
            cursor, expired_ids = await self._call(self._scan_expired, cursor or 0)
            for conversation_id in expired_ids:
                _, *reply = await self._run("expire", conversation_id, self._tombstone_ms)
                unreferenced += map(records.decode_checkpoint, reply)
        return unreferenced

    async def _scan_expired(self, cursor: int) -> tuple[int, list[str]]:
        """Return where to go on, and which conversations of one page of the keys are past their time to live."""
        page: Any = await self._redis.scan(cursor, match="rk:{*}:m", count=SWEEP_PAGE)
        cursor, keys = page
        async with self._redis.pipeline(transaction=False) as pipeline:
            pipeline.time()
            for key in keys:
                pipeline.hget(key, "expires_at")
            time, *expiries = await pipeline.execute(raise_on_error=False)
        expired_ids = [
            _conversation_id(key)
            for key, expiry in zip(keys, expiries, strict=True)
            # What is no time is damaged, and whoever asks for that conversation is told so.
            if isinstance(expiry, bytes) and expiry.isdigit() and 0 < int(expiry) <= _now_ms(time)
        ]
        return cursor, expired_ids

    # -- leases -----------------------------------------------------------------------------------------------------

    async def acquire(self, conversation_id: str, owner: str, ttl_seconds: float) -> tuple[Lease, Conversation]:
        """See `Ledger.acquire`. A lease that arrives after its caller was cancelled is given back."""
        return await self._calls.run(
            self._acquire(conversation_id, owner, ttl_seconds), undo=lambda acquired: self.release(acquired[0])
        )

    async def renew(self, lease: Lease) -> None:
        """See `Ledger.renew`."""
        status, *_ = await self._run("renew", lease.conversation_id, lease.fence, _milliseconds(lease.ttl_seconds))
        _check(status, lease.conversation_id)

    async def release(self, lease: Lease) -> None:
        """See `Ledger.release`."""
        await self._run("release", lease.conversation_id, lease.fence)

    async def _acquire(self, conversation_id: str, owner: str, ttl_seconds: float) -> tuple[Lease, Conversation]:
        call_id = secrets.token_hex(16)
        status, *reply = await self._run("acquire", conversation_id, call_id, owner, _milliseconds(ttl_seconds))
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
            self._tombstone_ms,
        )
        if status == b"conflict":
            raise VersionConflict(conversation_id, turn.version - 1, reply[0])
        _check(status, conversation_id)

    async def point(self, conversation_id: str, version: int, checkpoint: CheckpointRef) -> CheckpointRef | None:
        """See `Ledger.point`."""
        record = records.encode_checkpoint(checkpoint)
        _, *reply = await self._run("point", conversation_id, version, checkpoint.chain, record)
        return records.decode_checkpoint(reply[0]) if reply else None

    # -- the server -------------------------------------------------------------------------------------------------

    async def _read_durability(self) -> Durability:
        """Return what a commit survives, as far as the server tells: many hosts hide their configuration."""
        try:
            settings = await self._redis.config_get("append*")
        except ResponseError:
            return Durability.ACKED
        if settings["appendonly"] != "yes":
            logger.warning("%s keeps no append-only file: turns are lost when it ends", self._address)
            return Durability.MEMORY
        return Durability.FSYNCED if settings["appendfsync"] == "always" else Durability.ACKED

    async def _warn_if_evicting(self) -> None:
        try:
            settings = await self._redis.config_get("maxmemory-policy")
        except ResponseError:
            return
        if settings["maxmemory-policy"] != "noeviction":
            logger.warning(
                "%s evicts keys when its memory is full (maxmemory-policy %s): conversations would vanish; "
                "set it to noeviction",
                self._address,
                settings["maxmemory-policy"],
            )

    async def _run(self, script: str, conversation_id: str, *arguments: str | bytes | int) -> list[Any]:
        """Run one script on one conversation; return its status and what follows."""
        keys = [_head_key(conversation_id), _turns_key(conversation_id)]
        reply: list[Any] = await self._call(self._scripts[script], keys, arguments)
        return reply

    async def _call(self, operation: Callable[..., Awaitable[Result]], *arguments: Any) -> Result:
        return await self._calls.run(self._with_deadline(operation, *arguments))

    async def _with_deadline(self, operation: Callable[..., Awaitable[Result]], *arguments: Any) -> Result:
        """Run `operation` within the deadline, a second time if the connection broke: a restart of Redis is no error.

        All operations can be repeated without harm but `delete`, which may then find its own tombstone.
        """
        try:
            async with asyncio.timeout(self._timeout_seconds):
                try:
                    return await operation(*arguments)
                except ConnectionError:
                    return await operation(*arguments)
        except (RedisError, OSError) as error:
            raise _translate(error) from error


def _translate(error: Exception) -> LedgerUnavailable | LedgerCorrupt:
    # A script of ours stumbles only over a record that is not what a script of ours has written.
    is_stumble = getattr(error, "status_code", None) == "ERR" and "user_script" in str(error)
    if isinstance(error, ResponseError) and (is_stumble or "WRONGTYPE" in str(error)):
        return LedgerCorrupt(f"a key of the ledger does not hold what it should: {error}")
    return LedgerUnavailable(f"the ledger's Redis did not do as asked: {error or type(error).__name__}")


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
            checkpoint=fields.get(b"checkpoint"),
            checkpoint_version=int(fields[b"checkpoint_version"]),
        )
    except (KeyError, ValueError) as error:
        raise LedgerCorrupt(f"the head of conversation {conversation_id!r} is damaged: {error!r}") from error


def _head_key(conversation_id: str) -> str:
    # Quoted, so that no id can break the hash tag that keeps a conversation's keys on one node of a cluster.
    return f"rk:{{{quote(conversation_id, safe=':')}}}:m"


def _turns_key(conversation_id: str) -> str:
    return f"{_head_key(conversation_id)[:-1]}t"


def _conversation_id(head_key: bytes) -> str:
    return unquote(head_key.removeprefix(b"rk:{").removesuffix(b"}:m").decode())


def _now_ms(time: tuple[int, int]) -> int:
    seconds, microseconds = time
    return seconds * 1000 + microseconds // 1000


def _milliseconds(seconds: float) -> int:
    return max(1, round(seconds * 1000))


def _script(name: str) -> str:
    return Path(__file__).with_name(f"{name}.lua").read_text()


def _without_credentials(url: str) -> str:
    """Return the part of `url` that may be shown."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"

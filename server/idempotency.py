"""Requests that are carried out once, however often they are sent (promise P15).

A client names a request by its `Idempotency-Key`. A record of that name is written before anything runs: who carries
the request out, and where its reply will be. The reply to a turn is part of the turn, and so committed with it; a
request without a conversation leaves its reply in the record. Whoever finds a record looks for the reply there; without
one the record's owner is still at work, or has died or failed, and then the key is free.

A reply has one id through all attempts at it. So whoever takes over from a server that is only thought dead sees, when
it holds the log, whether that server has come first; afterwards the log's fence keeps it out.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import time
import uuid
from dataclasses import dataclass
from types import TracebackType

import msgspec
import orjson
from starlette.requests import Request

from server.conversations.history import scoped
from server.conversations.ledger import ConversationExpired, ConversationNotFound, Document, Ledger, LedgerError
from server.errors import BadRequest, IdempotencyInProgress, IdempotencyKeyReused, ReplyNotKept
from server.presence import Presence
from server.tenants import tenant_of

logger = logging.getLogger(__name__)

HEADER = "Idempotency-Key"
REPLAYED = {"idempotent-replayed": "true"}
KIND = "idempotency"
MAX_KEY_CHARS = 255
MAX_REPLY_BYTES = 1 << 20
KEEP_SECONDS = 86_400.0  # from the commit on
RUN_SECONDS = 86_400.0  # and before it: longer than anything runs
TAKE_OVER_SECONDS = 60.0  # of these somebody may need a moment between taking an attempt over and saying so


@dataclass(frozen=True, slots=True)
class Key:
    """What a client calls its request, and what it asks for by that name."""

    document_id: str
    digest: bytes  # of the body
    log_id: str  # of the conversation that it is a turn of, if it is one


async def key_of(request: Request, log_id: str = "") -> Key | None:
    """Return the request's key, which counts for its tenant, route and conversation; raises `BadRequest`."""
    given = request.headers.getlist(HEADER)
    if not given:
        return None
    if len(given) > 1 or not 1 <= len(given[0]) <= MAX_KEY_CHARS:
        raise BadRequest(f"{HEADER}: must be one of 1 to {MAX_KEY_CHARS} characters.", HEADER)
    name = hashlib.sha256(msgspec.json.encode([request.url.path, log_id, given[0]])).hexdigest()
    body = orjson.dumps(orjson.loads(await request.body()), option=orjson.OPT_SORT_KEYS)
    return Key(scoped(tenant_of(request), name), hashlib.sha256(body).digest(), log_id)


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a key. Says nothing of what a conversation says: that would outlive it."""

    digest: bytes
    reply_id: str
    log_id: str  # where the reply will be; empty: here, or not known yet
    attempt: str
    owner: str  # the server that is at work on it; empty: none is
    reply: bytes | None = None  # JSON, if it is not part of a turn; empty: too large


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Record)


@dataclass(frozen=True, slots=True)
class Kept:
    """The request was carried out before; `reply` is what was answered, as JSON."""

    reply: bytes


class Attempt:
    """A request that is carried out: here one without a key, of which nothing is remembered.

    Entered when the work begins, left when it ends.
    """

    has_key = False  # so the reply of a turn need not be part of it

    def __init__(self, reply_id: str) -> None:
        self.reply_id = reply_id

    async def enter(self, log_id: str) -> None:
        """Say that the reply will be part of the next turn of the log, whose lease is held."""

    async def keep(self, reply: bytes) -> None:
        """Keep a reply that is not part of a turn, before its end is told."""

    async def release(self) -> None:
        """Free the key: there will be no reply."""

    async def __aenter__(self) -> Attempt:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.release()


class Claim(Attempt):
    """One that has a key, and for now alone."""

    has_key = True

    def __init__(self, claims: Claims, key: Key, record: Record, *, is_first: bool) -> None:
        super().__init__(record.reply_id)
        self._claims = claims
        self._key = key
        self._record = record
        self._is_first = is_first
        self.presence = contextlib.AsyncExitStack()  # lets others see that this server lives; closed with the attempt

    async def enter(self, log_id: str) -> None:
        """As `Attempt.enter`; raises `IdempotencyInProgress` if another attempt has committed the turn after all."""
        if not self._is_first and await self._claims.find(log_id, self.reply_id) is not None:
            raise IdempotencyInProgress(self.reply_id)
        if self._record.log_id != log_id:
            self._record = msgspec.structs.replace(self._record, log_id=log_id)
            await self._claims.write(self._key, self._record)

    async def keep(self, reply: bytes) -> None:
        """As `Attempt.keep`; raises `LedgerUnavailable`."""
        self._record = msgspec.structs.replace(self._record, owner="", reply=bounded(reply))
        await self._claims.write(self._key, self._record)

    async def release(self) -> None:
        """End the attempt. Whether it has left a reply, whoever asks next will see: the outcome may not be known."""
        await asyncio.shield(self._release())

    async def _release(self) -> None:
        try:
            if self._record.owner:
                await self._claims.write(self._key, msgspec.structs.replace(self._record, owner=""))
        except LedgerError:  # other servers will take it for running as long as this one says that it lives
            logger.warning("an Idempotency-Key was not released: the ledger does not answer")
        finally:
            self._claims.ended(self._record)
            await self.presence.aclose()


def bounded(reply: bytes) -> bytes:
    """Return the reply, or nothing in place of one that is too large to be kept."""
    return reply if len(reply) <= MAX_REPLY_BYTES else b""


class Claims:
    """The keys of all tenants. Belongs to the event loop of one server."""

    def __init__(self, ledger: Ledger, presence: Presence) -> None:
        self._ledger = ledger
        self._presence = presence
        self._running: set[str] = set()  # this server's attempts

    async def attempt(self, key: Key | None, reply_id: str) -> Attempt | Kept:
        """Begin to carry a request out, whose reply will be called `reply_id`, or as earlier attempts called it.

        Returns the reply if it was carried out before. Raises `IdempotencyInProgress`, `IdempotencyKeyReused`,
        `ReplyNotKept`, `LedgerUnavailable`.
        """
        if key is None:
            return Attempt(reply_id)
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(self._presence.shown())  # before anybody can read who is at work
            found = await self._claim(key, reply_id)
            if isinstance(found, Claim):
                found.presence = stack.pop_all()
            return found

    async def _claim(self, key: Key, reply_id: str) -> Claim | Kept:
        record = Record(
            digest=key.digest,
            reply_id=reply_id,
            log_id=key.log_id,
            attempt=uuid.uuid4().hex,
            owner=self._presence.owner,
        )
        self._running.add(record.attempt)  # known before it is seen
        try:
            while not await self.write(key, record, if_absent=True):
                document = await self._ledger.get_document(KIND, key.document_id)
                if document is not None:
                    return await self._found(key, record, _decoder.decode(document.body))
            return Claim(self, key, record, is_first=True)
        except BaseException:
            self.ended(record)
            raise

    async def _found(self, key: Key, record: Record, known: Record) -> Claim | Kept:
        """Say what a record that is there means for a request with its key; `record` is the request's own."""
        reply = known.reply if known.reply is not None else await self.find(known.log_id, known.reply_id)
        is_same = known.digest == key.digest
        if reply is None and not await self._is_running(known) and await self._take_over(key, known):
            reply_id = known.reply_id if is_same else record.reply_id
            record = msgspec.structs.replace(record, reply_id=reply_id)
            await self.write(key, record)
            return Claim(self, key, record, is_first=False)
        self.ended(record)
        if not is_same:
            raise IdempotencyKeyReused
        if reply is None:
            raise IdempotencyInProgress(known.reply_id)
        if not reply:
            raise ReplyNotKept
        return Kept(reply)

    async def _is_running(self, record: Record) -> bool:
        if record.owner in ("", self._presence.owner):
            return record.attempt in self._running and bool(record.owner)
        return await self._presence.lives(record.owner)

    async def _take_over(self, key: Key, record: Record) -> bool:
        """Say whether this server, of all that may have found the attempt ended, is the one to make the next."""
        document = Document(
            kind=KIND,
            document_id=f"{key.document_id}:{record.attempt}",
            body=b"",
            created_at=time.time(),
            ttl_seconds=TAKE_OVER_SECONDS,
        )
        return await self._ledger.put_document(document, if_absent=True)

    # -- for claims ---------------------------------------------------------------------------------------------------

    async def find(self, log_id: str, reply_id: str) -> bytes | None:
        """Return the reply that is part of a turn of the log, if there is such a turn."""
        if not log_id:
            return None
        try:
            turn = await self._ledger.find_reply(log_id, reply_id)
        except (ConversationNotFound, ConversationExpired):
            return None
        return None if turn is None else turn.reply

    async def write(self, key: Key, record: Record, *, if_absent: bool = False) -> bool:
        """Write what is known; says whether it was."""
        document = Document(
            kind=KIND,
            document_id=key.document_id,
            body=_encoder.encode(record),
            created_at=time.time(),
            ttl_seconds=KEEP_SECONDS + (RUN_SECONDS if record.owner else 0.0),
        )
        return await self._ledger.put_document(document, if_absent=if_absent)

    def ended(self, record: Record) -> None:
        """Forget an attempt of this server."""
        self._running.discard(record.attempt)

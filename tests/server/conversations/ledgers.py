"""Ledgers for tests: real stores, with time that a test moves by hand."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

import msgspec
from redis.asyncio import Redis

from engine.messages import CheckpointRef
from engine.token_chain import extend_digest, root_digest
from server.conversations.ledger import Answer, Conversation, Document, Item, Ledger, Turn
from server.conversations.redis_ledger import RedisLedger
from server.conversations.sqlite_ledger import SqliteLedger
from tests.redis_server import RedisServer

DAY = 86_400.0
CONVERSATION_TTL = 30 * DAY
TOMBSTONE = 7 * DAY
LEASE_TTL = 15.0

# Shifts every time a ledger keeps in Redis into the past: what its scripts see afterwards is the future.
TRAVEL = """
for _, key in ipairs(redis.call('KEYS', 'rk:*')) do
  for _, field in ipairs({'lease_until', 'expires_at'}) do
    local time = redis.call('TYPE', key).ok == 'hash' and tonumber(redis.call('HGET', key, field))
    if time and time > 0 then redis.call('HSET', key, field, time - ARGV[1]) end
  end
  if string.sub(key, 1, 6) == 'rk:de:' then
    for _, id in ipairs(redis.call('ZRANGE', key, 0, -1)) do redis.call('ZINCRBY', key, -ARGV[1], id) end
  end
  redis.call('PEXPIRE', key, redis.call('PTTL', key) - ARGV[1])
end
"""


class LedgerUnderTest(ABC):
    """A store, a ledger on it, and the means to let its time pass."""

    ledger: Ledger

    @abstractmethod
    async def another(self) -> Ledger:
        """Return the ledger that another server would use: another client of the store, if it takes several."""

    @abstractmethod
    async def travel(self, seconds: float) -> None:
        """Let time pass on the store's clock."""

    async def close(self) -> None:
        """Release everything."""
        await self.ledger.close()


class SqliteUnderTest(LedgerUnderTest):
    """SQLite in a file or in memory, on a clock that stands still."""

    def __init__(self, path: Path | None) -> None:
        self.time = 1_000_000.0
        self.ledger = SqliteLedger(path, clock=lambda: self.time)

    async def another(self) -> Ledger:
        """There is but one process."""
        return self.ledger

    async def travel(self, seconds: float) -> None:
        """Set the clock forward."""
        self.time += seconds


class RedisUnderTest(LedgerUnderTest):
    """A running Redis, whose stored times can be shifted."""

    def __init__(self, server: RedisServer) -> None:
        self.url = server.url
        self.ledger = RedisLedger(server.url)
        self.raw = Redis.from_url(server.url)
        self._others: list[Ledger] = []

    async def another(self) -> Ledger:
        """Another server's client."""
        other = RedisLedger(self.url)
        await other.open()
        self._others.append(other)
        return other

    async def travel(self, seconds: float) -> None:
        """Shift all stored times."""
        await self.raw.eval(TRAVEL, 0, str(round(seconds * 1000)))  # type: ignore[misc]

    async def close(self) -> None:
        """Close all clients."""
        for other in self._others:
            await other.close()
        await super().close()
        await self.raw.aclose()


def new_conversation(conversation_id: str = "acme:talk", ttl_seconds: float = CONVERSATION_TTL) -> Conversation:
    """Return a conversation as it is created."""
    return Conversation(
        conversation_id=conversation_id,
        version=0,
        chain=root_digest("acme"),
        num_tokens=0,
        model="rwkv-7-test",
        fingerprint="00ff" * 8,
        template="world",
        created_at=1_700_000_000.25,
        ttl_seconds=ttl_seconds,
        metadata={"topic": "pianos"},
    )


def next_turn(
    head: Conversation | Turn,
    request_id: str = "request",
    output_ids: tuple[int, ...] = (7, 65_535),
    reply_id: str = "",
) -> Turn:
    """Return a turn that continues `head`."""
    prompt_ids = [0, 261, 4_294_967_295]
    return Turn(
        version=head.version + 1,
        parent_version=head.version,
        prompt_ids=prompt_ids,
        output_ids=list(output_ids),
        chain=extend_digest(head.chain, [*prompt_ids, *output_ids]),
        num_tokens=head.num_tokens + len(prompt_ids) + len(output_ids),
        finish_reason="stop",
        seed=2**64 - 1,
        created_at=1_700_000_001.5,
        request_id=request_id,
        reply_id=reply_id,
    )


def full_turn(head: Conversation | Turn, reply_id: str = "resp_1") -> Turn:
    """Return a turn that continues `head` and uses every field an entry has."""
    return msgspec.structs.replace(
        next_turn(head, reply_id=reply_id),
        items=[
            Item(item_id="msg_1", body=b'{"id":"msg_1"}', answer_id="earlier"),
            Item(item_id="msg_2", body='{"id":"msg_2","text":"Größe"}'.encode()),
        ],
        num_carried=1,
        answers=[Answer(answer_id="earlier", output_ids=[1, 2], opening="Assistant:", hint="Think.")],
        opening="Assistant:",
        hint="Be brief.",
        preamble="System: be kind.",
        reply=b'{"object":"response"}',
    )


def marker(head: Conversation | Turn, parent: Conversation | Turn, request_id: str = "marker") -> Turn:
    """Return an entry after `head` that takes the history back to `parent` and adds an item."""
    return Turn(
        version=head.version + 1,
        parent_version=parent.version,
        prompt_ids=[],
        output_ids=[],
        chain=parent.chain,
        num_tokens=parent.num_tokens,
        finish_reason="",
        seed=0,
        created_at=1_700_000_002.5,
        request_id=request_id,
        items=[Item(item_id=f"msg_{request_id}", body=b"{}")],
    )


def document(
    document_id: str = "chatcmpl-1",
    body: bytes = b"{}",
    created_at: float = 1_700_000_000.5,
    kind: str = "completion",
    ttl_seconds: float = DAY,
) -> Document:
    """Return a document that lives for a day."""
    return Document(kind=kind, document_id=document_id, body=body, created_at=created_at, ttl_seconds=ttl_seconds)


def checkpoint_of(turn: Turn, digit: str) -> CheckpointRef:
    """Return the name of a stored state after `turn`."""
    return CheckpointRef(checkpoint_id=digit * 32, num_tokens=turn.num_tokens, chain=turn.chain, num_bytes=1 << 21)


async def append(ledger: Ledger, conversation_id: str, request_id: str = "request", reply_id: str = "") -> Turn:
    """Add one turn in the orderly way and return it."""
    lease, head = await ledger.acquire(conversation_id, "server", LEASE_TTL)
    turn = next_turn(head, request_id, reply_id=reply_id)
    await ledger.commit(lease, turn)
    return turn

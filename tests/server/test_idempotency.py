"""Keys between servers, on every ledger: who carries a request out, and what is found afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
import pytest

from server.conversations.ledger import Lease
from server.errors import IdempotencyInProgress, IdempotencyKeyReused, ReplyNotKept
from server.idempotency import KEEP_SECONDS, MAX_REPLY_BYTES, Claim, Claims, Kept, Key
from server.presence import LIFE_SECONDS, Presence
from tests.redis_server import RedisServer
from tests.server.conversations.ledgers import (
    LEASE_TTL,
    LedgerUnderTest,
    RedisUnderTest,
    SqliteUnderTest,
    new_conversation,
    next_turn,
)

TALK = "acme:talk"
STATELESS = Key("key", b"digest", "")
TURN = Key("key", b"digest", TALK)


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One Redis for these tests."""
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(params=["sqlite", "redis"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[LedgerUnderTest]:
    """Each ledger, with one conversation in it."""
    under_test: LedgerUnderTest = SqliteUnderTest(tmp_path / "ledger.sqlite")
    if request.param == "redis":
        under_test = RedisUnderTest(request.getfixturevalue("redis"))
        await under_test.raw.flushall()
    under_test.ledger.is_shared = True  # by the servers here, which are objects of one process
    await under_test.ledger.open()
    await under_test.ledger.create(new_conversation(TALK))
    yield under_test
    await under_test.close()


class Server:
    """What one server has of keys."""

    def __init__(self, store: LedgerUnderTest) -> None:
        self._ledger = store.ledger
        self._claims = Claims(store.ledger, Presence(store.ledger))

    async def ask(self, key: Key, reply_id: str = "reply") -> Claim | bytes:
        """Send the request: it is to be carried out now, or its reply is there."""
        attempt = await self._claims.attempt(key, reply_id)
        if isinstance(attempt, Kept):
            return attempt.reply
        assert isinstance(attempt, Claim)
        return attempt

    async def claim(self, key: Key, reply_id: str = "reply") -> Claim:
        """Send the request, which is to be carried out now."""
        claim = await self.ask(key, reply_id)
        assert isinstance(claim, Claim)
        return claim

    async def lease(self) -> Lease:
        """Take the conversation's lease."""
        return (await self._ledger.acquire(TALK, "server", LEASE_TTL))[0]

    async def commit(self, lease: Lease, claim: Claim, reply: bytes = b"{}") -> None:
        """Commit the turn, with its reply."""
        head = await self._ledger.get(TALK)
        turn = next_turn(head, request_id="turn", reply_id=claim.reply_id)
        await self._ledger.commit(lease, msgspec.structs.replace(turn, reply=reply))


async def test_a_reply_is_found_though_its_server_never_said_that_it_was_done(store: LedgerUnderTest) -> None:
    """Killed between the commit and everything else: the log has the reply, whoever lives."""
    dead, other = Server(store), Server(store)
    claim = await dead.claim(TURN)
    lease = await dead.lease()
    await claim.enter(TALK)
    await dead.commit(lease, claim, b'{"said":1}')
    assert await other.ask(TURN) == b'{"said":1}'


async def test_a_log_that_is_known_only_later_is_found_too(store: LedgerUnderTest) -> None:
    """A response's: the record names it before the commit."""
    dead, other = Server(store), Server(store)
    claim = await dead.claim(STATELESS)
    lease = await dead.lease()
    await claim.enter(TALK)
    await dead.commit(lease, claim, b'{"said":1}')
    assert await other.ask(STATELESS) == b'{"said":1}'


async def test_a_request_is_in_progress_as_long_as_its_server_lives(store: LedgerUnderTest) -> None:
    """Both on that server and on others; when the server has shown no life for a while the key is free."""
    first, second = Server(store), Server(store)
    await first.claim(TURN)
    for server in (first, second):
        with pytest.raises(IdempotencyInProgress) as raised:
            await server.ask(TURN, "another")
        assert raised.value.reply_id == "reply"
    await store.travel(LIFE_SECONDS + 1)
    assert (await second.claim(TURN, "another")).reply_id == "reply"


async def test_what_is_not_carried_out_is_free_at_once(store: LedgerUnderTest) -> None:
    """For the same body, under the reply's first id, and for another."""
    first, second = Server(store), Server(store)
    await (await first.claim(TURN)).release()
    claim = await second.claim(TURN, "another")
    assert claim.reply_id == "reply"
    await claim.release()
    assert (await first.claim(Key("key", b"other digest", TALK), "third")).reply_id == "third"


async def test_only_one_takes_over(store: LedgerUnderTest) -> None:
    """Of all that find a server dead, even where they have no log that could tell."""
    dead, *others = (Server(store) for _ in range(4))
    await dead.claim(STATELESS)
    await store.travel(LIFE_SECONDS + 1)
    claimed = 0
    for server in others:
        with contextlib.suppress(IdempotencyInProgress):
            await server.claim(STATELESS)
            claimed += 1
    assert claimed == 1


async def test_a_server_that_was_only_thought_dead_is_seen_to_have_come_first(store: LedgerUnderTest) -> None:
    """Whoever takes over asks the log once more when it holds the lease, and does not answer twice."""
    slow, other = Server(store), Server(store)
    first = await slow.claim(TURN)
    await store.travel(LIFE_SECONDS + 1)
    second = await other.claim(TURN, "another")
    lease = await slow.lease()
    await first.enter(TALK)
    await slow.commit(lease, first, b'{"first":1}')
    await other.lease()
    with pytest.raises(IdempotencyInProgress):
        await second.enter(TALK)
    await second.release()
    assert await other.ask(TURN) == b'{"first":1}'


async def test_a_reply_without_a_turn_is_kept_for_a_day(store: LedgerUnderTest) -> None:
    """In the record itself; then the key can be used for something else."""
    server = Server(store)
    async with await server.claim(STATELESS) as claim:
        await claim.keep(b"{}")
    await store.travel(KEEP_SECONDS - 60)
    assert await server.ask(STATELESS) == b"{}"
    with pytest.raises(IdempotencyKeyReused):
        await server.ask(Key("key", b"other digest", ""))
    await store.travel(120)
    await server.claim(Key("key", b"other digest", ""))


async def test_a_turn_can_be_asked_for_a_day(store: LedgerUnderTest) -> None:
    """From its end on."""
    server = Server(store)
    async with await server.claim(TURN) as claim:
        lease = await server.lease()
        await claim.enter(TALK)
        await server.commit(lease, claim)
    await store.travel(KEEP_SECONDS - 60)
    assert await server.ask(TURN) == b"{}"
    await store.travel(120)
    assert (await server.claim(TURN, "new")).reply_id == "new"


async def test_a_reply_that_is_too_large_is_said_to_be(store: LedgerUnderTest) -> None:
    """It is not kept, and the request is not carried out again."""
    server = Server(store)
    async with await server.claim(STATELESS) as claim:
        await claim.keep(b"x" * (MAX_REPLY_BYTES + 1))
    with pytest.raises(ReplyNotKept):
        await server.ask(STATELESS)


async def test_a_deleted_conversation_leaves_nothing_of_its_replies(store: LedgerUnderTest) -> None:
    """They were part of it (promise P20)."""
    server = Server(store)
    async with await server.claim(TURN) as claim:
        lease = await server.lease()
        await claim.enter(TALK)
        await server.commit(lease, claim, b'{"said":"secret"}')
    await store.ledger.delete(TALK)
    record = await store.ledger.get_document("idempotency", "key")
    assert record is not None
    assert b"secret" not in record.body
    assert isinstance(await server.ask(TURN), Claim)

"""What only the Redis ledger promises: what becomes of a turn when Redis fails, forgets, or answers too late."""

from __future__ import annotations

import asyncio
import logging
import random
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
from redis.asyncio import Redis

from server.conversations.ledger import (
    Conversation,
    ConversationBusy,
    ConversationExpired,
    ConversationNotFound,
    Durability,
    Lease,
    LeaseLost,
    LedgerCorrupt,
    LedgerUnavailable,
    Turn,
)
from server.conversations.redis_ledger import RedisLedger
from tests.conftest import ROOT
from tests.redis_server import RedisServer, free_port
from tests.server.conversations import first_format
from tests.server.conversations.ledgers import (
    CONVERSATION_TTL,
    DAY,
    LEASE_TTL,
    RedisUnderTest,
    append,
    checkpoint_of,
    document,
    new_conversation,
    next_turn,
)
from tests.server.conversations.lossy_proxy import LossyProxy

ID = "acme:talk"
HEAD, TURNS, REPLIES = "rk:{acme:talk}:m", "rk:{acme:talk}:t", "rk:{acme:talk}:r"
DOCUMENT, CREATION, EXPIRY = "rk:d:{completion}:a", "rk:dc:{completion}", "rk:de:{completion}"


@asynccontextmanager
async def opened(url: str, timeout_seconds: float = 2.0) -> AsyncIterator[RedisLedger]:
    """An open ledger."""
    ledger = RedisLedger(url, timeout_seconds=timeout_seconds)
    await ledger.open()
    try:
        yield ledger
    finally:
        await ledger.close()


@asynccontextmanager
async def client(server: RedisServer) -> AsyncIterator[Redis]:
    """A client that does to Redis what a test needs."""
    async with Redis.from_url(server.url) as redis:
        yield redis


# -- durability -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "durability"),
    [
        ({"appendonly": "yes", "appendfsync": "everysec"}, Durability.ACKED),
        ({"appendonly": "yes", "appendfsync": "no"}, Durability.ACKED),
        ({"appendonly": "yes", "appendfsync": "always"}, Durability.FSYNCED),
        ({"appendonly": "no", "appendfsync": "always"}, Durability.MEMORY),
    ],
)
async def test_durability_is_what_the_server_is_set_to(
    redis_server: RedisServer, settings: dict[str, str], durability: Durability
) -> None:
    """A ledger never claims more than the settings of its Redis keep."""
    async with client(redis_server) as redis:
        for name, value in settings.items():
            await redis.config_set(name, value)
    async with opened(redis_server.url) as ledger:
        assert ledger.durability is durability


async def test_an_evicting_server_is_warned_about(redis_server: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    """A policy under which conversations could vanish is said loudly when the ledger opens."""
    async with client(redis_server) as redis:
        await redis.config_set("maxmemory-policy", "allkeys-lru")
    async with opened(redis_server.url):
        assert "noeviction" in caplog.text


# -- outages ----------------------------------------------------------------------------------------------------------


async def test_a_killed_redis_comes_back_with_every_acknowledged_turn(redis_server: RedisServer) -> None:
    """After `kill -9` and a restart the same ledger object goes on, and the log is complete."""
    async with opened(redis_server.url) as ledger:
        await ledger.create(new_conversation(ID))
        turns = [await append(ledger, ID, f"request-{number}") for number in range(20)]
        lease, head = await ledger.acquire(ID, "server", LEASE_TTL)
        redis_server.kill()
        with pytest.raises(LedgerUnavailable):
            await ledger.get(ID)
        redis_server.start()
        assert await ledger.turns(ID) == turns
        await ledger.commit(lease, next_turn(head))  # leases are kept too


async def test_a_restart_between_two_calls_is_no_error(redis_server: RedisServer) -> None:
    """A connection that Redis has closed in the meantime is replaced."""
    async with opened(redis_server.url) as ledger:
        await ledger.create(new_conversation(ID))
        redis_server.stop()
        redis_server.start()
        assert (await append(ledger, ID)).version == 1


async def test_a_hanging_redis_is_unavailable_and_recovers(redis_server: RedisServer) -> None:
    """While Redis answers nothing every call ends with `LedgerUnavailable`; then all works again."""
    async with opened(redis_server.url, timeout_seconds=0.3) as ledger:
        await ledger.create(new_conversation(ID))
        lease, head = await ledger.acquire(ID, "server", LEASE_TTL)
        turn = next_turn(head)
        redis_server.pause()
        try:
            calls = [
                ledger.get(ID),
                ledger.turns(ID),
                ledger.renew(lease),
                ledger.commit(lease, turn),
                ledger.acquire("acme:other", "server", LEASE_TTL),
                ledger.create(new_conversation("acme:other")),
                ledger.point(ID, 1, checkpoint_of(turn, "a")),
                ledger.sweep(),
                ledger.update(ID, metadata={}),
                ledger.find_reply(ID, "resp_1"),
                ledger.put_document(document()),
                ledger.get_document("completion", "a"),
                ledger.delete_document("completion", "a"),
                ledger.documents("completion"),
            ]
            async with asyncio.timeout(20):
                outcomes = await asyncio.gather(*calls, return_exceptions=True)
        finally:
            redis_server.resume()
        assert [type(outcome) for outcome in outcomes] == [LedgerUnavailable] * len(calls)
        await ledger.commit(lease, turn)  # whether the first attempt was carried out or not
        assert await ledger.turns(ID) == [turn]


async def test_opening_an_unreachable_redis_fails_clearly() -> None:
    """`open` raises instead of pretending."""
    ledger = RedisLedger(f"redis://127.0.0.1:{free_port()}/0")
    with pytest.raises(LedgerUnavailable, match="connect"):
        await ledger.open()


async def test_a_flushed_redis_is_not_a_fresh_start(redis_ledger: RedisUnderTest) -> None:
    """After FLUSHALL a conversation is not found; a running turn is fenced; nothing starts from nothing."""
    ledger = redis_ledger.ledger
    await ledger.create(new_conversation(ID))
    lease, head = await ledger.acquire(ID, "server", LEASE_TTL)
    await redis_ledger.raw.flushall()
    with pytest.raises(ConversationNotFound):
        await ledger.get(ID)
    with pytest.raises(ConversationNotFound):
        await ledger.acquire(ID, "server", LEASE_TTL)
    with pytest.raises(LeaseLost):
        await ledger.commit(lease, next_turn(head))
    await ledger.release(lease)
    assert await redis_ledger.raw.keys() == []


async def test_forgotten_scripts_are_loaded_again(redis_ledger: RedisUnderTest) -> None:
    """A Redis that lost its script cache, as after a failover, is taught the scripts on the way."""
    await redis_ledger.ledger.create(new_conversation(ID))
    await redis_ledger.raw.script_flush()
    assert (await append(redis_ledger.ledger, ID)).version == 1


# -- refusals ---------------------------------------------------------------------------------------------------------


async def test_a_full_redis_refuses_and_loses_nothing(redis_server: RedisServer) -> None:
    """Out of memory, commits and creations raise `LedgerUnavailable`, write nothing, and a lease can be given back."""
    async with opened(redis_server.url) as ledger, client(redis_server) as redis:
        await ledger.create(new_conversation(ID))
        turn = await append(ledger, ID)
        lease, head = await ledger.acquire(ID, "server", LEASE_TTL)
        await redis.config_set("maxmemory", "1mb")
        with pytest.raises(LedgerUnavailable):
            await ledger.commit(lease, next_turn(head))
        with pytest.raises(LedgerUnavailable):
            await ledger.create(new_conversation("acme:other"))
        with pytest.raises(LedgerUnavailable):
            await ledger.put_document(document())
        assert await redis.keys("rk:d*") == []
        assert await ledger.turns(ID) == [turn]
        await ledger.release(lease)
        await redis.config_set("maxmemory", "0")
        assert (await append(ledger, ID)).version == 2


async def test_a_redis_that_cannot_save_refuses(redis_server: RedisServer) -> None:
    """MISCONF, Redis's answer to a disk that fails, is `LedgerUnavailable`, and nothing is written."""
    async with opened(redis_server.url) as ledger, client(redis_server) as redis:
        await ledger.create(new_conversation(ID))
        lease, head = await ledger.acquire(ID, "server", LEASE_TTL)
        await redis.config_set("save", "3600 1")
        shutil.rmtree(redis_server.directory)
        await redis.bgsave()
        async with asyncio.timeout(20):
            while True:
                if (await redis.info("persistence"))["rdb_last_bgsave_status"] == "err":
                    break
                await asyncio.sleep(0.05)
        with pytest.raises(LedgerUnavailable, match="MISCONF"):
            await ledger.commit(lease, next_turn(head))
        assert await ledger.get(ID) == head


async def test_a_replica_refuses(redis_server: RedisServer) -> None:
    """Writes to a Redis that became a read-only replica are `LedgerUnavailable`."""
    async with opened(redis_server.url) as ledger, client(redis_server) as redis:
        await ledger.create(new_conversation(ID))
        lease, head = await ledger.acquire(ID, "server", LEASE_TTL)
        await redis.execute_command("REPLICAOF", "127.0.0.1", str(free_port()))
        with pytest.raises(LedgerUnavailable):
            await ledger.commit(lease, next_turn(head))
        await redis.execute_command("REPLICAOF", "NO", "ONE")
        await ledger.commit(lease, next_turn(head))


async def test_missing_replicas_refuse(redis_server: RedisServer) -> None:
    """A primary that must have replicas and has none does not take a turn."""
    async with opened(redis_server.url) as ledger, client(redis_server) as redis:
        await ledger.create(new_conversation(ID))
        await redis.config_set("min-replicas-to-write", "1")
        with pytest.raises(LedgerUnavailable):
            await ledger.acquire(ID, "server", LEASE_TTL)


async def load_scripts(ledger: RedisLedger, redis: Redis) -> None:
    """Teach Redis all scripts, so that the next reply is a script's, and not that there is no such script."""
    for script in ledger._redis._scripts.values():
        await redis.script_load(script.script)


# -- lost replies -----------------------------------------------------------------------------------------------------


async def test_operations_whose_reply_is_lost_happen_once(lasting_redis: RedisServer) -> None:
    """When the connection breaks after Redis did as asked, asking again changes nothing and answers right."""
    async with client(lasting_redis) as redis, LossyProxy(lasting_redis.port) as proxy:
        await redis.flushall()
        async with opened(f"redis://127.0.0.1:{proxy.port}/0") as ledger:
            await load_scripts(ledger, redis)
            proxy.lose_next_reply()
            await ledger.create(new_conversation(ID))
            proxy.lose_next_reply()
            lease, head = await ledger.acquire(ID, "server", LEASE_TTL)
            turn = next_turn(head)
            proxy.lose_next_reply()
            await ledger.renew(lease)
            proxy.lose_next_reply()
            await ledger.commit(lease, turn)
            proxy.lose_next_reply()
            assert await ledger.point(ID, 1, checkpoint_of(turn, "a")) == []
            proxy.lose_next_reply()
            assert await ledger.turns(ID) == [turn]
            lease, head = await ledger.acquire(ID, "server", LEASE_TTL)
            assert head.checkpoints == {1: checkpoint_of(turn, "a")}
            proxy.lose_next_reply()
            await ledger.release(lease)
            await ledger.acquire(ID, "server", LEASE_TTL)
            with pytest.raises(ConversationBusy):
                await ledger.acquire(ID, "other", LEASE_TTL)
        assert proxy.num_lost == 7


async def test_what_was_written_although_its_reply_was_lost_counts_as_written(lasting_redis: RedisServer) -> None:
    """A log that begins with entries, an update, and a document that must be absent are repeated without harm."""
    async with client(lasting_redis) as redis, LossyProxy(lasting_redis.port) as proxy:
        await redis.flushall()
        async with opened(f"redis://127.0.0.1:{proxy.port}/0") as ledger:
            await load_scripts(ledger, redis)
            turn = next_turn(new_conversation(ID), reply_id="resp_1")
            proxy.lose_next_reply()
            await ledger.create(new_conversation(ID), [turn])
            assert await ledger.turns(ID) == [turn]
            proxy.lose_next_reply()
            assert (await ledger.update(ID, metadata={"a": "1"}, ttl_seconds=9.0)).metadata == {"a": "1"}
            proxy.lose_next_reply()
            assert await ledger.find_reply(ID, "resp_1") == turn
            proxy.lose_next_reply()
            assert await ledger.put_document(document("a"), if_absent=True)
            assert not await ledger.put_document(document("a"), if_absent=True)
            proxy.lose_next_reply()
            assert await ledger.put_document(document("a", b"new"))
            proxy.lose_next_reply()
            assert await ledger.documents("completion") == [document("a", b"new")]
            proxy.lose_next_reply()
            await ledger.delete_document("completion", "a")
            assert await ledger.get_document("completion", "a") is None
        assert proxy.num_lost == 7


@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_cancelled_calls_leave_no_reply_behind(redis_ledger: RedisUnderTest, seed: int) -> None:
    """However callers are cancelled, nobody ever reads the answer to somebody else's question."""
    ledger, rng = redis_ledger.ledger, random.Random(seed)
    ids = [f"acme:{number}" for number in range(10)]
    for conversation_id in ids:
        await ledger.create(new_conversation(conversation_id))
    num_cancelled = 0
    for _ in range(20):
        calls = {conversation_id: asyncio.create_task(ledger.get(conversation_id)) for conversation_id in ids}
        for _ in range(rng.randrange(6)):
            await asyncio.sleep(0)
        for call in rng.sample(list(calls.values()), 5):
            call.cancel()
        await asyncio.wait(calls.values())
        for conversation_id, call in calls.items():
            num_cancelled += call.cancelled()
            assert call.cancelled() or call.result().conversation_id == conversation_id
    assert num_cancelled > 0


# -- damage -----------------------------------------------------------------------------------------------------------

DAMAGES = {
    "head of another type": [("DEL", HEAD), ("SET", HEAD, "x")],
    "log of another type": [("DEL", TURNS), ("SET", TURNS, "x")],
    "lost log": [("DEL", TURNS)],
    "shortened log": [("RPOP", TURNS)],
    "truncated record": [("LSET", TURNS, "1", "x")],
    "repeated record": [("LMOVE", TURNS, TURNS, "LEFT", "RIGHT")],
    "another conversation's log": [("COPY", "rk:{acme:other}:t", TURNS, "REPLACE")],
    "another conversation's head": [("COPY", "rk:{acme:other}:m", HEAD, "REPLACE")],
    "head without a record": [("HDEL", HEAD, "head")],
    "version that is no number": [("HSET", HEAD, "version", "many")],
    "time that is no number": [("HSET", HEAD, "expires_at", "soon")],
    "another chain": [("HSET", HEAD, "chain", "0123456789abcdef")],
    "metadata that are none": [("HSET", HEAD, "metadata", "x")],
    "checkpoint that is none": [("HSET", HEAD, "checkpoint:1", "x")],
    "checkpoint of no version": [("HSET", HEAD, "checkpoint:first", "x")],
    "time to live that is no number": [("HSET", HEAD, "ttl_ms", "long")],
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
async def test_a_damaged_record_is_never_continued_from(
    redis_ledger: RedisUnderTest, damage: list[tuple[str, ...]]
) -> None:
    """Keys that are of another type, cut, swapped or missing raise `LedgerCorrupt`; a sweep passes them by."""
    ledger = redis_ledger.ledger
    for conversation_id in ("acme:other", ID):
        await ledger.create(new_conversation(conversation_id))
        await append(ledger, conversation_id)
        await append(ledger, conversation_id)
    for command in damage:
        await redis_ledger.raw.execute_command(*command)
    with pytest.raises(LedgerCorrupt):
        await ledger.turns(ID)
    assert await ledger.sweep() == []


async def test_a_log_that_lost_turns_takes_no_more(redis_ledger: RedisUnderTest) -> None:
    """A commit checks that the log reaches the head: an eviction can't make room for a turn in the wrong place."""
    ledger = redis_ledger.ledger
    await ledger.create(new_conversation(ID))
    await append(ledger, ID)
    lease, head = await ledger.acquire(ID, "server", LEASE_TTL)
    await redis_ledger.raw.delete(TURNS)
    with pytest.raises(LedgerCorrupt):
        await ledger.commit(lease, next_turn(head))
    assert await redis_ledger.raw.exists(TURNS) == 0


REPLY_DAMAGES = {
    "replies of another type": [("DEL", REPLIES), ("SET", REPLIES, "x")],
    "version that is no number": [("HSET", REPLIES, "resp_1", "x")],
    "version of another reply": [("HSET", REPLIES, "resp_1", "2")],
    "version without a turn": [("HSET", REPLIES, "resp_1", "3")],
    "truncated record": [("LSET", TURNS, "0", "x")],
}


@pytest.mark.parametrize("damage", REPLY_DAMAGES.values(), ids=REPLY_DAMAGES.keys())
async def test_a_damaged_reply_is_not_given_out(redis_ledger: RedisUnderTest, damage: list[tuple[str, ...]]) -> None:
    """An index of replies that is of another type, or leads elsewhere, raises `LedgerCorrupt`."""
    await redis_ledger.ledger.create(new_conversation(ID))
    for reply_id in ("resp_1", "resp_2"):
        await append(redis_ledger.ledger, ID, reply_id=reply_id)
    for command in damage:
        await redis_ledger.raw.execute_command(*command)
    with pytest.raises(LedgerCorrupt):
        await redis_ledger.ledger.find_reply(ID, "resp_1")


DOCUMENT_DAMAGES = {
    "document of another type": [("DEL", DOCUMENT), ("SET", DOCUMENT, "x")],
    "truncated record": [("HSET", DOCUMENT, "record", "x")],
    "another document's record": [("COPY", "rk:d:{completion}:b", DOCUMENT, "REPLACE")],
}


@pytest.mark.parametrize("damage", DOCUMENT_DAMAGES.values(), ids=DOCUMENT_DAMAGES.keys())
async def test_a_damaged_document_is_not_given_out(redis_ledger: RedisUnderTest, damage: list[tuple[str, ...]]) -> None:
    """A document that is of another type, cut or swapped raises `LedgerCorrupt`, by itself and in a list."""
    for document_id in ("a", "b"):
        await redis_ledger.ledger.put_document(document(document_id))
    for command in damage:
        await redis_ledger.raw.execute_command(*command)
    with pytest.raises(LedgerCorrupt):
        await redis_ledger.ledger.get_document("completion", "a")
    with pytest.raises(LedgerCorrupt):
        await redis_ledger.ledger.documents("completion")


# -- keys of the first format -----------------------------------------------------------------------------------------


async def write_first_format(redis: Redis) -> list[Turn]:
    """Write a conversation as the first release did: two turns, and a checkpoint after the first."""
    first = next_turn(new_conversation(ID))
    turns = [first, next_turn(first)]
    expires_at = (await redis.time())[0] * 1000 + 86_400_000
    fields = {
        "created_by": "call",
        "head": first_format.head_record(new_conversation(ID)),
        "version": 2,
        "chain": turns[1].chain,
        "num_tokens": turns[1].num_tokens,
        "request_id": "request",
        "ttl_ms": round(CONVERSATION_TTL * 1000),
        "expires_at": expires_at,
        "checkpoint_version": 1,
        "checkpoint": first_format.checkpoint_record(checkpoint_of(first, "a")),
        "fence": 2,
    }
    await redis.hset(HEAD, mapping=fields)
    await redis.rpush(TURNS, *(first_format.turn_record(ID, turn) for turn in turns))
    return turns


async def test_a_conversation_of_the_first_format_goes_on(redis_ledger: RedisUnderTest) -> None:
    """It keeps its turns and its checkpoint, takes new turns, and gives its checkpoint up when it is dropped."""
    ledger = redis_ledger.ledger
    turns = await write_first_format(redis_ledger.raw)
    assert await ledger.get(ID) == msgspec.structs.replace(
        new_conversation(ID),
        version=2,
        chain=turns[1].chain,
        num_tokens=turns[1].num_tokens,
        checkpoints={1: checkpoint_of(turns[0], "a")},
    )
    turns.append(await append(ledger, ID, reply_id="resp_1"))
    assert await ledger.turns(ID) == turns
    assert await ledger.find_reply(ID, "resp_1") == turns[2]
    assert await ledger.point(ID, 3, checkpoint_of(turns[2], "b")) == []
    assert list((await ledger.get(ID)).checkpoints) == [1, 3]
    assert await ledger.point(ID, 2, checkpoint_of(turns[1], "c"), drop=[1]) == [checkpoint_of(turns[0], "a")]
    assert list((await ledger.get(ID)).checkpoints) == [2, 3]


async def test_a_checkpoint_of_the_first_format_is_swept(redis_ledger: RedisUnderTest) -> None:
    """A conversation that expires before anything new happens to it still names its checkpoint."""
    turns = await write_first_format(redis_ledger.raw)
    await redis_ledger.raw.hset(HEAD, "expires_at", 1)
    assert await redis_ledger.ledger.sweep() == [checkpoint_of(turns[0], "a")]


class DeletedMeanwhile(RedisLedger):
    """A ledger that loses a race: another server deletes the conversation between its two steps of reading."""

    async def get(self, conversation_id: str) -> Conversation:
        """Read the head, then let it be deleted."""
        head = await super().get(conversation_id)
        await self.delete(conversation_id)
        return head


async def test_a_conversation_deleted_while_it_is_read_is_no_damage(
    redis_ledger: RedisUnderTest, lasting_redis: RedisServer
) -> None:
    """Turns that go away after the head was read mean that the conversation is gone, not that it is corrupt."""
    await redis_ledger.ledger.create(new_conversation(ID))
    await append(redis_ledger.ledger, ID)
    ledger = DeletedMeanwhile(lasting_redis.url)
    with pytest.raises(ConversationExpired):
        await ledger.turns(ID)
    await ledger.close()


# -- keys -------------------------------------------------------------------------------------------------------------


async def test_every_key_is_tagged_and_ends(redis_ledger: RedisUnderTest) -> None:
    """Keys of one conversation share a hash tag, so that a cluster keeps them together, and none lives for ever."""
    ledger, raw = redis_ledger.ledger, redis_ledger.raw
    for conversation_id in (ID, "acme:}{"):
        await ledger.create(new_conversation(conversation_id))
        await append(ledger, conversation_id, reply_id="resp_1")
    await ledger.create(new_conversation("acme:deleted"), [next_turn(new_conversation(), reply_id="resp_1")])
    await ledger.delete("acme:deleted")
    await ledger.create(new_conversation("acme:begun"), [next_turn(new_conversation(), reply_id="resp_1")])
    await ledger.put_document(document("}a{", kind="}k{"))
    assert sorted(await raw.keys()) == [
        b"rk:d:{%7Dk%7B}:}a{",
        b"rk:dc:{%7Dk%7B}",
        b"rk:de:{%7Dk%7B}",
        b"rk:{acme:%7D%7B}:m",
        b"rk:{acme:%7D%7B}:r",
        b"rk:{acme:%7D%7B}:t",
        b"rk:{acme:begun}:m",
        b"rk:{acme:begun}:r",
        b"rk:{acme:begun}:t",
        b"rk:{acme:deleted}:m",
        b"rk:{acme:talk}:m",
        b"rk:{acme:talk}:r",
        b"rk:{acme:talk}:t",
    ]
    assert all([await raw.pttl(key) > 0 for key in await raw.keys()])


async def test_nothing_of_a_deleted_conversation_is_left(redis_ledger: RedisUnderTest) -> None:
    """A tombstone holds no token, no text and no name of a model (promise P20)."""
    await redis_ledger.ledger.create(new_conversation(ID))
    await append(redis_ledger.ledger, ID, reply_id="resp_1")
    await redis_ledger.ledger.update(ID, metadata={"topic": "harps"})
    await redis_ledger.ledger.delete(ID)
    assert await redis_ledger.raw.keys() == [HEAD.encode()]
    assert await redis_ledger.raw.hgetall(HEAD) == {b"expires_at": b"0"}


async def test_the_keys_of_a_kind_live_as_long_as_its_documents(redis_ledger: RedisUnderTest) -> None:
    """A document that lives shorter than the others does not take the order of the others with it."""
    ledger, raw = redis_ledger.ledger, redis_ledger.raw
    await ledger.put_document(document("a", ttl_seconds=DAY))
    await ledger.put_document(document("b", ttl_seconds=1))
    for key in (CREATION, EXPIRY):
        assert abs(await raw.pttl(key) - DAY * 1000) < 60_000
    await ledger.put_document(document("c", ttl_seconds=2 * DAY))
    for key in (CREATION, EXPIRY):
        assert abs(await raw.pttl(key) - 2 * DAY * 1000) < 60_000


async def test_expired_documents_leave_no_names_behind(redis_ledger: RedisUnderTest) -> None:
    """A new document, or a list that meets them, takes the names of expired ones away; a deleted one takes its own."""
    ledger, raw = redis_ledger.ledger, redis_ledger.raw
    for document_id in "abc":
        await ledger.put_document(document(document_id, ttl_seconds=1))
    await ledger.put_document(document("lasting"))
    await redis_ledger.travel(2)
    await ledger.put_document(document("new"))
    for key in (CREATION, EXPIRY):
        assert sorted(await raw.zrange(key, 0, -1)) == [b"lasting", b"new"]
    await ledger.put_document(document("d", ttl_seconds=1))
    await redis_ledger.travel(2)
    await ledger.documents("completion")
    await ledger.delete_document("completion", "new")
    for key in (CREATION, EXPIRY):
        assert await raw.zrange(key, 0, -1) == [b"lasting"]


# -- secrets, and the deployed settings -------------------------------------------------------------------------------


async def test_the_password_is_never_shown(redis_server: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    """Neither the ledger's name, nor its warnings, nor its errors carry the password."""
    caplog.set_level(logging.DEBUG)
    async with client(redis_server) as redis:
        await redis.config_set("maxmemory-policy", "allkeys-lru")
    refused = RedisLedger(redis_server.url.replace("redis://", "redis://somebody:hunter2@"))
    with pytest.raises(LedgerUnavailable) as refusal:
        await refused.open()
    async with opened(redis_server.url.replace("redis://", "redis://:hunter2@").replace(":hunter2@", "")):
        pass
    assert "hunter2" not in repr(refused) + str(refusal.value) + repr(refusal.value.__cause__) + caplog.text
    assert str(redis_server.port) in repr(refused)


@pytest.fixture
def deployed_redis(tmp_path: Path) -> RedisServer:
    """A Redis with the settings that are shipped."""
    return RedisServer(tmp_path / "deployed", "--include", str(ROOT / "deploy/redis/ledger.conf"))


async def use_everything(ledger: RedisLedger) -> None:
    """Do whatever a ledger does."""
    await ledger.create(new_conversation(ID))
    turn = await append(ledger, ID, reply_id="resp_1")
    lease, _ = await ledger.acquire(ID, "server", LEASE_TTL)
    await ledger.renew(lease)
    await ledger.point(ID, 1, checkpoint_of(turn, "a"))
    turns = [turn, await append_under(ledger, lease, turn)]
    await ledger.point(ID, 2, checkpoint_of(turns[1], "b"), drop=[1])
    assert await ledger.turns(ID) == turns
    assert await ledger.find_reply(ID, "resp_1") == turn
    await ledger.update(ID, metadata={"a": "1"}, ttl_seconds=CONVERSATION_TTL)
    assert await ledger.sweep() == []
    await ledger.create(new_conversation("acme:short", ttl_seconds=0.001), turns)
    await ledger.put_document(document("short", ttl_seconds=0.001))
    await asyncio.sleep(0.01)
    await ledger.sweep()
    await ledger.delete(ID)
    for document_id in "abc":
        assert await ledger.put_document(document(document_id), if_absent=True)
    for newest_first in (False, True):
        page = await ledger.documents("completion", after="b", newest_first=newest_first)
        assert page == [document("a" if newest_first else "c")]
    assert await ledger.get_document("completion", "a") == document("a")
    assert await ledger.delete_document("completion", "a")


async def append_under(ledger: RedisLedger, lease: Lease, head: Turn) -> Turn:
    """Commit the next turn under a lease and return it."""
    turn = next_turn(head)
    await ledger.commit(lease, turn)
    return turn


async def test_the_shipped_settings_and_rights_suffice(
    deployed_redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    """With `ledger.conf`, as the user of `users.acl`, everything a ledger does works, and it has nothing to warn of.

    It uses each of its rights, but those that only some addresses, versions of Redis or mishaps call for.
    """
    rules = dict(line.split(maxsplit=2)[1:] for line in (ROOT / "deploy/redis/users.acl").read_text().splitlines())
    rights = {rule.removeprefix("+") for rule in rules["sostenuto-ledger"].split() if rule.startswith("+")}
    with deployed_redis:
        async with client(deployed_redis) as redis:
            await redis.execute_command("ACL", "SETUSER", "sostenuto-ledger", *rules["sostenuto-ledger"].split())
            await redis.config_resetstat()
            url = deployed_redis.url.replace("redis://", "redis://sostenuto-ledger:change-me@")
            async with opened(url) as ledger:
                assert ledger.durability is Durability.ACKED
                await use_everything(ledger)
            used = {name.removeprefix("cmdstat_") for name in await redis.info("commandstats")}
    assert caplog.text == ""
    assert rights - used <= {"auth", "hello", "select", "info"}


async def test_a_server_that_hides_its_settings_is_believed_to_be_acked(redis_server: RedisServer) -> None:
    """Where CONFIG is forbidden, as on many hosts, the ledger opens and claims no more than `acked`."""
    async with client(redis_server) as redis:
        await redis.config_set("appendfsync", "always")
        await redis.execute_command("ACL", "SETUSER", "guest", "on", ">pw", "~rk:*", "+@all", "-config")
    async with opened(redis_server.url.replace("redis://", "redis://guest:pw@")) as ledger:
        assert ledger.durability is Durability.ACKED

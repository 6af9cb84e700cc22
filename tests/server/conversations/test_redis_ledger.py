"""What only the Redis ledger promises: what becomes of a turn when Redis fails, forgets, or answers too late."""

from __future__ import annotations

import asyncio
import logging
import random
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from redis.asyncio import Redis

from server.conversations.ledger import (
    Conversation,
    ConversationBusy,
    ConversationExpired,
    ConversationNotFound,
    Durability,
    LeaseLost,
    LedgerCorrupt,
    LedgerUnavailable,
)
from server.conversations.redis_ledger import RedisLedger
from tests.conftest import ROOT
from tests.redis_server import RedisServer, free_port
from tests.server.conversations.ledgers import (
    LEASE_TTL,
    RedisUnderTest,
    append,
    checkpoint_of,
    new_conversation,
    next_turn,
)
from tests.server.conversations.lossy_proxy import LossyProxy

ID = "acme:talk"
HEAD, TURNS = "rk:{acme:talk}:m", "rk:{acme:talk}:t"


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


# -- lost replies -----------------------------------------------------------------------------------------------------


async def test_operations_whose_reply_is_lost_happen_once(lasting_redis: RedisServer) -> None:
    """When the connection breaks after Redis did as asked, asking again changes nothing and answers right."""
    async with client(lasting_redis) as redis, LossyProxy(lasting_redis.port) as proxy:
        await redis.flushall()
        async with opened(f"redis://127.0.0.1:{proxy.port}/0") as ledger:
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
        await append(ledger, conversation_id)
    await ledger.create(new_conversation("acme:deleted"))
    await ledger.delete("acme:deleted")
    assert sorted(await raw.keys()) == [
        b"rk:{acme:%7D%7B}:m",
        b"rk:{acme:%7D%7B}:t",
        b"rk:{acme:deleted}:m",
        b"rk:{acme:talk}:m",
        b"rk:{acme:talk}:t",
    ]
    assert all([await raw.pttl(key) > 0 for key in await raw.keys()])


async def test_nothing_of_a_deleted_conversation_is_left(redis_ledger: RedisUnderTest) -> None:
    """A tombstone holds no token, no text and no name of a model (promise P20)."""
    await redis_ledger.ledger.create(new_conversation(ID))
    await append(redis_ledger.ledger, ID)
    await redis_ledger.ledger.delete(ID)
    assert await redis_ledger.raw.hgetall(HEAD) == {b"expires_at": b"0"}


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


async def test_the_shipped_settings_and_rights_suffice(
    deployed_redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    """With `ledger.conf`, as the user of `users.acl`, everything a ledger does works, and it has nothing to warn of."""
    rules = dict(line.split(maxsplit=2)[1:] for line in (ROOT / "deploy/redis/users.acl").read_text().splitlines())
    with deployed_redis:
        async with client(deployed_redis) as redis:
            await redis.execute_command("ACL", "SETUSER", "sostenuto-ledger", *rules["sostenuto-ledger"].split())
        url = deployed_redis.url.replace("redis://", "redis://sostenuto-ledger:change-me@")
        async with opened(url) as ledger:
            assert ledger.durability is Durability.ACKED
            await ledger.create(new_conversation(ID))
            turn = await append(ledger, ID)
            lease, _ = await ledger.acquire(ID, "server", LEASE_TTL)
            await ledger.renew(lease)
            await ledger.point(ID, 1, checkpoint_of(turn, "a"))
            assert await ledger.turns(ID) == [turn]
            assert await ledger.sweep() == []
            await ledger.create(new_conversation("acme:short", ttl_seconds=0.001))
            await asyncio.sleep(0.01)
            await ledger.sweep()
            await ledger.delete(ID)
    assert caplog.text == ""


async def test_a_server_that_hides_its_settings_is_believed_to_be_acked(redis_server: RedisServer) -> None:
    """Where CONFIG is forbidden, as on many hosts, the ledger opens and claims no more than `acked`."""
    async with client(redis_server) as redis:
        await redis.config_set("appendfsync", "always")
        await redis.execute_command("ACL", "SETUSER", "guest", "on", ">pw", "~rk:*", "+@all", "-config")
    async with opened(redis_server.url.replace("redis://", "redis://guest:pw@")) as ledger:
        assert ledger.durability is Durability.ACKED

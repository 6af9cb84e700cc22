"""Several servers, one conversation: whatever the timing, the log stays one chain."""

from __future__ import annotations

import asyncio
import random

import msgspec
import pytest

from engine.messages import CheckpointRef
from engine.token_chain import extend_digest, root_digest
from server.conversations.ledger import ConversationBusy, ConversationExpired, LeaseLost, Ledger, Turn
from tests.server.conversations.ledgers import (
    CONVERSATION_TTL,
    LEASE_TTL,
    LedgerUnderTest,
    RedisUnderTest,
    append,
    checkpoint_of,
    new_conversation,
    next_turn,
)

ID = "acme:talk"


def assert_one_chain(turns: list[Turn]) -> None:
    """Check that versions are consecutive and each turn continues the one before it."""
    assert [turn.version for turn in turns] == list(range(1, len(turns) + 1))
    chain = root_digest("acme")
    for turn in turns:
        chain = extend_digest(chain, [*turn.prompt_ids, *turn.output_ids])
        assert turn.chain == chain


async def acquire_patiently(ledger: Ledger, owner: str) -> tuple:  # type: ignore[type-arg]
    """Ask for the lease until it is granted."""
    while True:
        try:
            return await ledger.acquire(ID, owner, LEASE_TTL)
        except ConversationBusy:
            await asyncio.sleep(0.002)


async def test_racing_writers_take_turns(store: LedgerUnderTest) -> None:
    """Eight writers on two servers lose no turn, and every turn sees the one before it."""
    await store.ledger.create(new_conversation(ID))
    ledgers = [store.ledger, await store.another()]
    committed: list[str] = []

    async def write(writer: int) -> None:
        for number in range(4):
            ledger = ledgers[writer % 2]
            lease, head = await acquire_patiently(ledger, f"writer-{writer}")
            request_id = f"{writer}-{number}"
            await ledger.commit(lease, next_turn(head, request_id, output_ids=(writer, number)))
            committed.append(request_id)

    async with asyncio.timeout(60):
        await asyncio.gather(*(write(writer) for writer in range(8)))
    turns = await store.ledger.turns(ID)
    assert_one_chain(turns)
    assert sorted(turn.request_id for turn in turns) == sorted(committed)


async def test_racing_commits_under_one_lease_apply_once(store: LedgerUnderTest) -> None:
    """Of many different turns sent under one lease exactly one is applied, and the others are fenced."""
    await store.ledger.create(new_conversation(ID))
    ledgers = [store.ledger, await store.another()]
    lease, head = await store.ledger.acquire(ID, "server", LEASE_TTL)
    turns = [next_turn(head, f"request-{number}", output_ids=(number,)) for number in range(10)]
    outcomes = await asyncio.gather(
        *(ledgers[number % 2].commit(lease, turn) for number, turn in enumerate(turns)), return_exceptions=True
    )
    assert outcomes.count(None) == 1
    assert sum(isinstance(outcome, LeaseLost) for outcome in outcomes) == 9
    assert await store.ledger.turns(ID) == [turns[outcomes.index(None)]]


async def test_two_servers_can_sweep_at_once(store: LedgerUnderTest) -> None:
    """Each checkpoint of what expired is named by one of them, and no tombstone is swept away."""
    ids = [f"acme:{number}" for number in range(5)]
    for conversation_id in ids:
        await store.ledger.create(new_conversation(conversation_id))
        turn = await append(store.ledger, conversation_id)
        await store.ledger.point(conversation_id, 1, checkpoint_of(turn, conversation_id[-1]))
    await store.travel(CONVERSATION_TTL)
    swept = await asyncio.gather(store.ledger.sweep(), (await store.another()).sweep())
    assert sorted(checkpoint.checkpoint_id[0] for checkpoint in swept[0] + swept[1]) == list("01234")
    for conversation_id in ids:
        with pytest.raises(ConversationExpired):
            await store.ledger.get(conversation_id)


async def test_racing_creations_with_entries_mix_nothing(store: LedgerUnderTest) -> None:
    """Of many logs that begin under one id at once, one is there, with all its entries and none of the others'."""
    ledgers = [store.ledger, await store.another()]
    logs: list[list[Turn]] = []
    for number in range(8):
        turns = [next_turn(new_conversation(ID), output_ids=(number,), reply_id=f"resp_{number}")]
        turns += [next_turn(turns[0], output_ids=(number,))] * (number % 2)
        logs.append(turns)
    outcomes = await asyncio.gather(
        *(ledgers[number % 2].create(new_conversation(ID), turns) for number, turns in enumerate(logs)),
        return_exceptions=True,
    )
    assert outcomes.count(None) == 1
    winner = outcomes.index(None)
    assert await store.ledger.turns(ID) == logs[winner]
    for number, turns in enumerate(logs):
        found = await store.ledger.find_reply(ID, f"resp_{number}")
        assert found == (turns[0] if number == winner else None)


async def test_racing_points_name_each_checkpoint_once(store: LedgerUnderTest) -> None:
    """However servers record and drop at once, a checkpoint is either recorded or given out, and given out once."""
    await store.ledger.create(new_conversation(ID))
    turns = [await append(store.ledger, ID) for _ in range(4)]
    ledgers = [store.ledger, await store.another()]
    rng = random.Random(5)
    refs: dict[str, CheckpointRef] = {}

    async def point(number: int) -> list[CheckpointRef]:
        turn = rng.choice(turns)
        ref = msgspec.structs.replace(checkpoint_of(turn, "0"), checkpoint_id=f"{number:032x}")
        refs[ref.checkpoint_id] = ref
        drop = rng.sample(range(1, 5), rng.randrange(3))
        return await ledgers[number % 2].point(ID, turn.version, ref, drop)

    given_out = [ref for garbage in await asyncio.gather(*(point(number) for number in range(40))) for ref in garbage]
    recorded = list((await store.ledger.get(ID)).checkpoints.values())
    assert sorted(given_out + recorded, key=str) == sorted(refs.values(), key=str)


async def test_racing_updates_and_turns_lose_nothing(store: LedgerUnderTest) -> None:
    """Metadata written while turns are committed are all there in the end, and so are the turns."""
    await store.ledger.create(new_conversation(ID))
    other = await store.another()

    async def write() -> None:
        for _ in range(10):
            await append(store.ledger, ID)

    async def describe() -> None:
        for number in range(10):
            await other.update(ID, metadata={"number": str(number)})

    await asyncio.gather(write(), describe())
    head = await store.ledger.get(ID)
    assert (head.version, head.metadata) == (10, {"number": "9"})
    assert_one_chain(await store.ledger.turns(ID))


@pytest.mark.parametrize("seed", [1, 2])
async def test_fenced_writers_break_nothing(redis_ledger: RedisUnderTest, seed: int) -> None:
    """With leases shorter than the work, turns are lost to fencing, but what is acknowledged is there, in one chain."""
    await redis_ledger.ledger.create(new_conversation(ID))
    ledgers = [redis_ledger.ledger, await redis_ledger.another(), await redis_ledger.another()]
    rng = random.Random(seed)
    acknowledged: list[str] = []
    num_fenced = 0

    async def write(writer: int) -> None:
        nonlocal num_fenced
        ledger = ledgers[writer]
        for number in range(25):
            try:
                lease, head = await ledger.acquire(ID, f"writer-{writer}", 0.01)
            except ConversationBusy:
                await asyncio.sleep(0.004)
                continue
            await asyncio.sleep(rng.choice((0.0, 0.03)))
            request_id = f"{writer}-{number}"
            try:
                await ledger.commit(lease, next_turn(head, request_id, output_ids=(writer, number)))
                acknowledged.append(request_id)
            except LeaseLost:
                num_fenced += 1

    async with asyncio.timeout(60):
        await asyncio.gather(*(write(writer) for writer in range(3)))
    turns = await redis_ledger.ledger.turns(ID)
    assert_one_chain(turns)
    assert sorted(turn.request_id for turn in turns) == sorted(acknowledged)
    assert num_fenced > 0

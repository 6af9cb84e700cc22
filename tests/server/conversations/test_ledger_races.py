"""Several servers, one conversation: whatever the timing, the log stays one chain."""

from __future__ import annotations

import asyncio
import random

import pytest

from engine.token_chain import extend_digest, root_digest
from server.conversations.ledger import ConversationBusy, LeaseLost, Ledger, Turn
from tests.server.conversations.ledgers import (
    LEASE_TTL,
    LedgerUnderTest,
    RedisUnderTest,
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
            await ledger.release(lease)

    async with asyncio.timeout(60):
        await asyncio.gather(*(write(writer) for writer in range(8)))
    turns = await store.ledger.turns(ID)
    assert_one_chain(turns)
    assert [turn.request_id for turn in turns] == committed


async def test_racing_commits_under_one_lease_apply_once(store: LedgerUnderTest) -> None:
    """Of many different turns for one version exactly one is applied, and the others are told where the head is."""
    await store.ledger.create(new_conversation(ID))
    ledgers = [store.ledger, await store.another()]
    lease, head = await store.ledger.acquire(ID, "server", LEASE_TTL)
    turns = [next_turn(head, f"request-{number}", output_ids=(number,)) for number in range(10)]
    outcomes = await asyncio.gather(
        *(ledgers[number % 2].commit(lease, turn) for number, turn in enumerate(turns)), return_exceptions=True
    )
    assert outcomes.count(None) == 1
    assert await store.ledger.turns(ID) == [turns[outcomes.index(None)]]


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

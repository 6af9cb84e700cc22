"""What every ledger must do. Each test runs on each implementation."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from server.conversations.ledger import (
    ConversationBusy,
    ConversationExists,
    ConversationExpired,
    ConversationNotFound,
    LeaseLost,
    Ledger,
    VersionConflict,
)
from tests.server.conversations.ledgers import (
    CONVERSATION_TTL,
    DAY,
    LEASE_TTL,
    TOMBSTONE,
    LedgerUnderTest,
    append,
    checkpoint_of,
    new_conversation,
    next_turn,
)

ID = "acme:talk"


@pytest.fixture
async def ledger(store: LedgerUnderTest) -> Ledger:
    """A ledger that holds one conversation without turns."""
    await store.ledger.create(new_conversation(ID))
    return store.ledger


# -- conversations ----------------------------------------------------------------------------------------------------


async def test_a_conversation_comes_back_as_it_was_created(ledger: Ledger) -> None:
    """`get` returns every field that `create` was given."""
    assert await ledger.get(ID) == new_conversation(ID)


@pytest.mark.parametrize("conversation_id", ["a", "t:" + "x" * 128, "a}b{c", "../up", "*?[a]", "zwölf 12", "a%7Db"])
async def test_any_text_is_an_id(store: LedgerUnderTest, conversation_id: str) -> None:
    """Characters that mean something to a store are only characters in an id."""
    await store.ledger.create(new_conversation(conversation_id))
    await append(store.ledger, conversation_id)
    await store.travel(CONVERSATION_TTL)
    await store.ledger.sweep()
    with pytest.raises(ConversationExpired):
        await store.ledger.get(conversation_id)


async def test_an_unknown_conversation_is_not_found(ledger: Ledger) -> None:
    """Everything but `point`, `renew` and `release` says so; none of them starts a conversation."""
    for call in (ledger.get, ledger.turns, ledger.delete):
        with pytest.raises(ConversationNotFound):
            await call("acme:other")
    with pytest.raises(ConversationNotFound):
        await ledger.acquire("acme:other", "server", LEASE_TTL)


async def test_an_id_is_taken_once(ledger: Ledger) -> None:
    """A second `create` raises, and changes nothing."""
    await append(ledger, ID)
    with pytest.raises(ConversationExists):
        await ledger.create(new_conversation(ID))
    assert (await ledger.get(ID)).version == 1


async def test_of_many_creations_one_succeeds(store: LedgerUnderTest) -> None:
    """Servers that create one id at the same time agree on who did."""
    ledgers = [store.ledger, await store.another()] * 5
    outcomes = await asyncio.gather(
        *(ledger.create(new_conversation(ID)) for ledger in ledgers), return_exceptions=True
    )
    assert outcomes.count(None) == 1
    assert sum(isinstance(outcome, ConversationExists) for outcome in outcomes) == 9


async def test_a_conversation_expires_and_leaves_a_tombstone(store: LedgerUnderTest, ledger: Ledger) -> None:
    """After its time to live a conversation answers that it expired, before a sweep and after it."""
    await append(ledger, ID)
    await store.travel(CONVERSATION_TTL - 1)
    assert (await ledger.get(ID)).version == 1
    await store.travel(1)
    for _ in ("before the sweep", "after it"):
        for call in (ledger.get, ledger.turns, ledger.delete):
            with pytest.raises(ConversationExpired):
                await call(ID)
        with pytest.raises(ConversationExpired):
            await ledger.acquire(ID, "server", LEASE_TTL)
        with pytest.raises(ConversationExpired):
            await ledger.create(new_conversation(ID))
        await ledger.sweep()


async def test_a_tombstone_ends(store: LedgerUnderTest, ledger: Ledger) -> None:
    """A week after the conversation expired its id is free again, and nothing of it is left."""
    await append(ledger, ID)
    await store.travel(CONVERSATION_TTL + TOMBSTONE - 1)
    await ledger.sweep()
    with pytest.raises(ConversationExpired):
        await ledger.get(ID)
    await store.travel(1.5)
    await ledger.sweep()
    with pytest.raises(ConversationNotFound):
        await ledger.get(ID)
    await ledger.create(new_conversation(ID))
    assert await ledger.turns(ID) == []


async def test_a_turn_renews_the_time_to_live(store: LedgerUnderTest, ledger: Ledger) -> None:
    """The time to live slides: it begins anew with each turn, and only with a turn."""
    await store.travel(CONVERSATION_TTL - DAY)
    await append(ledger, ID)
    await store.travel(CONVERSATION_TTL - DAY)
    await ledger.get(ID)
    assert await ledger.sweep() == []
    assert (await ledger.get(ID)).version == 1
    await store.travel(DAY)
    with pytest.raises(ConversationExpired):
        await ledger.get(ID)


async def test_no_conversation_expires_under_its_turn(store: LedgerUnderTest, ledger: Ledger) -> None:
    """A lease keeps a conversation alive for as long as it lasts, also from the sweep."""
    await store.travel(CONVERSATION_TTL - 1)
    lease, head = await ledger.acquire(ID, "server", LEASE_TTL)
    await store.travel(LEASE_TTL - 1)
    await ledger.renew(lease)
    await store.travel(LEASE_TTL - 1)
    assert await ledger.sweep() == []
    await ledger.commit(lease, next_turn(head))
    assert (await ledger.get(ID)).version == 1


async def test_a_conversation_past_its_time_ends_with_its_lease(store: LedgerUnderTest, ledger: Ledger) -> None:
    """A turn that is given up does not prolong the conversation."""
    await store.travel(CONVERSATION_TTL - 1)
    lease, head = await ledger.acquire(ID, "server", LEASE_TTL)
    await store.travel(2)
    assert await ledger.get(ID) == head
    await ledger.release(lease)
    with pytest.raises(ConversationExpired):
        await ledger.get(ID)


async def test_delete_returns_the_last_head_and_leaves_a_tombstone(store: LedgerUnderTest, ledger: Ledger) -> None:
    """A deleted conversation is gone at once, its id stays taken for a week."""
    turn = await append(ledger, ID)
    await ledger.point(ID, 1, checkpoint_of(turn, "a"))
    head = await ledger.get(ID)
    assert await ledger.delete(ID) == head
    for call in (ledger.get, ledger.turns, ledger.delete):
        with pytest.raises(ConversationExpired):
            await call(ID)
    with pytest.raises(ConversationExpired):
        await ledger.create(new_conversation(ID))
    await store.travel(TOMBSTONE + 0.5)
    await ledger.sweep()
    await ledger.create(new_conversation(ID))


async def test_a_running_turn_cannot_commit_to_a_deleted_conversation(ledger: Ledger) -> None:
    """Deleting takes the lease away."""
    lease, head = await ledger.acquire(ID, "server", LEASE_TTL)
    await ledger.delete(ID)
    with pytest.raises(LeaseLost):
        await ledger.commit(lease, next_turn(head))
    with pytest.raises(LeaseLost):
        await ledger.renew(lease)
    await ledger.release(lease)
    with pytest.raises(ConversationExpired):
        await ledger.get(ID)


async def test_sweep_returns_the_checkpoints_of_what_expired(store: LedgerUnderTest, ledger: Ledger) -> None:
    """Only conversations that expired are swept, and each of their checkpoints is named once."""
    turn = await append(ledger, ID)
    checkpoint = checkpoint_of(turn, "a")
    await ledger.point(ID, 1, checkpoint)
    await ledger.create(new_conversation("acme:without"))
    await ledger.create(new_conversation("acme:lasting", ttl_seconds=2 * CONVERSATION_TTL))
    await append(ledger, "acme:lasting")
    await store.travel(CONVERSATION_TTL)
    assert await ledger.sweep() == [checkpoint]
    assert await ledger.sweep() == []
    assert (await ledger.get("acme:lasting")).version == 1


# -- turns ------------------------------------------------------------------------------------------------------------


async def test_turns_come_back_in_order_and_unchanged(ledger: Ledger) -> None:
    """The log is exactly what was committed; the head is its last entry."""
    committed = [await append(ledger, ID, f"request-{number}") for number in range(12)]
    assert await ledger.turns(ID) == committed
    head = await ledger.get(ID)
    assert (head.version, head.chain, head.num_tokens) == (12, committed[-1].chain, committed[-1].num_tokens)


@pytest.mark.parametrize("after_version", [0, 1, 4, 5, 6])
async def test_turns_after_a_version(ledger: Ledger, after_version: int) -> None:
    """`after_version` leaves out that many turns from the beginning; too many is none."""
    committed = [await append(ledger, ID) for _ in range(5)]
    assert await ledger.turns(ID, after_version) == committed[after_version:]


async def test_a_turn_must_follow_the_head(ledger: Ledger) -> None:
    """A turn built on another version is refused with the version where the head is, and nothing is written."""
    first = await append(ledger, ID)
    lease, head = await ledger.acquire(ID, "server", LEASE_TTL)
    for version in (1, 3):
        turn = msgspec.structs.replace(next_turn(head), version=version, request_id="other")
        with pytest.raises(VersionConflict) as refusal:
            await ledger.commit(lease, turn)
        assert (refusal.value.expected, refusal.value.version) == (version - 1, 1)
    assert await ledger.turns(ID) == [first]
    await ledger.commit(lease, next_turn(head))


async def test_one_lease_can_commit_several_turns(ledger: Ledger) -> None:
    """A commit keeps the lease."""
    lease, head = await ledger.acquire(ID, "server", LEASE_TTL)
    first = next_turn(head)
    await ledger.commit(lease, first)
    with pytest.raises(ConversationBusy):
        await ledger.acquire(ID, "other", LEASE_TTL)
    await ledger.commit(lease, next_turn(first))
    assert (await ledger.get(ID)).version == 2


async def test_a_repeated_commit_is_the_same_commit(store: LedgerUnderTest, ledger: Ledger) -> None:
    """A commit whose reply was lost can be asked for again, even when the lease has ended, and applies once."""
    lease, head = await ledger.acquire(ID, "server", LEASE_TTL)
    turn = next_turn(head)
    await ledger.commit(lease, turn)
    await ledger.commit(lease, turn)
    await store.travel(LEASE_TTL)
    await ledger.commit(lease, turn)
    assert await ledger.turns(ID) == [turn]


async def test_another_turn_of_the_same_version_is_no_repetition(ledger: Ledger) -> None:
    """The same tokens under another request, or other tokens under the same request, are another turn."""
    lease, head = await ledger.acquire(ID, "server", LEASE_TTL)
    await ledger.commit(lease, next_turn(head, "request"))
    for turn in (next_turn(head, "other"), next_turn(head, "request", output_ids=(8,))):
        with pytest.raises(VersionConflict):
            await ledger.commit(lease, turn)


# -- leases -----------------------------------------------------------------------------------------------------------


async def test_acquire_reads_the_head(ledger: Ledger) -> None:
    """The head that comes with a lease is the newest one."""
    await append(ledger, ID)
    lease, head = await ledger.acquire(ID, "server", LEASE_TTL)
    assert head == await ledger.get(ID)
    assert (lease.conversation_id, lease.owner, lease.ttl_seconds) == (ID, "server", LEASE_TTL)


async def test_a_second_acquire_is_told_how_long_to_wait(store: LedgerUnderTest, ledger: Ledger) -> None:
    """While a lease lasts nobody else gets one, not even the same owner."""
    await ledger.acquire(ID, "server", LEASE_TTL)
    await store.travel(5)
    for owner in ("other", "server"):
        with pytest.raises(ConversationBusy) as busy:
            await (await store.another()).acquire(ID, owner, LEASE_TTL)
        assert 0 < busy.value.retry_after_seconds <= LEASE_TTL - 5


async def test_leases_of_two_conversations_are_independent(ledger: Ledger) -> None:
    """A busy conversation keeps no other one busy."""
    await ledger.create(new_conversation("acme:other"))
    await ledger.acquire(ID, "server", LEASE_TTL)
    await ledger.acquire("acme:other", "server", LEASE_TTL)


async def test_a_released_conversation_is_free(ledger: Ledger) -> None:
    """After `release` the next lease is granted at once, with a higher fence."""
    first, _ = await ledger.acquire(ID, "server", LEASE_TTL)
    await ledger.release(first)
    second, _ = await ledger.acquire(ID, "other", LEASE_TTL)
    assert second.fence > first.fence


async def test_release_is_idempotent_and_spares_the_next_lease(ledger: Ledger) -> None:
    """A lease that is given back twice, or too late, takes nothing from its successor."""
    first, _ = await ledger.acquire(ID, "server", LEASE_TTL)
    await ledger.release(first)
    await ledger.release(first)
    second, head = await ledger.acquire(ID, "other", LEASE_TTL)
    await ledger.release(first)
    with pytest.raises(ConversationBusy):
        await ledger.acquire(ID, "third", LEASE_TTL)
    await ledger.commit(second, next_turn(head))


async def test_a_released_lease_cannot_be_used(ledger: Ledger) -> None:
    """Who gave a lease back neither commits nor renews with it."""
    lease, head = await ledger.acquire(ID, "server", LEASE_TTL)
    await ledger.release(lease)
    with pytest.raises(LeaseLost):
        await ledger.renew(lease)
    with pytest.raises(LeaseLost):
        await ledger.commit(lease, next_turn(head))


async def test_an_ended_lease_is_taken_over_and_its_holder_fenced(store: LedgerUnderTest, ledger: Ledger) -> None:
    """When a lease has ended another server takes the conversation; the first one's commit writes nothing."""
    lost, head = await ledger.acquire(ID, "sleeper", LEASE_TTL)
    await store.travel(LEASE_TTL)
    other = await store.another()
    lease, _ = await other.acquire(ID, "other", LEASE_TTL)
    assert lease.fence > lost.fence
    with pytest.raises(LeaseLost):
        await ledger.commit(lost, next_turn(head, "of the sleeper"))
    with pytest.raises(LeaseLost):
        await ledger.renew(lost)
    await ledger.release(lost)
    assert await ledger.get(ID) == head
    turn = next_turn(head, "of the other")
    await other.commit(lease, turn)
    with pytest.raises((LeaseLost, VersionConflict)):
        await ledger.commit(lost, next_turn(head, "of the sleeper"))
    assert await ledger.turns(ID) == [turn]


async def test_an_ended_lease_is_lost_even_if_nobody_took_it(store: LedgerUnderTest, ledger: Ledger) -> None:
    """A commit that arrives after its lease writes nothing: an unknown outcome cannot change after that."""
    lease, head = await ledger.acquire(ID, "server", LEASE_TTL)
    await store.travel(LEASE_TTL)
    with pytest.raises(LeaseLost):
        await ledger.commit(lease, next_turn(head))
    with pytest.raises(LeaseLost):
        await ledger.renew(lease)
    assert (await ledger.get(ID)).version == 0


async def test_a_renewed_lease_lasts(store: LedgerUnderTest, ledger: Ledger) -> None:
    """`renew` counts from now."""
    lease, head = await ledger.acquire(ID, "server", LEASE_TTL)
    for _ in range(3):
        await store.travel(LEASE_TTL - 1)
        await ledger.renew(lease)
    await store.travel(LEASE_TTL - 1)
    await ledger.commit(lease, next_turn(head))


async def test_a_cancelled_acquire_leaves_no_lease(store: LedgerUnderTest, ledger: Ledger) -> None:
    """A client that goes away while its turn begins does not keep its conversation busy."""
    for pauses in range(6):
        task = asyncio.create_task(ledger.acquire(ID, "gone", LEASE_TTL))
        for _ in range(pauses):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with asyncio.timeout(10):
            while True:
                try:
                    lease, _ = await ledger.acquire(ID, "next", LEASE_TTL)
                    break
                except ConversationBusy:
                    await asyncio.sleep(0.01)
        await ledger.release(lease)


# -- checkpoints ------------------------------------------------------------------------------------------------------


async def test_point_records_the_newest_checkpoint(ledger: Ledger) -> None:
    """A newer checkpoint replaces the recorded one, whose name is returned."""
    first, second = await append(ledger, ID), await append(ledger, ID)
    assert await ledger.point(ID, 1, checkpoint_of(first, "a")) is None
    assert await ledger.point(ID, 2, checkpoint_of(second, "b")) == checkpoint_of(first, "a")
    head = await ledger.get(ID)
    assert (head.checkpoint, head.checkpoint_version) == (checkpoint_of(second, "b"), 2)


async def test_a_checkpoint_that_comes_too_late_is_returned(ledger: Ledger) -> None:
    """An older or equally old checkpoint does not replace the recorded one."""
    first, second = await append(ledger, ID), await append(ledger, ID)
    await ledger.point(ID, 2, checkpoint_of(second, "b"))
    assert await ledger.point(ID, 1, checkpoint_of(first, "a")) == checkpoint_of(first, "a")
    assert await ledger.point(ID, 2, checkpoint_of(second, "c")) == checkpoint_of(second, "c")
    assert (await ledger.get(ID)).checkpoint == checkpoint_of(second, "b")


async def test_a_repeated_point_returns_nothing_to_delete(ledger: Ledger) -> None:
    """Pointing again to the recorded checkpoint must not give its own blob away."""
    turn = await append(ledger, ID)
    for _ in range(2):
        assert await ledger.point(ID, 1, checkpoint_of(turn, "a")) is None


async def test_a_checkpoint_of_another_history_is_refused(ledger: Ledger) -> None:
    """A state whose chain is not that of the named turn never becomes a conversation's state."""
    first, second = await append(ledger, ID), await append(ledger, ID)
    elsewhere = checkpoint_of(next_turn(first, output_ids=(9,)), "e")
    for version, checkpoint in ((2, elsewhere), (2, checkpoint_of(first, "f")), (3, checkpoint_of(second, "f"))):
        assert await ledger.point(ID, version, checkpoint) == checkpoint
    assert (await ledger.get(ID)).checkpoint is None


async def test_point_needs_no_lease_and_respects_none(ledger: Ledger) -> None:
    """Checkpoints are written behind: a turn that runs meanwhile is not disturbed."""
    turn = await append(ledger, ID)
    lease, head = await ledger.acquire(ID, "server", LEASE_TTL)
    assert await ledger.point(ID, 1, checkpoint_of(turn, "a")) is None
    await ledger.commit(lease, next_turn(head))
    assert (await ledger.get(ID)).checkpoint_version == 1


async def test_the_checkpoint_of_a_conversation_that_is_gone_is_returned(
    store: LedgerUnderTest, ledger: Ledger
) -> None:
    """What belongs to an unknown, expired or deleted conversation is to be deleted."""
    turn = await append(ledger, ID)
    checkpoint = checkpoint_of(turn, "a")
    assert await ledger.point("acme:other", 1, checkpoint) == checkpoint
    await store.travel(CONVERSATION_TTL)
    assert await ledger.point(ID, 1, checkpoint) == checkpoint
    await ledger.sweep()
    assert await ledger.point(ID, 1, checkpoint) == checkpoint

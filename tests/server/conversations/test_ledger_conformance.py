"""What every ledger must do. Each test runs on each implementation."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from engine.messages import CheckpointRef
from server.conversations.ledger import (
    ConversationBusy,
    ConversationExists,
    ConversationExpired,
    ConversationNotFound,
    DocumentNotFound,
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
    document,
    full_turn,
    marker,
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
    for call in (ledger.get, ledger.turns, ledger.delete, ledger.update):
        with pytest.raises(ConversationNotFound):
            await call("acme:other")
    with pytest.raises(ConversationNotFound):
        await ledger.acquire("acme:other", "server", LEASE_TTL)
    with pytest.raises(ConversationNotFound):
        await ledger.find_reply("acme:other", "resp_1")
    with pytest.raises(ConversationNotFound):
        await ledger.get("acme:other")


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
        for call in (ledger.get, ledger.turns, ledger.delete, ledger.update):
            with pytest.raises(ConversationExpired):
                await call(ID)
        with pytest.raises(ConversationExpired):
            await ledger.find_reply(ID, "resp_1")
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
    checkpoints = []
    for version, digit in ((1, "a"), (2, "b")):
        checkpoints.append(checkpoint_of(await append(ledger, ID), digit))
        await ledger.point(ID, version, checkpoints[-1])
    await ledger.create(new_conversation("acme:without"))
    await ledger.create(new_conversation("acme:lasting", ttl_seconds=2 * CONVERSATION_TTL))
    await append(ledger, "acme:lasting")
    await store.travel(CONVERSATION_TTL)
    assert sorted(await ledger.sweep(), key=str) == sorted(checkpoints, key=str)
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
        turn = msgspec.structs.replace(next_turn(head), version=version, parent_version=version - 1, request_id="other")
        with pytest.raises(VersionConflict) as refusal:
            await ledger.commit(lease, turn)
        assert (refusal.value.expected, refusal.value.version) == (version - 1, 1)
    assert await ledger.turns(ID) == [first]
    await ledger.commit(lease, next_turn(head))


async def test_a_commit_ends_the_lease(ledger: Ledger) -> None:
    """After a commit the conversation can be acquired at once, and the lease is good for nothing more."""
    lease, head = await ledger.acquire(ID, "server", LEASE_TTL)
    first = next_turn(head)
    await ledger.commit(lease, first)
    with pytest.raises(LeaseLost):
        await ledger.commit(lease, next_turn(first))
    with pytest.raises(LeaseLost):
        await ledger.renew(lease)
    second, head = await ledger.acquire(ID, "other", LEASE_TTL)
    await ledger.release(lease)
    await ledger.commit(second, next_turn(head))
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
    others = (next_turn(head, "other"), next_turn(head, "request", output_ids=(8,)))
    for turn in others:
        with pytest.raises(LeaseLost):
            await ledger.commit(lease, turn)
    lease, _ = await ledger.acquire(ID, "server", LEASE_TTL)
    for turn in others:
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


# -- logs that begin with entries -------------------------------------------------------------------------------------


async def test_a_log_can_begin_with_entries(ledger: Ledger) -> None:
    """`create` with entries makes a log as if they had been committed one by one, and it goes on from there."""
    first = full_turn(new_conversation())
    second = next_turn(first, "second", reply_id="resp_2")
    third = marker(second, first)
    source = msgspec.structs.replace(
        new_conversation("acme:fork"), version=9, num_tokens=99, checkpoints={9: checkpoint_of(second, "a")}
    )
    await ledger.create(source, [first, second, third])
    assert await ledger.get("acme:fork") == msgspec.structs.replace(
        source, version=3, chain=first.chain, num_tokens=first.num_tokens, checkpoints={}
    )
    assert await ledger.turns("acme:fork") == [first, second, third]
    assert await ledger.find_reply("acme:fork", "resp_2") == second
    lease, _ = await ledger.acquire("acme:fork", "server", LEASE_TTL)
    await ledger.commit(lease, third)  # is there already
    await ledger.release(lease)
    fourth = await append(ledger, "acme:fork", "fourth")
    assert await ledger.turns("acme:fork", 2) == [third, fourth]


async def test_only_the_first_entries_begin_a_log(ledger: Ledger) -> None:
    """Entries that begin later or leave one out are refused, and nothing is created."""
    first = next_turn(new_conversation())
    second = next_turn(first)
    for turns in ([second], [first, next_turn(second)], [first, first]):
        with pytest.raises(ValueError, match="versions"):
            await ledger.create(new_conversation("acme:fork"), turns)
    with pytest.raises(ConversationNotFound):
        await ledger.get("acme:fork")


async def test_a_taken_id_gets_no_entries(ledger: Ledger) -> None:
    """`create` with entries on a log that exists leaves that log alone."""
    with pytest.raises(ConversationExists):
        await ledger.create(new_conversation(ID), [next_turn(new_conversation())])
    assert await ledger.turns(ID) == []


# -- updates ----------------------------------------------------------------------------------------------------------


async def test_update_replaces_the_metadata(store: LedgerUnderTest, ledger: Ledger) -> None:
    """All of the metadata is replaced, nothing else is, and the time to live goes on."""
    await append(ledger, ID)
    head = await ledger.get(ID)
    await store.travel(DAY)
    for metadata in ({"a": "1", "b": "Ä"}, {"c": ""}, {}):
        updated = await ledger.update(ID, metadata=metadata)
        assert updated == msgspec.structs.replace(head, metadata=metadata)
        assert await ledger.get(ID) == updated
    assert await ledger.update(ID) == updated
    await store.travel(CONVERSATION_TTL - DAY)
    with pytest.raises(ConversationExpired):
        await ledger.get(ID)


@pytest.mark.parametrize("ttl_seconds", [DAY / 2, 3 * CONVERSATION_TTL])
async def test_update_replaces_the_time_to_live(store: LedgerUnderTest, ledger: Ledger, ttl_seconds: float) -> None:
    """The new time to live begins at once, and holds for later turns; the tombstone comes after it."""
    turn = await append(ledger, ID)
    head = await ledger.get(ID)
    await store.travel(DAY)
    assert await ledger.update(ID, ttl_seconds=ttl_seconds) == msgspec.structs.replace(head, ttl_seconds=ttl_seconds)
    await store.travel(ttl_seconds - 1)
    lease, head = await ledger.acquire(ID, "server", LEASE_TTL)
    await ledger.commit(lease, next_turn(turn))
    await store.travel(ttl_seconds - 1)
    assert (await ledger.get(ID)).version == 2
    assert len(await ledger.turns(ID)) == 2
    await store.travel(1)
    with pytest.raises(ConversationExpired):
        await ledger.update(ID, ttl_seconds=ttl_seconds)


async def test_update_does_not_disturb_a_turn(ledger: Ledger) -> None:
    """The holder of the lease commits as if nothing had been updated."""
    lease, head = await ledger.acquire(ID, "server", LEASE_TTL)
    await ledger.update(ID, metadata={"a": "1"}, ttl_seconds=DAY)
    await ledger.commit(lease, next_turn(head))
    updated = await ledger.get(ID)
    assert (updated.version, updated.metadata, updated.ttl_seconds) == (1, {"a": "1"}, DAY)


# -- entries ----------------------------------------------------------------------------------------------------------


async def test_entries_keep_everything_they_carry(ledger: Ledger) -> None:
    """Items, answers, the texts around them and the reply come back as they were committed."""
    lease, head = await ledger.acquire(ID, "server", LEASE_TTL)
    turn = full_turn(head)
    await ledger.commit(lease, turn)
    assert await ledger.turns(ID) == [turn]


async def test_entries_form_a_tree(ledger: Ledger) -> None:
    """A marker takes the head back to an earlier entry, or to the empty history, and later entries continue there."""
    root = await ledger.get(ID)
    first, second = await append(ledger, ID), await append(ledger, ID)
    committed = [first, second]
    for parent in (first, root):
        lease, head = await ledger.acquire(ID, "server", LEASE_TTL)
        committed.append(marker(head, parent, f"back to {parent.version}"))
        await ledger.commit(lease, committed[-1])
        head = await ledger.get(ID)
        assert (head.version, head.chain, head.num_tokens) == (len(committed), parent.chain, parent.num_tokens)
    committed.append(await append(ledger, ID))
    assert await ledger.turns(ID) == committed


async def test_an_entry_that_names_no_parent_continues_the_one_before(ledger: Ledger) -> None:
    """The parent that -1 stands for is named when the entry is read."""
    lease, head = await ledger.acquire(ID, "server", LEASE_TTL)
    turn = next_turn(head)
    await ledger.commit(lease, msgspec.structs.replace(turn, parent_version=-1))
    assert await ledger.turns(ID) == [turn]


@pytest.mark.parametrize("parent_version", [1, 2, -2])
async def test_a_parent_comes_before_its_entry(ledger: Ledger, parent_version: int) -> None:
    """An entry that would continue itself, a later one or none at all is not written."""
    lease, head = await ledger.acquire(ID, "server", LEASE_TTL)
    with pytest.raises(ValueError, match="parent"):
        await ledger.commit(lease, msgspec.structs.replace(next_turn(head), parent_version=parent_version))
    assert await ledger.turns(ID) == []


async def test_a_reply_is_found_by_its_id(ledger: Ledger) -> None:
    """Each reply leads to its entry, in its own log only; no id finds the entries without one."""
    await append(ledger, ID)
    committed = {reply_id: await append(ledger, ID, reply_id, reply_id) for reply_id in ("resp_1", "resp_2", "Ä}:*")}
    for reply_id, turn in committed.items():
        assert await ledger.find_reply(ID, reply_id) == turn
    await ledger.create(new_conversation("acme:other"))
    assert await ledger.find_reply("acme:other", "resp_1") is None
    assert await ledger.find_reply(ID, "resp_3") is None
    assert await ledger.find_reply(ID, "") is None


async def test_the_reply_of_a_refused_turn_is_not_found(store: LedgerUnderTest, ledger: Ledger) -> None:
    """A fenced commit writes no reply either."""
    lease, head = await ledger.acquire(ID, "server", LEASE_TTL)
    await store.travel(LEASE_TTL)
    with pytest.raises(LeaseLost):
        await ledger.commit(lease, next_turn(head, reply_id="resp_1"))
    assert await ledger.find_reply(ID, "resp_1") is None


async def test_replies_are_buried_with_their_log(store: LedgerUnderTest, ledger: Ledger) -> None:
    """A log that takes the id of a buried one later does not find its replies."""
    await append(ledger, ID, reply_id="resp_1")
    await ledger.delete(ID)
    await store.travel(TOMBSTONE + 0.5)
    await ledger.sweep()
    await ledger.create(new_conversation(ID))
    assert await ledger.find_reply(ID, "resp_1") is None


# -- checkpoints ------------------------------------------------------------------------------------------------------


async def checkpoints_of(ledger: Ledger) -> dict[int, CheckpointRef]:
    """Return the recorded checkpoints."""
    return (await ledger.get(ID)).checkpoints


async def test_a_log_has_several_checkpoints(ledger: Ledger) -> None:
    """Each entry can have a checkpoint, recorded in any order; the head names all of them, oldest first."""
    turns = [await append(ledger, ID) for _ in range(12)]
    for version, digit in ((11, "b"), (2, "a"), (12, "c")):
        assert await ledger.point(ID, version, checkpoint_of(turns[version - 1], digit)) == []
    checkpoints = await checkpoints_of(ledger)
    assert checkpoints == {
        version: checkpoint_of(turns[version - 1], digit) for version, digit in ((2, "a"), (11, "b"), (12, "c"))
    }
    assert list(checkpoints) == [2, 11, 12]
    _, head = await ledger.acquire(ID, "server", LEASE_TTL)
    assert head.checkpoints == checkpoints
    assert (await ledger.delete(ID)).checkpoints == checkpoints


async def test_point_forgets_what_is_dropped(ledger: Ledger) -> None:
    """The checkpoints of the dropped versions are forgotten and returned; versions without one are passed over."""
    refs = {version: checkpoint_of(await append(ledger, ID), str(version)) for version in range(1, 6)}
    for version in (1, 2, 3):
        await ledger.point(ID, version, refs[version])
    garbage = await ledger.point(ID, 4, refs[4], drop={1, 3, 5, 77})
    assert sorted(garbage, key=str) == [refs[1], refs[3]]
    assert await checkpoints_of(ledger) == {2: refs[2], 4: refs[4]}
    assert await ledger.point(ID, 5, refs[5], drop=[2]) == [refs[2]]
    assert await checkpoints_of(ledger) == {4: refs[4], 5: refs[5]}


async def test_a_version_has_one_checkpoint(ledger: Ledger) -> None:
    """A second checkpoint of an entry takes the place of the first, which is returned, dropped or not."""
    turn = await append(ledger, ID)
    for drop in ((), (1,)):
        await ledger.point(ID, 1, checkpoint_of(turn, "a"))
        assert await ledger.point(ID, 1, checkpoint_of(turn, "b"), drop) == [checkpoint_of(turn, "a")]
        assert await checkpoints_of(ledger) == {1: checkpoint_of(turn, "b")}


async def test_a_repeated_point_returns_nothing_to_delete(ledger: Ledger) -> None:
    """Pointing again to a recorded checkpoint must not give its own blob away, nor must dropping its version."""
    turn = await append(ledger, ID)
    for drop in ((), (), (1,)):
        assert await ledger.point(ID, 1, checkpoint_of(turn, "a"), drop) == []
    assert await checkpoints_of(ledger) == {1: checkpoint_of(turn, "a")}


async def test_a_checkpoint_is_returned_when_nothing_names_it_any_more(store: LedgerUnderTest, ledger: Ledger) -> None:
    """Two entries of one history may share a state: it is garbage when both have forgotten it, and swept once."""
    turn = await append(ledger, ID)
    shared = checkpoint_of(turn, "a")
    for _ in range(2):
        lease, head = await ledger.acquire(ID, "server", LEASE_TTL)
        await ledger.commit(lease, marker(head, turn, f"marker-{head.version}"))
    await ledger.point(ID, 1, shared)
    assert await ledger.point(ID, 2, shared, drop=[1]) == []
    await ledger.point(ID, 3, shared)
    assert await ledger.point(ID, 4, shared) == []  # there is no entry 4, but it is still named
    assert await ledger.point(ID, 3, checkpoint_of(turn, "b")) == []
    assert await checkpoints_of(ledger) == {2: shared, 3: checkpoint_of(turn, "b")}
    assert await ledger.point(ID, 1, checkpoint_of(turn, "c"), drop=[2]) == [shared]
    await ledger.point(ID, 2, checkpoint_of(turn, "c"))
    await store.travel(CONVERSATION_TTL)
    assert sorted(await ledger.sweep(), key=str) == [checkpoint_of(turn, "b"), checkpoint_of(turn, "c")]


async def test_a_checkpoint_of_another_history_is_refused(ledger: Ledger) -> None:
    """A state whose chain is not that of the named entry never becomes a conversation's state; nothing is dropped."""
    first, second = await append(ledger, ID), await append(ledger, ID)
    await ledger.point(ID, 1, checkpoint_of(first, "a"))
    elsewhere = checkpoint_of(next_turn(first, output_ids=(9,)), "e")
    for version, checkpoint in (
        (2, elsewhere),
        (2, checkpoint_of(first, "f")),
        (3, checkpoint_of(second, "f")),
        (0, checkpoint_of(second, "f")),
        (-1, checkpoint_of(first, "f")),
    ):
        assert await ledger.point(ID, version, checkpoint, drop=[1]) == [checkpoint]
    assert await checkpoints_of(ledger) == {1: checkpoint_of(first, "a")}


async def test_point_needs_no_lease_and_respects_none(ledger: Ledger) -> None:
    """Checkpoints are written behind: a turn that runs meanwhile is not disturbed."""
    turn = await append(ledger, ID)
    lease, head = await ledger.acquire(ID, "server", LEASE_TTL)
    assert await ledger.point(ID, 1, checkpoint_of(turn, "a")) == []
    await ledger.commit(lease, next_turn(head))
    assert await checkpoints_of(ledger) == {1: checkpoint_of(turn, "a")}


async def test_the_checkpoint_of_a_conversation_that_is_gone_is_returned(
    store: LedgerUnderTest, ledger: Ledger
) -> None:
    """What belongs to an unknown, expired or deleted conversation is to be deleted."""
    turn = await append(ledger, ID)
    checkpoint = checkpoint_of(turn, "a")
    assert await ledger.point("acme:other", 1, checkpoint) == [checkpoint]
    await ledger.point(ID, 1, checkpoint_of(turn, "b"))
    await store.travel(CONVERSATION_TTL)
    assert await ledger.point(ID, 1, checkpoint, drop=[1]) == [checkpoint]
    assert await ledger.sweep() == [checkpoint_of(turn, "b")]
    assert await ledger.point(ID, 1, checkpoint) == [checkpoint]


# -- documents --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "x" * 300, "a}b{c", "../up", "*?[a]", "zwölf 12", "a%7Db", "a:b", "", "\0"])
async def test_any_text_names_a_document(store: LedgerUnderTest, name: str) -> None:
    """Characters that mean something to a store are only characters in a kind and in an id."""
    ledger = store.ledger
    ours, other = document(name, b"\x00\xff", kind=name), document(name, b"other", kind="x" + name)
    for put in (ours, other):
        assert await ledger.put_document(put)
    assert await ledger.get_document(name, name) == ours
    assert await ledger.documents(name) == [ours]
    assert await ledger.delete_document(name, name)
    assert await ledger.get_document(name, name) is None
    assert await ledger.documents("x" + name) == [other]


async def test_there_is_no_unknown_document(store: LedgerUnderTest) -> None:
    """Reading and deleting say so; only a list that is to begin behind it is an error."""
    ledger = store.ledger
    await ledger.put_document(document("known"))
    await ledger.put_document(document("unknown", kind="other"))
    assert await ledger.get_document("completion", "unknown") is None
    assert not await ledger.delete_document("completion", "unknown")
    assert await ledger.documents("none") == []
    for newest_first in (False, True):
        with pytest.raises(DocumentNotFound):
            await ledger.documents("completion", after="unknown", newest_first=newest_first)


async def test_a_document_is_replaced_as_a_whole(store: LedgerUnderTest) -> None:
    """The body, the place in the list and the time to live are those of the newest."""
    ledger = store.ledger
    await ledger.put_document(document("a", b"1", created_at=1.0, ttl_seconds=10))
    await ledger.put_document(document("b", b"2", created_at=2.0))
    newer = document("a", b"3", created_at=3.0)
    assert await ledger.put_document(newer)
    await store.travel(11)
    assert [found.document_id for found in await ledger.documents("completion")] == ["b", "a"]
    assert await ledger.get_document("completion", "a") == newer


async def test_a_document_that_must_be_absent(store: LedgerUnderTest) -> None:
    """`if_absent` writes where there is none, or none any more, and leaves what is there alone."""
    ledger = store.ledger
    for put in (document("a", b"1"), document("a", b"2")):
        assert await ledger.put_document(put, if_absent=True) is (put.body == b"1")
    assert (await ledger.documents("completion"))[0].body == b"1"
    await store.travel(DAY)
    assert await ledger.put_document(document("a", b"3"), if_absent=True)
    await ledger.delete_document("completion", "a")
    assert await ledger.put_document(document("a", b"4"), if_absent=True)


async def test_a_document_expires(store: LedgerUnderTest) -> None:
    """After its time to live a document is nowhere, before a sweep and after it."""
    ledger = store.ledger
    lasting = document("lasting", ttl_seconds=2 * DAY)
    await ledger.put_document(document("short"))
    await ledger.put_document(lasting)
    await store.travel(DAY - 1)
    assert await ledger.get_document("completion", "short") == document("short")
    await store.travel(1)
    for _ in ("before the sweep", "after it"):
        assert await ledger.get_document("completion", "short") is None
        assert await ledger.documents("completion") == [lasting]
        with pytest.raises(DocumentNotFound):
            await ledger.documents("completion", after="short")
        assert not await ledger.delete_document("completion", "short")
        assert await ledger.sweep() == []


async def test_documents_are_listed_in_order_of_creation(store: LedgerUnderTest) -> None:
    """By time, then by id as code points; pages from either end meet without gaps, whatever has expired between."""
    ledger = store.ledger
    ids = ["b", "é", "a%", "a", "Z", "10", "9", "😀", "\uffff"]
    expected = [(1.5, id_) for id_ in sorted(ids)] + [(1_700_000_000.25, "c"), (1_700_000_000.5, "0")]
    for created_at, document_id in sorted(expected, key=lambda pair: pair[1]):
        await ledger.put_document(document(document_id, created_at=created_at))
        await ledger.put_document(document(f"{document_id}-short", created_at=created_at, ttl_seconds=1))
    await store.travel(1)
    for newest_first in (False, True):
        wanted = [pair[1] for pair in expected][:: -1 if newest_first else 1]
        for limit in (1, 2, 3, 100):
            found: list[str] = []
            while page := await ledger.documents(
                "completion", after=found[-1] if found else None, limit=limit, newest_first=newest_first
            ):
                assert len(page) <= limit
                found += [listed.document_id for listed in page]
            assert found == wanted
    assert await ledger.documents("completion", limit=0) == []


async def test_of_many_who_claim_a_document_one_gets_it(store: LedgerUnderTest) -> None:
    """Servers that write one document at the same time, if it is absent, agree on whose it is."""
    ledgers = [store.ledger, await store.another()] * 5
    outcomes = await asyncio.gather(
        *(
            ledger.put_document(document("a", str(number).encode()), if_absent=True)
            for number, ledger in enumerate(ledgers)
        )
    )
    assert outcomes.count(True) == 1
    found = await store.ledger.get_document("completion", "a")
    assert found is not None
    assert found.body == str(outcomes.index(True)).encode()


async def test_documents_know_no_conversations(store: LedgerUnderTest, ledger: Ledger) -> None:
    """A conversation that is deleted takes no document with it, and its id is no document's."""
    await ledger.put_document(document(ID))
    await ledger.delete(ID)
    assert await ledger.get_document("completion", ID) == document(ID)

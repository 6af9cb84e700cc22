"""Every ledger against the simplest one that could be right: a dictionary."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, multiple, rule, run_state_machine_as_test

from engine.messages import CheckpointRef
from server.conversations.ledger import (
    Conversation,
    ConversationBusy,
    ConversationExists,
    ConversationExpired,
    ConversationNotFound,
    Lease,
    LeaseLost,
    LedgerError,
    Turn,
    VersionConflict,
)
from tests.redis_server import RedisServer
from tests.server.conversations.ledgers import (
    LEASE_TTL,
    TOMBSTONE,
    LedgerUnderTest,
    RedisUnderTest,
    SqliteUnderTest,
    checkpoint_of,
    new_conversation,
    next_turn,
)

# Real time passes in Redis, too, but never as much as the grain of the model's.
GRAIN = 5.0
TTL = 100.0  # a few leases, so that both kinds of time to live end often
IDS = ("acme:one", "acme:two")

Result = TypeVar("Result")


@dataclass
class Entry:
    """A conversation as the model keeps it."""

    expires_at: float
    turns: list[Turn] = field(default_factory=list)
    fence: int | None = None  # of the current lease
    leased_until: float = 0.0
    checkpoint: CheckpointRef | None = None
    checkpoint_version: int = 0


class DictLedger:
    """The contract in plain Python: what each call must answer, as a value or the type of an error."""

    def __init__(self) -> None:
        self.now = 0.0
        self.entries: dict[str, Entry] = {}
        self.tombstones: dict[str, float] = {}

    def find(self, conversation_id: str) -> Entry | type[LedgerError]:
        """Return the living entry, or why there is none."""
        entry = self.entries.get(conversation_id)
        if entry is None:
            return ConversationExpired if conversation_id in self.tombstones else ConversationNotFound
        is_leased = entry.fence is not None and entry.leased_until > self.now
        return entry if entry.expires_at > self.now or is_leased else ConversationExpired

    def holds(self, lease: Lease) -> bool:
        """Say whether the lease is current."""
        entry = self.entries.get(lease.conversation_id)
        return entry is not None and entry.fence == lease.fence and entry.leased_until > self.now

    def sweep(self) -> list[CheckpointRef]:
        """Bury what expired."""
        checkpoints = []
        for conversation_id in list(self.entries):
            entry = self.entries[conversation_id]
            if self.find(conversation_id) is ConversationExpired:
                self.tombstones[conversation_id] = entry.expires_at + TOMBSTONE
                checkpoints += [entry.checkpoint] if entry.checkpoint else []
                del self.entries[conversation_id]
        self.tombstones = {key: until for key, until in self.tombstones.items() if until > self.now}
        return checkpoints


class LedgerMachine(RuleBasedStateMachine):
    """Any order of calls and passing time, on a real ledger and on the model."""

    make: ClassVar[Any]

    leases: Bundle[Lease] = Bundle("leases")
    turns: Bundle[tuple[Lease, Turn]] = Bundle("turns")
    ids = st.sampled_from(IDS)

    def __init__(self) -> None:
        super().__init__()
        self.model = DictLedger()
        self.runner = asyncio.Runner()
        self.directory = tempfile.TemporaryDirectory()
        self.store: LedgerUnderTest = self.run(type(self).make(Path(self.directory.name)))
        self.num_requests = 0

    def run(self, call: Coroutine[Any, Any, Result]) -> Result:
        """Run a call to its end."""
        return self.runner.run(call)

    def ask(self, call: Coroutine[Any, Any, Result]) -> Result | type[LedgerError]:
        """Return a call's result or the type of its error."""
        try:
            return self.run(call)
        except LedgerError as error:
            return type(error)

    def teardown(self) -> None:
        """Release everything."""
        self.run(self.store.close())
        self.runner.close()
        self.directory.cleanup()

    @rule(seconds=st.sampled_from([GRAIN, LEASE_TTL, TTL, TOMBSTONE]))
    def time_passes(self, seconds: float) -> None:
        """Leases, conversations and tombstones end."""
        self.run(self.store.travel(seconds))
        self.model.now += seconds
        self.sweep()  # until then a store may remember a tombstone for longer than it must

    @rule()
    def sweep(self) -> None:
        """The same checkpoints become garbage."""
        assert sorted(self.run(self.store.ledger.sweep()), key=str) == sorted(self.model.sweep(), key=str)

    @rule(conversation_id=ids)
    def create(self, conversation_id: str) -> None:
        """An id is free, taken, or a tombstone."""
        found = self.model.find(conversation_id)
        answer = self.ask(self.store.ledger.create(new_conversation(conversation_id, TTL)))
        if found is ConversationNotFound:
            assert answer is None
            self.model.entries[conversation_id] = Entry(self.model.now + TTL)
        else:
            assert answer is (ConversationExists if isinstance(found, Entry) else ConversationExpired)

    @rule(target=leases, conversation_id=ids)
    def acquire(self, conversation_id: str) -> Any:
        """A lease is granted exactly when there is a conversation without one."""
        found = self.model.find(conversation_id)
        answer = self.ask(self.store.ledger.acquire(conversation_id, "server", LEASE_TTL))
        if not isinstance(found, Entry):
            assert answer is found
        elif found.fence is not None and found.leased_until > self.model.now:
            assert answer is ConversationBusy
        else:
            assert isinstance(answer, tuple)
            lease, head = answer
            self.check_head(found, head)
            found.fence = lease.fence
            self.extend(found)
            return lease
        return multiple()

    @rule(lease=leases)
    def renew(self, lease: Lease) -> None:
        """Only a current lease is renewed."""
        answer = self.ask(self.store.ledger.renew(lease))
        if self.model.holds(lease):
            assert answer is None
            self.extend(self.model.entries[lease.conversation_id])
        else:
            assert answer is LeaseLost

    @rule(lease=leases)
    def release(self, lease: Lease) -> None:
        """Only a current lease frees anything."""
        assert self.ask(self.store.ledger.release(lease)) is None
        if self.model.holds(lease):
            self.model.entries[lease.conversation_id].fence = None

    @rule(target=turns, lease=leases, skip=st.sampled_from([0, 0, 0, 1]))
    def commit(self, lease: Lease, skip: int) -> tuple[Lease, Turn]:
        """A turn on the head, or one that skips a version."""
        entry = self.model.entries.get(lease.conversation_id)
        head: Turn | Conversation = entry.turns[-1] if entry and entry.turns else new_conversation()
        self.num_requests += 1
        turn = next_turn(head, f"request-{self.num_requests}")
        for _ in range(skip):
            turn = next_turn(turn, turn.request_id)
        self.commit_again((lease, turn))
        return lease, turn

    @rule(attempt=turns)
    def commit_again(self, attempt: tuple[Lease, Turn]) -> None:
        """A turn is applied under a current lease on the version it follows; the head itself is applied already."""
        lease, turn = attempt
        entry = self.model.entries.get(lease.conversation_id)
        answer = self.ask(self.store.ledger.commit(lease, turn))
        if entry is not None and entry.turns and entry.turns[-1] == turn:
            assert answer is None
        elif entry is None or not self.model.holds(lease):
            assert answer is LeaseLost
        elif turn.version != len(entry.turns) + 1:
            assert answer is VersionConflict
        else:
            assert answer is None
            entry.turns.append(turn)
            entry.expires_at = self.model.now + TTL

    @rule(attempt=turns, digit=st.sampled_from("abcdef"))
    def point(self, attempt: tuple[Lease, Turn], digit: str) -> None:
        """A checkpoint is recorded if its turn is in the log and it is newer."""
        lease, turn = attempt
        checkpoint = checkpoint_of(turn, digit)
        found = self.model.find(lease.conversation_id)
        answer = self.run(self.store.ledger.point(lease.conversation_id, turn.version, checkpoint))
        if isinstance(found, Entry) and found.checkpoint == checkpoint:
            assert answer is None
        elif not isinstance(found, Entry) or turn not in found.turns or turn.version <= found.checkpoint_version:
            assert answer == checkpoint
        else:
            assert answer == found.checkpoint
            found.checkpoint, found.checkpoint_version = checkpoint, turn.version

    @rule(conversation_id=ids)
    def delete(self, conversation_id: str) -> None:
        """What is deleted is returned, and then gone."""
        found = self.model.find(conversation_id)
        answer = self.ask(self.store.ledger.delete(conversation_id))
        if isinstance(found, Entry):
            assert isinstance(answer, Conversation)
            self.check_head(found, answer)
            del self.model.entries[conversation_id]
            self.model.tombstones[conversation_id] = self.model.now + TOMBSTONE
        else:
            assert answer is found

    @invariant()
    def the_logs_are_equal(self) -> None:
        """After every step both ledgers tell the same."""
        for conversation_id in IDS:
            found = self.model.find(conversation_id)
            turns = self.ask(self.store.ledger.turns(conversation_id))
            assert turns == (found.turns if isinstance(found, Entry) else found)

    def check_head(self, entry: Entry, head: Conversation) -> None:
        """Check a head against the model."""
        assert head.version == len(entry.turns)
        assert head.chain == (entry.turns[-1].chain if entry.turns else new_conversation().chain)
        assert (head.checkpoint, head.checkpoint_version) == (entry.checkpoint, entry.checkpoint_version)

    def extend(self, entry: Entry) -> None:
        """Let the model's lease last from now on."""
        entry.leased_until = self.model.now + LEASE_TTL


@pytest.fixture(scope="module")
def own_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A Redis that this module may empty at any time."""
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


def run_machine(make: Any, max_examples: int) -> None:
    """Run the machine on the ledgers that `make` returns."""
    machine = type("LedgerMachine", (LedgerMachine,), {"make": staticmethod(make)})
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        machine,
        settings=settings(
            max_examples=max_examples,
            stateful_step_count=30,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_sqlite_agrees_with_the_model() -> None:
    """Any sequence of calls has the same answers from SQLite and from a dictionary."""

    async def make(directory: Path) -> LedgerUnderTest:
        store = SqliteUnderTest(directory / "ledger.sqlite")
        await store.ledger.open()
        return store

    run_machine(make, max_examples=40)


def test_redis_agrees_with_the_model(own_redis: RedisServer) -> None:
    """Any sequence of calls has the same answers from Redis and from a dictionary."""

    async def make(directory: Path) -> LedgerUnderTest:
        store = RedisUnderTest(own_redis)
        await store.raw.flushall()
        await store.ledger.open()
        return store

    run_machine(make, max_examples=40)

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
    Document,
    DocumentNotFound,
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
    document,
    marker,
    new_conversation,
    next_turn,
)

# Real time passes in Redis, too, but never as much as the grain of the model's.
GRAIN = 5.0
TTL = 100.0  # a few leases, so that both kinds of time to live end often
IDS = ("acme:one", "acme:two")
KINDS = ("completion", "response")
DOCUMENT_IDS = ("a", "b", "c")

Result = TypeVar("Result")


@dataclass
class Entry:
    """A conversation as the model keeps it."""

    expires_at: float
    turns: list[Turn] = field(default_factory=list)
    fence: int | None = None  # of the current lease
    leased_until: float = 0.0
    checkpoints: dict[int, CheckpointRef] = field(default_factory=dict)
    ttl_seconds: float = TTL
    metadata: dict[str, str] = field(default_factory=lambda: new_conversation().metadata)

    def history(self, version: int) -> Turn | Conversation:
        """Return the entry of that version, or the empty history."""
        return self.turns[version - 1] if version else new_conversation()


class DictLedger:
    """The contract in plain Python: what each call must answer, as a value or the type of an error."""

    def __init__(self) -> None:
        self.now = 0.0
        self.entries: dict[str, Entry] = {}
        self.tombstones: dict[str, float] = {}
        self.documents: dict[tuple[str, str], tuple[float, Document]] = {}  # with the time of expiry

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

    def find_document(self, kind: str, document_id: str) -> Document | None:
        """Return the document that has not expired."""
        expires_at, found = self.documents.get((kind, document_id), (0.0, None))
        return found if expires_at > self.now else None

    def list_documents(self, kind: str, newest_first: bool) -> list[Document]:
        """Return all documents of a kind."""
        found = [self.find_document(*key) for key in self.documents if key[0] == kind]
        return sorted(
            (listed for listed in found if listed is not None),
            key=lambda listed: (listed.created_at, listed.document_id),
            reverse=newest_first,
        )

    def sweep(self) -> set[CheckpointRef]:
        """Bury what expired."""
        checkpoints: set[CheckpointRef] = set()
        for conversation_id in list(self.entries):
            entry = self.entries[conversation_id]
            if self.find(conversation_id) is ConversationExpired:
                self.tombstones[conversation_id] = entry.expires_at + TOMBSTONE
                checkpoints.update(entry.checkpoints.values())
                del self.entries[conversation_id]
        self.tombstones = {key: until for key, until in self.tombstones.items() if until > self.now}
        return checkpoints


class LedgerMachine(RuleBasedStateMachine):
    """Any order of calls and passing time, on a real ledger and on the model."""

    make: ClassVar[Any]

    leases: Bundle[Lease] = Bundle("leases")
    turns: Bundle[tuple[Lease, Turn]] = Bundle("turns")
    ids = st.sampled_from(IDS)
    kinds = st.sampled_from(KINDS)
    document_ids = st.sampled_from(DOCUMENT_IDS)

    def __init__(self) -> None:
        super().__init__()
        self.model = DictLedger()
        self.runner = asyncio.Runner()
        self.directory = tempfile.TemporaryDirectory()
        self.store: LedgerUnderTest = self.run(type(self).make(Path(self.directory.name)))
        self.num_requests = 0

    def new_request_id(self) -> str:
        """Return the name of the next request."""
        self.num_requests += 1
        return f"request-{self.num_requests}"

    def entry_after(self, head: Turn | Conversation) -> Turn:
        """Return a turn of the next request, whose reply has the request's number."""
        request_id = self.new_request_id()
        return next_turn(head, request_id, reply_id=f"reply-{self.num_requests}")

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
        assert set(self.run(self.store.ledger.sweep())) == self.model.sweep()

    @rule(conversation_id=ids, num_turns=st.sampled_from([0, 0, 1, 2]))
    def create(self, conversation_id: str, num_turns: int) -> None:
        """An id is free, taken, or a tombstone; a log may begin with entries."""
        found = self.model.find(conversation_id)
        turns: list[Turn] = []
        for _ in range(num_turns):
            turns.append(self.entry_after(turns[-1] if turns else new_conversation()))
        answer = self.ask(self.store.ledger.create(new_conversation(conversation_id, TTL), turns))
        if found is ConversationNotFound:
            assert answer is None
            self.model.entries[conversation_id] = Entry(self.model.now + TTL, turns)
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
        turn = self.entry_after(entry.history(len(entry.turns)) if entry else new_conversation())
        for _ in range(skip):
            turn = next_turn(turn, turn.request_id)
        self.commit_again((lease, turn))
        return lease, turn

    @rule(target=turns, lease=leases, back=st.integers(0, 2))
    def commit_marker(self, lease: Lease, back: int) -> tuple[Lease, Turn]:
        """An entry without tokens, that takes the head back by some versions, or by none."""
        entry = self.model.entries.get(lease.conversation_id) or Entry(expires_at=0.0)
        version = len(entry.turns)
        parent = entry.history(max(0, version - back))
        turn = marker(entry.history(version), parent, self.new_request_id())
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
            entry.expires_at = self.model.now + entry.ttl_seconds
            entry.fence = None

    @rule(attempt=turns, digit=st.sampled_from("abcdef"), drop=st.sets(st.integers(0, 4)))
    def point(self, attempt: tuple[Lease, Turn], digit: str, drop: set[int]) -> None:
        """A checkpoint is recorded if its entry is in the log; what that drops is named, unless still in use."""
        lease, turn = attempt
        checkpoint = checkpoint_of(turn, digit)
        found = self.model.find(lease.conversation_id)
        answer = self.run(self.store.ledger.point(lease.conversation_id, turn.version, checkpoint, drop))
        if not isinstance(found, Entry) or turn not in found.turns:
            removed, known = {checkpoint}, set(found.checkpoints.values()) if isinstance(found, Entry) else set()
        else:
            before = dict(found.checkpoints)
            found.checkpoints = {version: ref for version, ref in before.items() if version not in drop}
            found.checkpoints[turn.version] = checkpoint
            removed, known = set(before.values()), set(found.checkpoints.values())
        assert len(answer) == len(set(answer))
        assert set(answer) == removed - known

    @rule(
        conversation_id=ids,
        metadata=st.sampled_from([None, {}, {"topic": "harps"}, {"a": "1", "b": "2"}]),
        ttl_seconds=st.sampled_from([None, None, 2 * LEASE_TTL, 3 * TTL]),
    )
    def update(self, conversation_id: str, metadata: dict[str, str] | None, ttl_seconds: float | None) -> None:
        """Metadata are replaced; a new time to live begins at once."""
        found = self.model.find(conversation_id)
        answer = self.ask(self.store.ledger.update(conversation_id, metadata=metadata, ttl_seconds=ttl_seconds))
        if isinstance(found, Entry):
            found.metadata = found.metadata if metadata is None else metadata
            if ttl_seconds is not None:
                found.ttl_seconds = ttl_seconds
                found.expires_at = self.model.now + ttl_seconds
            assert isinstance(answer, Conversation)
            self.check_head(found, answer)
        else:
            assert answer is found

    @rule(conversation_id=ids, number=st.integers(0, 12))
    def find_reply(self, conversation_id: str, number: int) -> None:
        """A reply leads to its entry, if that is in the log."""
        found = self.model.find(conversation_id)
        answer = self.ask(self.store.ledger.find_reply(conversation_id, f"reply-{number}"))
        if isinstance(found, Entry):
            assert answer == next((turn for turn in found.turns if turn.reply_id == f"reply-{number}"), None)
        else:
            assert answer is found

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

    @rule(
        kind=kinds,
        document_id=document_ids,
        created_at=st.sampled_from([1.0, 2.0]),
        ttl_seconds=st.sampled_from([LEASE_TTL, TTL, 3 * TTL]),
        if_absent=st.booleans(),
    )
    def put_document(self, kind: str, document_id: str, created_at: float, ttl_seconds: float, if_absent: bool) -> None:
        """A document takes the place of another, or only an empty one."""
        body = self.new_request_id().encode()
        put = document(document_id, body, created_at, kind, ttl_seconds)
        is_written = not (if_absent and self.model.find_document(kind, document_id))
        assert self.run(self.store.ledger.put_document(put, if_absent=if_absent)) is is_written
        if is_written:
            self.model.documents[kind, document_id] = (self.model.now + ttl_seconds, put)

    @rule(kind=kinds, document_id=document_ids)
    def delete_document(self, kind: str, document_id: str) -> None:
        """A document is deleted once."""
        was_there = self.model.find_document(kind, document_id) is not None
        assert self.run(self.store.ledger.delete_document(kind, document_id)) is was_there
        self.model.documents.pop((kind, document_id), None)

    @rule(
        kind=kinds,
        after=st.none() | document_ids,
        limit=st.integers(1, 3),
        newest_first=st.booleans(),
    )
    def list_documents(self, kind: str, after: str | None, limit: int, newest_first: bool) -> None:
        """A page begins behind the document that it is to begin behind."""
        listed = self.model.list_documents(kind, newest_first)
        answer = self.ask(self.store.ledger.documents(kind, after=after, limit=limit, newest_first=newest_first))
        if after is None:
            assert answer == listed[:limit]
        elif self.model.find_document(kind, after) is None:
            assert answer is DocumentNotFound
        else:
            start = [found.document_id for found in listed].index(after) + 1
            assert answer == listed[start : start + limit]

    @invariant()
    def the_documents_are_equal(self) -> None:
        """After every step both hold the same documents."""
        for kind in KINDS:
            for document_id in DOCUMENT_IDS:
                found = self.run(self.store.ledger.get_document(kind, document_id))
                assert found == self.model.find_document(kind, document_id)

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
        assert head.checkpoints == entry.checkpoints
        assert (head.metadata, head.ttl_seconds) == (entry.metadata, entry.ttl_seconds)

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

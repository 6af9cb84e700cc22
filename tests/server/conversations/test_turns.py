"""The turn protocol on a real ledger and a real engine, in this process."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from engine.client import AsyncEngine, SequenceEvent
from engine.config import EngineConfig
from engine.messages import CheckpointStored, ResumeKind, SamplingParams, SequenceOutput, StopRules
from engine.process import run_engine
from engine.token_chain import extend_digest, root_digest
from server.conversations.ledger import (
    Conversation,
    ConversationBusy,
    ConversationNotFound,
    Durability,
    Lease,
    LeaseLost,
    Ledger,
    LedgerUnavailable,
    Turn,
    VersionConflict,
)
from server.conversations.open_ledger import open_ledger
from server.conversations.open_turn import LogCorrupt, ModelMismatch, OpenTurn, TurnReceipt
from server.conversations.turns import ConversationSelector, ModelIdentity, Turns

ADA = ConversationSelector("ada", create=True)
SAMPLING = SamplingParams(seed=3)
STOP = StopRules(max_tokens=6)


class Observer:
    """Remembers what was counted."""

    def __init__(self) -> None:
        self.resumes: list[ResumeKind] = []
        self.commits: list[Durability] = []
        self.refusals: list[str] = []
        self.stored: list[CheckpointStored] = []
        self.failures: list[str] = []

    def turn_resumed(self, kind: ResumeKind, num_replayed_tokens: int) -> None:
        self.resumes.append(kind)

    def turn_committed(self, durability: Durability, seconds: float) -> None:
        self.commits.append(durability)

    def turn_refused(self, reason: str) -> None:
        self.refusals.append(reason)

    def checkpoint_stored(self, stored: CheckpointStored) -> None:
        self.stored.append(stored)

    def checkpoint_failed(self, reason: str) -> None:
        self.failures.append(reason)


@pytest.fixture
async def ledger(tmp_path: Path) -> AsyncIterator[Ledger]:
    """An open SQLite ledger."""
    ledger = open_ledger(f"sqlite:///{tmp_path}/ledger/ledger.sqlite")
    await ledger.open()
    yield ledger
    await ledger.close()


@pytest.fixture
async def engine(tiny_model: Path, tmp_path: Path) -> AsyncIterator[AsyncEngine]:
    """A running engine with its states in files."""
    config = EngineConfig(model_path=str(tiny_model), num_threads=1, state_url=f"file://{tmp_path}/states")
    engine = AsyncEngine.in_process(functools.partial(run_engine, config))
    await engine.start()
    yield engine
    await engine.close()


def make_turns(ledger: Ledger, engine: AsyncEngine, fingerprint: str = "f00d") -> Turns:
    """The protocol, with an observer that remembers."""
    return Turns(ledger, engine, ModelIdentity("tiny", fingerprint, "raw"), Observer())


def observer_of(turns: Turns) -> Observer:
    """What the protocol counted."""
    assert isinstance(turns.observer, Observer)
    return turns.observer


async def generate(turn: OpenTurn, text: bytes = b"Hello.") -> list[int]:
    """Run the turn's generation to its end."""
    token_ids: list[int] = []

    def hear(event: SequenceEvent) -> None:
        if isinstance(event, SequenceOutput):
            token_ids.extend(event.token_ids)

    await turn.generate(list(text), SAMPLING, STOP, hear=hear)
    return token_ids


async def take_turn(turns: Turns, text: bytes = b"Hello.") -> tuple[TurnReceipt, list[int]]:
    """Open, generate, commit."""
    async with turns.open(ADA) as turn:
        token_ids = await generate(turn, text)
        return await turn.commit(), token_ids


async def test_a_committed_turn_is_exactly_what_was_said(ledger: Ledger, engine: AsyncEngine) -> None:
    """The log holds the prompt and the delivered tokens, and their chain names the state."""
    turns = make_turns(ledger, engine)
    receipt, token_ids = await take_turn(turns)
    assert (receipt.version, receipt.parent_version, receipt.resume) == (1, 0, ResumeKind.NEW)
    assert receipt.durability is Durability.FSYNCED
    (turn,) = await ledger.turns("ada")
    assert (turn.prompt_ids, turn.output_ids) == (list(b"Hello."), token_ids)
    assert turn.chain == extend_digest(root_digest(), list(b"Hello.") + token_ids)
    assert turn.num_tokens == len(b"Hello.") + len(token_ids)


@asynccontextmanager
async def abandoned(turns: Turns) -> AsyncIterator[None]:
    """A turn that is generated in part and left."""
    has_begun = asyncio.Event()
    async with turns.open(ADA) as turn:
        generating = asyncio.create_task(
            turn.generate(list(b"Hm."), SAMPLING, STOP, hear=lambda event: has_begun.set())
        )
        await has_begun.wait()
        generating.cancel()
        await asyncio.wait([generating])
    yield


async def test_a_turn_that_is_left_leaves_no_trace(ledger: Ledger, engine: AsyncEngine) -> None:
    """Without a commit the conversation is where it was, and free at once."""
    turns = make_turns(ledger, engine)
    await take_turn(turns)
    before = await ledger.get("ada")
    async with abandoned(turns):
        await turns.settle()
        after = await ledger.get("ada")
        assert (after.version, after.chain) == (before.version, before.chain)
        assert (await take_turn(turns))[0].version == 2


async def test_one_turn_at_a_time(ledger: Ledger, engine: AsyncEngine) -> None:
    """While a turn is open another is refused, or waits if it wants to."""
    turns = make_turns(ledger, engine)
    async with turns.open(ADA) as turn:
        with pytest.raises(ConversationBusy):
            async with turns.open(ADA):
                pass
        await generate(turn)
        await turn.commit()
        async with turns.open(ADA, queue_seconds=5) as second:  # a commit ends its lease
            assert second.conversation.version == 1
    assert observer_of(turns).refusals == ["busy"]


async def test_a_turn_built_on_another_version_is_refused(ledger: Ledger, engine: AsyncEngine) -> None:
    """`if_match` must be the head's version, and the refusal says which that is."""
    turns = make_turns(ledger, engine)
    await take_turn(turns)
    with pytest.raises(VersionConflict) as conflict:
        async with turns.open(ADA, if_match=0):
            pass
    assert conflict.value.version == 1
    async with turns.open(ADA, if_match=1):
        pass


async def test_a_conversation_is_not_begun_by_asking_for_it(ledger: Ledger, engine: AsyncEngine) -> None:
    """Unless the client wants to create it, an unknown id stays unknown."""
    with pytest.raises(ConversationNotFound):
        async with make_turns(ledger, engine).open(ConversationSelector("nobody")):
            pass


async def test_a_conversation_belongs_to_its_weights(ledger: Ledger, engine: AsyncEngine) -> None:
    """Tokens of one model are not continued by another."""
    await take_turn(make_turns(ledger, engine))
    with pytest.raises(ModelMismatch):
        await take_turn(make_turns(ledger, engine, fingerprint="beef"))
    assert (await ledger.get("ada")).version == 1


async def test_the_checkpoint_is_written_behind_and_pointed_to(
    ledger: Ledger, engine: AsyncEngine, tmp_path: Path
) -> None:
    """After a turn its state is in the store under the recorded name; the old ones thin out."""
    turns = make_turns(ledger, engine)
    for version in range(1, 11):
        await take_turn(turns)
        await turns.settle()
        head = await ledger.get("ada")
        assert head.checkpoints[version].chain == head.chain
    assert sorted(head.checkpoints) == [5, 7, 9, 10]
    async with asyncio.timeout(10):
        while len(names := stored_names(tmp_path / "states")) > 4:  # noqa: ASYNC110 - deletions are nobody's to wait for
            await asyncio.sleep(0.02)
    assert all(any(ref.checkpoint_id in name for name in names) for ref in head.checkpoints.values())


def stored_names(directory: Path) -> list[str]:
    """The names of the states in a file store."""
    return [path.name for path in directory.rglob("*") if path.is_file() and path.stat().st_size > 1000]


@pytest.mark.parametrize("loss", ["memory", "checkpoint"])
async def test_what_is_lost_is_found_again(ledger: Ledger, engine: AsyncEngine, loss: str, tmp_path: Path) -> None:
    """Out of memory a state is restored; out of the store too, the log is replayed; tokens are the same."""
    turns = make_turns(ledger, engine)
    await take_turn(turns)
    _, expected = await take_turn(turns, b" And?")
    await turns.delete("ada")
    turns = make_turns(ledger, engine)
    bob = ConversationSelector("bob", create=True)
    async with turns.open(bob) as turn:
        await generate(turn)
        await turn.commit()
    await turns.settle()
    head = await ledger.get("bob")
    engine.forget_state(head.chain)
    if loss == "checkpoint":
        engine.delete_checkpoints([head.checkpoints[1].checkpoint_id])
        async with asyncio.timeout(10):
            gone = head.checkpoints[1].checkpoint_id
            while any(gone in name for name in stored_names(tmp_path / "states")):  # noqa: ASYNC110 - as above
                await asyncio.sleep(0.02)
    async with turns.open(bob) as turn:
        assert await generate(turn, b" And?") == expected
        receipt = await turn.commit()
    assert receipt.resume is (ResumeKind.RESTORED if loss == "memory" else ResumeKind.REPLAYED)
    assert receipt.num_cached_tokens == (head.num_tokens if loss == "memory" else 0)


class Altered:
    """A ledger with one method replaced."""

    def __init__(self, ledger: Ledger, **methods: object) -> None:
        self._ledger = ledger
        self._methods = methods

    def __getattr__(self, name: str) -> object:
        return self._methods.get(name) or getattr(self._ledger, name)


async def test_a_log_that_does_not_hash_to_its_chain_is_not_continued(ledger: Ledger, engine: AsyncEngine) -> None:
    """Nothing is generated from a log in which a token is not the one that was committed."""
    await take_turn(make_turns(ledger, engine))
    head = await ledger.get("ada")
    engine.forget_state(head.chain)

    async def acquire(conversation_id: str, owner: str, ttl_seconds: float) -> tuple[Lease, Conversation]:
        lease, found = await ledger.acquire(conversation_id, owner, ttl_seconds)
        return lease, msgspec.structs.replace(found, checkpoints={})

    async def turns_of(conversation_id: str, after_version: int = 0) -> list[Turn]:
        (turn,) = await ledger.turns(conversation_id)
        return [msgspec.structs.replace(turn, output_ids=[turn.output_ids[0] ^ 1, *turn.output_ids[1:]])]

    altered = Altered(ledger, acquire=acquire, turns=turns_of)
    with pytest.raises(LogCorrupt):
        await take_turn(make_turns(altered, engine))  # type: ignore[arg-type]
    assert (await ledger.get("ada")).version == 1


async def test_a_commit_whose_reply_was_lost_is_applied_once(ledger: Ledger, engine: AsyncEngine) -> None:
    """The same turn sent again is recognised; the client gets its receipt."""
    attempts: list[Turn] = []

    async def commit(lease: Lease, turn: Turn) -> None:
        attempts.append(turn)
        await ledger.commit(lease, turn)
        if len(attempts) == 1:
            raise LedgerUnavailable("the reply was lost")

    receipt, _ = await take_turn(make_turns(Altered(ledger, commit=commit), engine))  # type: ignore[arg-type]
    assert receipt.version == 1
    assert len(attempts) == 2
    assert len(await ledger.turns("ada")) == 1


async def test_a_turn_whose_lease_was_taken_over_is_not_applied(ledger: Ledger, engine: AsyncEngine) -> None:
    """Whoever lost the lease is refused by the ledger, whatever it believes itself."""
    turns = make_turns(ledger, engine)
    turns.lease_seconds = 0.05

    async def renew(lease: Lease) -> None:
        return None  # a server that believes it renews

    turns.ledger = Altered(ledger, renew=renew)  # type: ignore[assignment]
    async with turns.open(ADA) as turn:
        await generate(turn)
        other = make_turns(ledger, engine)
        async with other.open(ADA, queue_seconds=5) as taken_over:
            with pytest.raises(LeaseLost):
                await turn.commit()
            await generate(taken_over, b"Mine.")
            assert (await taken_over.commit()).version == 1
    assert [bytes(turn.prompt_ids) for turn in await ledger.turns("ada")] == [b"Mine."]
    assert observer_of(turns).refusals == ["lease_lost"]

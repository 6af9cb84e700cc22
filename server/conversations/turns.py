"""The turn protocol: how one turn of a conversation is opened, run, committed and checkpointed.

    lease and head  ->  state source  ->  tokens  ->  commit  ->  (reply)  ->  checkpoint, pointed to

A turn is applied when the ledger has it, and never otherwise: until `OpenTurn.commit` returns, the conversation is at
its previous version for everybody, and leaving an open turn without committing it leaves no trace. The ledger decides
who may commit; this module only keeps the lease alive and does the work in the right order. The state is written
behind the commit; whatever becomes of it costs time at the next turn, never data.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec

from engine.client import AsyncEngine
from engine.errors import CheckpointError, EngineError, InitialStateUnavailable
from engine.messages import (
    CheckpointRef,
    CheckpointStored,
    InitialStateRef,
    ResumeKind,
)
from server.conversations.history import History, history_of, is_marker, root_of, superseded
from server.conversations.lease_keeper import LeaseKeeper
from server.conversations.ledger import (
    Conversation,
    ConversationBusy,
    ConversationExists,
    ConversationNotFound,
    Durability,
    Item,
    Lease,
    Ledger,
    LedgerCorrupt,
    LedgerError,
    LedgerUnavailable,
    Turn,
    VersionConflict,
)
from server.conversations.open_turn import InitialStateConflict, ModelMismatch, OpenTurn, VersionUnknown, marker
from server.conversations.waiting_line import WaitingLine

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """What a conversation is bound to when it is created."""

    name: str
    fingerprint: str
    template: str
    initial_states: tuple[InitialStateRef, ...] = ()  # that its conversations may begin from


@dataclass(frozen=True, slots=True)
class ConversationSelector:
    """Which conversation a turn belongs to, and whether it may begin with it."""

    conversation_id: str
    create: bool = False
    kind: str = "conversation"  # of a log that is created
    initial_state: InitialStateRef | None = None  # to begin with; naming it again later does no harm


class TurnObserver(Protocol):
    """Who wants to count what happens to turns: the metrics."""

    def turn_resumed(self, kind: ResumeKind, num_replayed_tokens: int) -> None:
        """A turn has its state."""
        ...

    def turn_committed(self, durability: Durability, seconds: float) -> None:
        """A turn is in the ledger; the commit took `seconds`."""
        ...

    def turn_refused(self, reason: str) -> None:
        """A turn could not be opened or committed: busy, version, lease_lost, unavailable, model, initial_state."""
        ...

    def checkpoint_stored(self, stored: CheckpointStored) -> None:
        """A state was written."""
        ...

    def checkpoint_failed(self, reason: str) -> None:
        """A state was not written, or not pointed to."""
        ...


class Turns:
    """Opens turns, and does what lies behind them. One instance an API process; belongs to its event loop."""

    def __init__(
        self,
        ledger: Ledger,
        engine: AsyncEngine,
        model: ModelIdentity,
        observer: TurnObserver,
        *,
        lease_seconds: float = 15.0,
        conversation_ttl_seconds: float = 30 * 86_400.0,
        max_checkpoints: int = 4,
    ) -> None:
        self.ledger = ledger
        self.engine = engine
        self.model = model
        self.observer = observer
        self.lease_seconds = lease_seconds
        self.conversation_ttl_seconds = conversation_ttl_seconds
        self.max_checkpoints = max_checkpoints
        self.owner = uuid.uuid4().hex
        self._line = WaitingLine()
        self._behind: set[asyncio.Task[object]] = set()

    async def create(
        self,
        conversation_id: str,
        metadata: dict[str, str] | None = None,
        *,
        kind: str = "conversation",
        items: Sequence[Item] = (),
        initial_state: InitialStateRef | None = None,
    ) -> Conversation:
        """Begin a conversation, with items that its first turn will render, from the zero state or a tuned one.

        Raises `ConversationExists`.
        """
        conversation = Conversation(
            conversation_id=conversation_id,
            version=0,
            chain=root_of(conversation_id, initial_state),
            num_tokens=0,
            model=self.model.name,
            fingerprint=self.model.fingerprint,
            template=self.model.template,
            created_at=time.time(),
            ttl_seconds=self.conversation_ttl_seconds,
            metadata=metadata or {},
            kind=kind,
            initial_state=initial_state,
        )
        first = marker(conversation, History(conversation.chain), items)
        await self.ledger.create(conversation, [first] if items else [])
        return msgspec.structs.replace(conversation, version=1) if items else conversation

    async def get(self, conversation_id: str) -> Conversation:
        """Return the head; raises `ConversationNotFound` or `ConversationExpired`."""
        return await self.ledger.get(conversation_id)

    async def history(self, conversation_id: str, version: int | None = None) -> tuple[Conversation, History]:
        """Return the head and the history that leads to `version`, or to the head; raises as `get`.

        `VersionUnknown` if there is no such entry.
        """
        entries = await self.ledger.turns(conversation_id)
        head = await self.ledger.get(conversation_id)
        if version is None:
            version = len(entries)
        if not 0 <= version <= len(entries):
            raise VersionUnknown(conversation_id, version)
        return head, history_of(conversation_id, entries, version, head.initial_state)

    async def delete(self, conversation_id: str) -> None:
        """Remove a conversation and every trace of its states; a turn that runs can no longer commit."""
        try:
            chains = {entry.chain for entry in await self.ledger.turns(conversation_id)}
        except LedgerCorrupt:
            chains = set()  # what cannot be read can still be deleted
        head = await self.ledger.delete(conversation_id)
        for chain in chains | {head.chain}:
            self.engine.forget_state(chain)
        self._delete_checkpoints(head.checkpoints.values())

    async def delete_if(self, conversation_id: str, is_unwanted: Callable[[], Awaitable[bool]]) -> None:
        """As `delete`, if `is_unwanted` says so while nobody takes a turn; raises `ConversationBusy`, too."""
        lease, _ = await self.ledger.acquire(conversation_id, self.owner, self.lease_seconds)
        try:
            if await is_unwanted():
                await self.delete(conversation_id)
        finally:
            await self._release(lease)

    async def fork(
        self, conversation_id: str, fork_id: str, *, version: int | None = None, metadata: dict[str, str] | None = None
    ) -> Conversation:
        """Begin a conversation with the history that leads to `version` of another, which it leaves as it is.

        Its entries are copies, numbered from 1; it gets a checkpoint of its own. Raises as `history`, and
        `ConversationExists`.
        """
        head, history = await self.history(conversation_id, version)
        fork = await self._copy_log(head, history, fork_id, "conversation", metadata)
        self._start(self._copy_state(history, head.checkpoints, fork_id))
        return fork

    async def branch(
        self, conversation_id: str, branch_id: str, *, version: int, kind: str
    ) -> Mapping[int, CheckpointRef]:
        """As `fork`, for a turn that is to be taken at once: its state will be the branch's first checkpoint.

        Returns the origin's checkpoints by the branch's versions; they may be used, but not kept.
        """
        head, history = await self.history(conversation_id, version)
        await self._copy_log(head, history, branch_id, kind, {})
        return {
            number: head.checkpoints[entry.version]
            for number, entry in enumerate(history.path, start=1)
            if entry.version in head.checkpoints
        }

    async def discard(self, conversation_id: str) -> None:
        """Remove a log to which no turn was added: its states are those of the log that it was copied from."""
        await self.ledger.delete(conversation_id)

    async def _copy_log(
        self, head: Conversation, history: History, fork_id: str, kind: str, metadata: dict[str, str] | None
    ) -> Conversation:
        entries = [msgspec.structs.replace(entry, reply_id="", reply=b"") for entry in history.straightened()]
        fork = msgspec.structs.replace(
            head,
            conversation_id=fork_id,
            version=len(entries),
            chain=history.chain,
            num_tokens=history.num_tokens,
            created_at=time.time(),
            metadata=head.metadata if metadata is None else metadata,
            kind=kind,
            checkpoints={},
        )
        await self.ledger.create(fork, entries)
        return fork

    def open(
        self, selector: ConversationSelector, *, if_match: int | None = None, queue_seconds: float = 0.0
    ) -> contextlib.AbstractAsyncContextManager[OpenTurn]:
        """Return a context manager that holds the conversation's lease.

        Entering raises `ConversationNotFound`, `ConversationExpired`, `ConversationBusy` (after waiting up to
        `queue_seconds` in order of arrival), `VersionConflict` if the head is not at `if_match`, `ModelMismatch`,
        `InitialStateUnavailable`, `InitialStateConflict`, `LedgerUnavailable`.
        """
        return self._open(selector, if_match, queue_seconds)

    @contextlib.asynccontextmanager
    async def _open(
        self, selector: ConversationSelector, if_match: int | None, queue_seconds: float
    ) -> AsyncGenerator[OpenTurn]:
        try:
            lease, head = await self._acquire(selector, queue_seconds)
        except ConversationBusy:
            self.observer.turn_refused("busy")
            raise
        except LedgerUnavailable:
            self.observer.turn_refused("unavailable")
            raise
        turn: OpenTurn | None = None
        try:
            self._check(head, if_match)
            self._check_initial_state(head, selector.initial_state)
            async with LeaseKeeper(self.ledger, lease) as keeper:
                turn = OpenTurn(self, keeper, head)
                yield turn
        finally:
            if turn is None or not turn.committed:
                await self._release(lease)

    def _check(self, head: Conversation, if_match: int | None) -> None:
        if if_match is not None and if_match != head.version:
            self.observer.turn_refused("version")
            raise VersionConflict(head.conversation_id, if_match, head.version)
        if head.fingerprint != self.model.fingerprint:
            self.observer.turn_refused("model")
            raise ModelMismatch(f"conversation {head.conversation_id!r} was held with another model, {head.model!r}")

    def _check_initial_state(self, head: Conversation, named: InitialStateRef | None) -> None:
        """Refuse to go on from anything but what the conversation began from."""
        if head.initial_state is not None and head.initial_state not in self.model.initial_states:
            self.observer.turn_refused("initial_state")
            raise InitialStateUnavailable(
                "this server does not have the initial state that the conversation began from"
            )
        if named is not None and named != head.initial_state:
            self.observer.turn_refused("initial_state")
            raise InitialStateConflict("the conversation did not begin from this initial state")

    async def _acquire(self, selector: ConversationSelector, queue_seconds: float) -> tuple[Lease, Conversation]:
        async def attempt() -> tuple[Lease, Conversation]:
            return await self.ledger.acquire(selector.conversation_id, self.owner, self.lease_seconds)

        async def attempt_or_create() -> tuple[Lease, Conversation]:
            try:
                return await attempt()
            except ConversationNotFound:
                if not selector.create:
                    raise
            with contextlib.suppress(ConversationExists):  # somebody else began it just now: it exists, as wished
                await self.create(selector.conversation_id, kind=selector.kind, initial_state=selector.initial_state)
            return await attempt()

        return await self._line.wait(selector.conversation_id, attempt_or_create, queue_seconds)

    def lease_ended(self, conversation_id: str) -> None:
        """Let whoever waits for the conversation try again."""
        self._line.wake(conversation_id)

    async def _release(self, lease: Lease) -> None:
        # Shielded: a client that leaves must not take the release with it, or the conversation stays busy for a lease.
        try:
            await asyncio.shield(self.ledger.release(lease))
        except LedgerUnavailable:
            logger.warning("lease not released: it ends by itself", extra={"seconds": lease.ttl_seconds})
        finally:
            self.lease_ended(lease.conversation_id)

    def save_behind(self, head: Conversation, turn: Turn) -> None:
        """Write the state after `turn`, which continued `head`, and point to it, without anybody waiting."""
        self._start(self._save(head.conversation_id, turn.version, turn.chain, turn.num_tokens, head.checkpoints))

    async def _copy_state(self, history: History, known: Mapping[int, CheckpointRef], fork_id: str) -> None:
        """Give a fork a checkpoint of its own: of the state it begins from, or of the last one that is known."""
        spoken = [(number, entry) for number, entry in enumerate(history.path, start=1) if not is_marker(entry)]
        last = spoken[-1:]
        stored = [(number, entry) for number, entry in spoken if entry.version in known][-1:]
        for number, entry in last if last == stored else last + stored:
            if await self._save(fork_id, number, entry.chain, entry.num_tokens, {}, known.get(entry.version)):
                return

    async def _save(
        self,
        conversation_id: str,
        version: int,
        chain: bytes,
        num_tokens: int,
        known: Mapping[int, CheckpointRef],
        copy_of: CheckpointRef | None = None,
    ) -> bool:
        try:
            stored = await self.engine.save_state(chain, num_tokens, copy_of)
            self.observer.checkpoint_stored(stored)
            drop = superseded({*known, version}, self.max_checkpoints)
            self._delete_checkpoints(await self.ledger.point(conversation_id, version, stored.ref, drop))
            return True
        except CheckpointError as error:
            self.observer.checkpoint_failed(type(error).__name__)
            logger.warning("state not checkpointed: the next resume may have to replay", extra={"reason": str(error)})
        except EngineError as error:
            self.observer.checkpoint_failed(type(error).__name__)
        except LedgerError as error:
            self.observer.checkpoint_failed(type(error).__name__)
            logger.warning("checkpoint not pointed to: it expires unused", extra={"reason": str(error)})
        return False

    def _delete_checkpoints(self, refs: Iterable[CheckpointRef]) -> None:
        checkpoint_ids = [ref.checkpoint_id for ref in refs]
        if checkpoint_ids:
            self.engine.delete_checkpoints(checkpoint_ids)

    def _start(self, work: Coroutine[None, None, object]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._behind.add(task)
        task.add_done_callback(self._behind.discard)

    async def sweep(self) -> None:
        """Turn expired conversations into tombstones and delete the checkpoints they pointed to."""
        self._delete_checkpoints(await self.ledger.sweep())

    async def settle(self) -> None:
        """Wait until everything written behind commits is done; for drains and tests."""
        while self._behind:
            await asyncio.wait(set(self._behind))

"""The turn protocol: how one turn of a conversation is opened, run, committed and checkpointed.

    lease and head  ->  state source  ->  tokens  ->  commit  ->  (reply)  ->  checkpoint, pointed to

A turn is applied when the ledger has it, and never otherwise: until `OpenTurn.commit` returns, the conversation is at
its previous version for everybody, and leaving an open turn without committing it leaves no trace. The ledger decides
who may commit; this module only keeps the lease alive and does the work in the right order. The state is written
behind the commit; whatever becomes of it costs time at the next turn, never data.

TurnError
├── ModelMismatch        the conversation's tokens belong to other weights
├── InitialStateConflict the conversation did not begin from the initial state that a turn names
└── LogCorrupt           the turn log does not hash to its recorded chain
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from dataclasses import dataclass
from typing import Protocol

import msgspec

from engine.client import AsyncEngine
from engine.errors import CheckpointError, EngineError, InitialStateUnavailable, StateUnavailable
from engine.messages import (
    CheckpointRef,
    CheckpointStored,
    FinishReason,
    GenerationRequest,
    InitialStateRef,
    ResumeKind,
    SamplingParams,
    SequenceOutput,
    SequenceStarted,
    StateSource,
    StopRules,
)
from engine.token_chain import extend_digest
from server.conversations.lease_keeper import LeaseKeeper
from server.conversations.ledger import (
    Conversation,
    ConversationBusy,
    ConversationExists,
    ConversationNotFound,
    Durability,
    Lease,
    LeaseLost,
    Ledger,
    LedgerError,
    LedgerUnavailable,
    Turn,
    VersionConflict,
)
from server.conversations.waiting_line import WaitingLine

logger = logging.getLogger(__name__)

# Hashing a token costs about a microsecond; longer lists leave the event loop.
MAX_TOKENS_HASHED_ON_LOOP = 4096

SequenceEvent = SequenceStarted | SequenceOutput


class TurnError(Exception):
    """Base of what the turn protocol itself raises."""


class ModelMismatch(TurnError):
    """The conversation's tokens belong to other weights than those being served."""


class InitialStateConflict(TurnError):
    """A turn names an initial state that its conversation did not begin from."""


class LogCorrupt(TurnError):
    """The turn log does not hash to the chain recorded with its last turn. Nothing is generated from it."""


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
    initial_state: InitialStateRef | None = None  # to begin with; naming it again later does no harm


@dataclass(frozen=True, slots=True)
class TurnReceipt:
    """What a committed turn can tell its client."""

    conversation_id: str
    version: int
    parent_version: int
    chain: bytes
    resume: ResumeKind
    durability: Durability
    num_history_tokens: int  # consumed before this turn's prompt
    num_replayed_tokens: int  # of those, how many were computed again

    @property
    def num_cached_tokens(self) -> int:
        """History tokens whose state was reused."""
        return self.num_history_tokens - self.num_replayed_tokens


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
    ) -> None:
        self.ledger = ledger
        self.engine = engine
        self.model = model
        self.observer = observer
        self.lease_seconds = lease_seconds
        self.conversation_ttl_seconds = conversation_ttl_seconds
        self.owner = uuid.uuid4().hex
        self._line = WaitingLine()
        self._behind: set[asyncio.Task[None]] = set()

    async def create(
        self,
        conversation_id: str,
        metadata: dict[str, str] | None = None,
        initial_state: InitialStateRef | None = None,
    ) -> Conversation:
        """Begin a conversation at version 0, from the zero state or from a tuned one; raises `ConversationExists`."""
        conversation = Conversation(
            conversation_id=conversation_id,
            version=0,
            chain=b"",
            num_tokens=0,
            model=self.model.name,
            fingerprint=self.model.fingerprint,
            template=self.model.template,
            created_at=time.time(),
            ttl_seconds=self.conversation_ttl_seconds,
            metadata=metadata or {},
            initial_state=initial_state,
        )
        conversation = msgspec.structs.replace(conversation, chain=conversation.root)
        await self.ledger.create(conversation)
        return conversation

    async def get(self, conversation_id: str) -> Conversation:
        """Return the head; raises `ConversationNotFound` or `ConversationExpired`."""
        return await self.ledger.get(conversation_id)

    async def delete(self, conversation_id: str) -> None:
        """Remove a conversation and every trace of its states; a turn that runs can no longer commit."""
        head = await self.ledger.delete(conversation_id)
        self.engine.forget_state(head.chain)
        if head.checkpoint is not None:
            self.engine.delete_checkpoints([head.checkpoint.checkpoint_id])

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
                await self.create(selector.conversation_id, initial_state=selector.initial_state)
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

    def save_behind(self, conversation_id: str, version: int, chain: bytes, num_tokens: int) -> None:
        """Write the state after turn `version` to the state store and point to it, without anybody waiting."""
        self._start(self._save(conversation_id, version, chain, num_tokens))

    async def _save(self, conversation_id: str, version: int, chain: bytes, num_tokens: int) -> None:
        try:
            stored = await self.engine.save_state(chain, num_tokens)
            self.observer.checkpoint_stored(stored)
            await self._point(conversation_id, version, stored.ref)
        except CheckpointError as error:
            self.observer.checkpoint_failed(type(error).__name__)
            logger.warning("state not checkpointed: the next resume may have to replay", extra={"reason": str(error)})
        except EngineError as error:
            self.observer.checkpoint_failed(type(error).__name__)
        except LedgerError as error:
            self.observer.checkpoint_failed(type(error).__name__)
            logger.warning("checkpoint not pointed to: it expires unused", extra={"reason": str(error)})

    async def _point(self, conversation_id: str, version: int, ref: CheckpointRef) -> None:
        garbage = await self.ledger.point(conversation_id, version, ref)
        if garbage is not None:
            self.engine.delete_checkpoints([garbage.checkpoint_id])

    def _start(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._behind.add(task)
        task.add_done_callback(self._behind.discard)

    async def sweep(self) -> None:
        """Turn expired conversations into tombstones and delete the checkpoints they pointed to."""
        garbage = await self.ledger.sweep()
        if garbage:
            self.engine.delete_checkpoints([ref.checkpoint_id for ref in garbage])

    async def settle(self) -> None:
        """Wait until everything written behind commits is done; for drains and tests."""
        while self._behind:
            await asyncio.wait(set(self._behind))


class OpenTurn:
    """The next turn of a conversation, while its lease is held: generate once, then commit."""

    def __init__(self, turns: Turns, keeper: LeaseKeeper, head: Conversation) -> None:
        self.conversation = head  # before the turn
        self.committed = False
        self._turns = turns
        self._keeper = keeper
        self._request: GenerationRequest | None = None
        self._started: SequenceStarted | None = None
        self._output_ids: list[int] = []
        self._finish_reason: FinishReason | None = None

    async def generate(
        self,
        prompt_ids: list[int],
        sampling: SamplingParams,
        stop: StopRules,
        num_prompt_logprobs: int | None = None,
    ) -> AsyncIterator[SequenceEvent]:
        """Consume `prompt_ids` after the conversation's history and yield what comes of it.

        The first event is the `SequenceStarted` of the attempt that works: a state that cannot be had is replayed from
        the log. Raises `LeaseLost` as soon as it is known, `LogCorrupt`, and what `AsyncEngine.generate` raises.
        """
        assert self._request is None, "a turn generates once"
        self._request = request = GenerationRequest(
            request_id=uuid.uuid4().hex,
            prompt_ids=prompt_ids,
            sampling=sampling,
            stop=stop,
            source=await self._newest_source(),
            keep_state=True,
            num_prompt_logprobs=num_prompt_logprobs,
        )
        async with contextlib.aclosing(self._run_or_replay(request)) as events:
            async for event in events:
                self._keeper.check()
                self._record(event)
                yield event

    async def commit(self) -> TurnReceipt:
        """Append the turn to the ledger; when this returns it is applied, and its state is being written behind.

        Raises `LeaseLost` or `VersionConflict` (nothing was applied), `LedgerUnavailable` (ask for the version).
        """
        assert self._request is not None, "commit follows a finished generation"
        assert self._started is not None, "commit follows a finished generation"
        assert self._finish_reason in (FinishReason.STOP, FinishReason.LENGTH), "only a finished turn can be applied"
        turn = await self._turn(self._request, self._finish_reason)
        started_at = time.perf_counter()
        try:
            # Shielded: once sent, a commit's outcome must be known here even if the client leaves meanwhile.
            await asyncio.shield(self._commit(turn))
        except (LeaseLost, VersionConflict):
            self._turns.observer.turn_refused("lease_lost")
            raise
        self._turns.observer.turn_committed(self._turns.ledger.durability, time.perf_counter() - started_at)
        return TurnReceipt(
            conversation_id=self.conversation.conversation_id,
            version=turn.version,
            parent_version=self.conversation.version,
            chain=turn.chain,
            resume=self._started.resume,
            durability=self._turns.ledger.durability,
            num_history_tokens=self.conversation.num_tokens,
            num_replayed_tokens=self._started.num_replayed_tokens,
        )

    async def _commit(self, turn: Turn) -> None:
        try:
            await self._turns.ledger.commit(self._keeper.lease, turn)
        except LedgerUnavailable:
            # Perhaps only the reply was lost: the same turn again is recognised, or applied now, or refused.
            await self._turns.ledger.commit(self._keeper.lease, turn)
        self.committed = True  # and the lease has ended with it
        self._turns.lease_ended(self.conversation.conversation_id)
        self._turns.save_behind(self.conversation.conversation_id, turn.version, turn.chain, turn.num_tokens)

    async def _turn(self, request: GenerationRequest, finish_reason: FinishReason) -> Turn:
        consumed = request.prompt_ids + self._output_ids
        return Turn(
            version=self.conversation.version + 1,
            prompt_ids=request.prompt_ids,
            output_ids=self._output_ids,
            chain=await _extend(self.conversation.chain, consumed),
            num_tokens=self.conversation.num_tokens + len(consumed),
            finish_reason=finish_reason.value,
            seed=request.sampling.seed,
            created_at=time.time(),
            request_id=request.request_id,
        )

    def _record(self, event: SequenceEvent) -> None:
        if isinstance(event, SequenceStarted):
            self._started = event
            self._turns.observer.turn_resumed(event.resume, event.num_replayed_tokens)
        else:
            self._output_ids.extend(event.token_ids)
            self._finish_reason = event.finish_reason or self._finish_reason

    async def _run_or_replay(self, request: GenerationRequest) -> AsyncGenerator[SequenceEvent]:
        try:
            async with contextlib.aclosing(self._turns.engine.generate(request)) as events:
                async for event in events:
                    yield event
            return
        except StateUnavailable as unavailable:
            if request.source.checkpoint is None:
                raise
            logger.warning("state not available: replaying the log", extra={"reason": str(unavailable)})
        whole = GenerationRequest(
            request_id=request.request_id,
            prompt_ids=request.prompt_ids,
            sampling=request.sampling,
            stop=request.stop,
            source=await self._whole_source(),
            keep_state=True,
            num_prompt_logprobs=request.num_prompt_logprobs,
        )
        async with contextlib.aclosing(self._turns.engine.generate(whole)) as events:
            async for event in events:
                yield event

    async def _newest_source(self) -> StateSource:
        """Name the history's state, its newest checkpoint, and the tokens after that."""
        head = self.conversation
        if head.checkpoint is None:
            return await self._whole_source()
        replay_ids = await self._log_ids(after_version=head.checkpoint_version)
        await self._verify(head.checkpoint.chain, replay_ids)
        return StateSource(
            num_tokens=head.num_tokens,
            chain=head.chain,
            checkpoint=head.checkpoint,
            replay_ids=replay_ids,
            initial_state=head.initial_state,
        )

    async def _whole_source(self) -> StateSource:
        """Name the history's state and all its tokens."""
        replay_ids = await self._log_ids(after_version=0)
        head = self.conversation
        await self._verify(head.root, replay_ids)
        return StateSource(
            num_tokens=head.num_tokens, chain=head.chain, replay_ids=replay_ids, initial_state=head.initial_state
        )

    async def _log_ids(self, after_version: int) -> list[int]:
        if after_version == self.conversation.version:
            return []
        turns = await self._turns.ledger.turns(self.conversation.conversation_id, after_version)
        return [token_id for turn in turns for token_id in (*turn.prompt_ids, *turn.output_ids)]

    async def _verify(self, digest: bytes, replay_ids: list[int]) -> None:
        if await _extend(digest, replay_ids) != self.conversation.chain:
            raise LogCorrupt(f"the log of conversation {self.conversation.conversation_id!r} does not match its chain")


async def _extend(digest: bytes, token_ids: list[int]) -> bytes:
    if len(token_ids) <= MAX_TOKENS_HASHED_ON_LOOP:
        return extend_digest(digest, token_ids)
    return await asyncio.to_thread(extend_digest, digest, token_ids)

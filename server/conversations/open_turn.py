"""An open turn: the next entry of a log, from where it begins to its commit.

A turn continues the head, or begins again from the empty history when its preamble is another: then everything that
was said is carried into it. Text is not this module's: it says what is to be rendered, and is given tokens.

TurnError
├── ModelMismatch        the conversation's tokens belong to other weights
├── InitialStateConflict the conversation did not begin from the initial state that a turn names
├── VersionUnknown       the log has no entry of that version
└── LogCorrupt           the turn log does not hash to its recorded chain
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from engine.client import Hear, SequenceEvent
from engine.errors import StateUnavailable
from engine.messages import (
    CheckpointRef,
    FinishReason,
    GenerationRequest,
    ResumeKind,
    SamplingParams,
    SequenceStarted,
    StateSource,
    StopRules,
)
from engine.token_chain import extend_digest
from server.conversations.counted_tokens import NUM_COUNTED_TOKENS, counted_tokens
from server.conversations.history import History, history_of, is_marker, path_to, root_of
from server.conversations.lease_keeper import LeaseKeeper
from server.conversations.ledger import (
    Answer,
    Conversation,
    Durability,
    Item,
    LeaseLost,
    LedgerUnavailable,
    Turn,
    VersionConflict,
)

if TYPE_CHECKING:
    from server.conversations.turns import Turns

logger = logging.getLogger(__name__)

# Hashing a token costs about a microsecond; longer lists leave the event loop.
MAX_TOKENS_HASHED_ON_LOOP = 4096


class TurnError(Exception):
    """Base of what the turn protocol itself raises."""


class ModelMismatch(TurnError):
    """The conversation's tokens belong to other weights than those being served."""


class InitialStateConflict(TurnError):
    """A turn names an initial state that its conversation did not begin from."""


class VersionUnknown(TurnError):
    """The log has no entry of the version asked for."""

    def __init__(self, conversation_id: str, version: int) -> None:
        self.version = version
        super().__init__(f"conversation {conversation_id!r} has no version {version}")


class LogCorrupt(TurnError):
    """The turn log does not hash to the chain recorded with its last turn. Nothing is generated from it."""


@dataclass(frozen=True, slots=True)
class Base:
    """Where the next turn begins, and what it must render before its own messages."""

    parent_version: int
    num_tokens: int
    chain: bytes
    preamble: str
    items: Sequence[Item] = ()  # not rendered yet, or to be rendered again
    answers: Mapping[str, Answer] = field(default_factory=dict)  # the tokens of those among them that are answers
    carries: bool = False  # whether the turn says `items` again, so that they belong to it


@dataclass(frozen=True, slots=True)
class TurnContent:
    """What a turn says, apart from its tokens."""

    items: Sequence[Item] = ()  # inputs, then outputs
    opening: str = ""
    hint: str = ""
    reply_id: str = ""
    reply: bytes = b""


NOTHING_SAID = TurnContent()


@dataclass(frozen=True, slots=True)
class TurnReceipt:
    """What a turn can tell its client, once it is committed."""

    conversation_id: str
    version: int
    parent_version: int
    resume: ResumeKind
    durability: Durability
    num_history_tokens: int  # consumed before this turn's prompt
    num_replayed_tokens: int  # of those, how many were computed again

    @property
    def num_cached_tokens(self) -> int:
        """History tokens whose state was reused."""
        return self.num_history_tokens - self.num_replayed_tokens


class OpenTurn:
    """The next entry of a log, while its lease is held: generate and commit once, or mark once."""

    def __init__(self, turns: Turns, keeper: LeaseKeeper, head: Conversation) -> None:
        self.conversation = head  # before the turn
        self.committed = False
        self._turns = turns
        self._keeper = keeper
        self._checkpoints = dict(head.checkpoints)
        self._base: Base | None = None
        self._request: GenerationRequest | None = None
        self._started: SequenceStarted | None = None
        self._output_ids: list[int] = []
        self._finish_reason: FinishReason | None = None

    # -- where it begins ----------------------------------------------------------------------------------------------

    async def base(self, preamble: str | None = None) -> Base:
        """Return where the turn begins if its history is to begin with `preamble`; None: with whatever it does.

        Asked for once, before `generate`. A history that begins with another preamble is said again from the start.
        """
        assert self._base is None, "a turn has one base"
        self._base = base = await self._find_base(preamble)
        return base

    async def _find_base(self, preamble: str | None) -> Base:
        head = self.conversation
        if head.version == 0:
            return Base(0, 0, head.chain, preamble or "")
        last = (await self._entries(head.version - 1))[-1]
        begins_again = preamble is not None and preamble != last.preamble
        if not begins_again and not is_marker(last):
            return Base(head.version, head.num_tokens, head.chain, last.preamble)
        history = await self.history()
        if begins_again:
            return Base(0, 0, history.root, preamble or "", history.items, history.answers, carries=True)
        return Base(head.version, head.num_tokens, head.chain, last.preamble, history.pending, history.answers)

    def borrow(self, checkpoints: Mapping[int, CheckpointRef]) -> None:
        """Begin from these checkpoints as well, which are another log's, of the same tokens."""
        self._checkpoints |= checkpoints

    async def history(self, version: int | None = None) -> History:
        """Return the whole history that leads to `version`, or to the head; raises `VersionUnknown`."""
        head = self.conversation
        if version is None:
            version = head.version
        if not 0 <= version <= head.version:
            raise VersionUnknown(head.conversation_id, version)
        return history_of(head.conversation_id, await self._entries(0), version, head.initial_state)

    async def _entries(self, after_version: int) -> list[Turn]:
        if after_version == self.conversation.version:
            return []
        return await self._turns.ledger.turns(self.conversation.conversation_id, after_version)

    # -- what it generates --------------------------------------------------------------------------------------------

    async def generate(
        self,
        prompt_ids: list[int],
        sampling: SamplingParams,
        stop: StopRules,
        num_prompt_logprobs: int | None = None,
        *,
        hear: Hear,
        priority: int = 0,
        keep_state: bool = True,
        borders: Sequence[int] = (),
    ) -> None:
        """Consume `prompt_ids` after the base's history and call `hear` with what comes of it.

        The `borders` of a prompt without history are where it may begin at a state that others left, or leave one.

        The first event is the `SequenceStarted` of the attempt that works: a state that cannot be had is replayed from
        the log. Raises `LeaseLost` as soon as it is known, `LogCorrupt`, and what `AsyncEngine.run` raises.
        """
        assert self._request is None, "a turn generates once"
        if self._base is None:
            await self.base()
        source = await self._newest_source()
        self._request = request = GenerationRequest(
            request_id=uuid.uuid4().hex,
            prompt_ids=prompt_ids,
            sampling=sampling,
            stop=stop,
            source=source,
            keep_state=keep_state,
            num_prompt_logprobs=num_prompt_logprobs,
            priority=priority,
            counted_ids=await self._counted_ids(sampling),
            borders=list(borders) if source.num_tokens == 0 else [],
        )

        def record(event: SequenceEvent) -> None:
            self._keeper.check()
            self._record(event)
            hear(event)

        await self._run_or_replay(request, record)

    async def _counted_ids(self, sampling: SamplingParams) -> list[int]:
        """Return what the conversation generated last, if penalties count it."""
        if not sampling.has_penalties or self.conversation.version == 0:
            return []
        return await counted_tokens(self._entries, self.conversation.version, NUM_COUNTED_TOKENS)

    async def consume_instead(self, prompt_ids: list[int], output_ids: list[int]) -> None:
        """Let the turn have said `output_ids` after `prompt_ids`, whatever was generated: only that is remembered.

        For thoughts that are not to be kept. Raises as `generate`.
        """
        assert self._request is not None, "something was generated"
        consumed = msgspec.structs.replace(
            self._request,
            request_id=uuid.uuid4().hex,
            prompt_ids=prompt_ids + output_ids,
            stop=StopRules(max_tokens=0),
            counted_ids=[],
            borders=[],
            keep_state=True,
            num_prompt_logprobs=None,
        )
        await self._run_or_replay(consumed, hear=lambda _: self._keeper.check())
        self._request = msgspec.structs.replace(self._request, prompt_ids=prompt_ids)
        self._output_ids = output_ids

    # -- how it ends --------------------------------------------------------------------------------------------------

    @property
    def receipt(self) -> TurnReceipt:
        """What the client will be told once the turn is committed; known when the generation has finished."""
        assert self._base is not None, "generated from a base"
        assert self._started is not None, "generated"
        return TurnReceipt(
            conversation_id=self.conversation.conversation_id,
            version=self.conversation.version + 1,
            parent_version=self._base.parent_version,
            resume=self._started.resume,
            durability=self._turns.ledger.durability,
            num_history_tokens=self._base.num_tokens,
            num_replayed_tokens=self._started.num_replayed_tokens,
        )

    async def commit(self, content: TurnContent = NOTHING_SAID) -> TurnReceipt:
        """Append the turn to the ledger; when this returns it is applied, and its state is being written behind.

        Raises `LeaseLost` or `VersionConflict` (nothing was applied), `LedgerUnavailable` (ask for the version).
        """
        assert self._request is not None, "commit follows a finished generation"
        assert self._finish_reason in (FinishReason.STOP, FinishReason.LENGTH), "only a finished turn can be applied"
        turn = await self._turn(self._request, self._finish_reason, content)
        await self._append(turn)
        self._turns.save_behind(self.conversation, turn)
        return self.receipt

    async def mark(
        self, history: History, items: Sequence[Item] = (), answers: Sequence[Answer] = (), num_carried: int = 0
    ) -> Turn:
        """Append an entry that generates nothing: the head's history is now `history`, and `items` are said after it.

        `items` will be rendered by the next turn; the first `num_carried` were said before on another path, and
        `answers` are the tokens of those that are answers. Raises as `commit`.
        """
        assert self._request is None, "a turn marks or generates"
        turn = marker(self.conversation, history, items, answers, num_carried)
        await self._append(turn)
        return turn

    async def _append(self, turn: Turn) -> None:
        started_at = time.perf_counter()
        try:
            # Shielded: once sent, a commit's outcome must be known here even if the client leaves meanwhile.
            await asyncio.shield(self._commit(turn))
        except (LeaseLost, VersionConflict):
            self._turns.observer.turn_refused("lease_lost")
            raise
        self._turns.observer.turn_committed(self._turns.ledger.durability, time.perf_counter() - started_at)

    async def _commit(self, turn: Turn) -> None:
        try:
            await self._turns.ledger.commit(self._keeper.lease, turn)
        except LedgerUnavailable:
            # Perhaps only the reply was lost: the same turn again is recognised, or applied now, or refused.
            await self._turns.ledger.commit(self._keeper.lease, turn)
        self.committed = True  # and the lease has ended with it
        self._turns.lease_ended(self.conversation.conversation_id)

    async def _turn(self, request: GenerationRequest, finish_reason: FinishReason, content: TurnContent) -> Turn:
        assert self._base is not None, "generated from a base"
        base = self._base
        carried = base.items if base.carries else ()
        answer_ids = {item.answer_id for item in carried}
        consumed = request.prompt_ids + self._output_ids
        return Turn(
            version=self.conversation.version + 1,
            parent_version=base.parent_version,
            prompt_ids=request.prompt_ids,
            output_ids=self._output_ids,
            chain=await _extend(base.chain, consumed),
            num_tokens=base.num_tokens + len(consumed),
            finish_reason=finish_reason.value,
            seed=request.sampling.seed,
            created_at=time.time(),
            request_id=request.request_id,
            items=[*carried, *content.items],
            num_carried=len(carried),
            answers=[answer for answer_id, answer in base.answers.items() if answer_id in answer_ids],
            opening=content.opening,
            hint=content.hint,
            preamble=base.preamble,
            reply_id=content.reply_id,
            reply=content.reply,
        )

    @property
    def answer_id(self) -> str:
        """What the items of the turn's answer are marked with."""
        assert self._request is not None, "known when the generation has begun"
        return self._request.request_id

    def _record(self, event: SequenceEvent) -> None:
        if isinstance(event, SequenceStarted):
            self._started = event
            self._turns.observer.turn_resumed(event.resume, event.num_replayed_tokens)
        else:
            self._output_ids.extend(event.token_ids)
            self._finish_reason = event.finish_reason or self._finish_reason

    # -- the state it begins from -------------------------------------------------------------------------------------

    async def _run_or_replay(self, request: GenerationRequest, hear: Hear) -> None:
        try:
            await self._turns.engine.run(request, hear)
            return
        except StateUnavailable as unavailable:
            if request.source.checkpoint is None:
                raise
            logger.warning("state not available: replaying the log", extra={"reason": str(unavailable)})
        whole = msgspec.structs.replace(request, source=await self._whole_source())
        await self._turns.engine.run(whole, hear)

    async def _newest_source(self) -> StateSource:
        """Name the base's state, its newest checkpoint, and the tokens after that."""
        assert self._base is not None, "a turn begins somewhere"
        head = self.conversation
        if self._base.num_tokens == 0 or not self._checkpoints:
            return await self._whole_source()
        newest = max(self._checkpoints)
        since = path_to(await self._entries(newest), head.version, newest)
        if since is None:  # the newest checkpoint is of another path
            return await self._whole_source(self._checkpoints)
        return await self._source(self._checkpoints[newest], History(b"", tuple(since)).token_ids())

    async def _whole_source(self, checkpoints: Mapping[int, CheckpointRef] | None = None) -> StateSource:
        """Name the base's state and all its tokens, or those after the newest of `checkpoints` on its path."""
        assert self._base is not None, "a turn begins somewhere"
        head = self.conversation
        if self._base.num_tokens == 0:
            root = root_of(head.conversation_id, head.initial_state)
            return StateSource(num_tokens=0, chain=root, initial_state=head.initial_state)
        history = await self.history()
        if (newest := history.newest(checkpoints or {})) is None:
            return await self._source(None, history.token_ids())
        version, checkpoint = newest
        return await self._source(checkpoint, history.token_ids(version))

    async def _source(self, checkpoint: CheckpointRef | None, replay_ids: list[int]) -> StateSource:
        head = self.conversation
        begin = root_of(head.conversation_id, head.initial_state) if checkpoint is None else checkpoint.chain
        if await _extend(begin, replay_ids) != head.chain:
            raise LogCorrupt(f"the log of conversation {head.conversation_id!r} does not match its chain")
        return StateSource(
            num_tokens=head.num_tokens,
            chain=head.chain,
            checkpoint=checkpoint,
            replay_ids=replay_ids,
            initial_state=head.initial_state,
        )


def marker(
    head: Conversation,
    history: History,
    items: Sequence[Item] = (),
    answers: Sequence[Answer] = (),
    num_carried: int = 0,
) -> Turn:
    """Return an entry that comes after `head` and generates nothing; see `OpenTurn.mark`."""
    return Turn(
        version=head.version + 1,
        parent_version=history.version,
        prompt_ids=[],
        output_ids=[],
        chain=history.chain,
        num_tokens=history.num_tokens,
        finish_reason="",
        seed=0,
        created_at=time.time(),
        request_id=uuid.uuid4().hex,
        items=list(items),
        num_carried=num_carried,
        answers=list(answers),
        preamble=history.preamble,
    )


async def _extend(digest: bytes, token_ids: list[int]) -> bytes:
    if len(token_ids) <= MAX_TOKENS_HASHED_ON_LOOP:
        return extend_digest(digest, token_ids)
    return await asyncio.to_thread(extend_digest, digest, token_ids)

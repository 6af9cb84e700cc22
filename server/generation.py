"""From a prompt to choices: what is generated for one request, as events that both forms of a reply are made of.

A request generates in a task of its own, which lives no longer than its reader: when the client leaves, the task is
cancelled, the engine aborts within a step and an open turn is not applied. A turn is committed before the event that
says how it ended (promise P1).
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

from engine.messages import (
    FinishReason,
    GenerationRequest,
    InitialStateRef,
    SamplingParams,
    SequenceOutput,
    SequenceStarted,
    StateSource,
    StopRules,
    TokenLogprobs,
)
from engine.token_chain import root_digest
from engine.tokenizer import Detokenizer
from server.conversations.turns import OpenTurn, SequenceEvent, TurnReceipt
from server.drain import Drain
from server.errors import ServerDraining
from server.services import Services


@dataclass(frozen=True, slots=True)
class Started:
    """The choice has a slot."""

    index: int


@dataclass(frozen=True, slots=True)
class Prompted:
    """The prompt is consumed. `logprobs` has an entry for every prompt token, `None` for the first, if asked for."""

    index: int
    prompt_ids: list[int]
    logprobs: list[TokenLogprobs | None] | None


@dataclass(frozen=True, slots=True)
class Delivered:
    """Tokens have come. `text` is what they complete; it may be empty."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None


@dataclass(frozen=True, slots=True)
class Finished:
    """The choice is complete; if it was a turn of a conversation, the turn is applied."""

    index: int
    reason: FinishReason
    stop_reason: int | bytes | None
    num_output_tokens: int
    receipt: TurnReceipt | None
    stop_logprobs: TokenLogprobs | None = None  # of the stop token that ended it, if asked for


ChoiceEvent = Started | Prompted | Delivered | Finished


@dataclass(frozen=True, slots=True)
class ChoicePlan:
    """One choice to generate."""

    index: int
    prompt_ids: list[int]
    sampling: SamplingParams
    stop: StopRules
    num_prompt_logprobs: int | None = None
    initial_state: InitialStateRef | None = None  # what a choice outside a conversation begins from


class Generation:
    """The choices of one request while they are generated.

    Iterate to read their events; `aclose` when done, or the work goes on for nobody.
    """

    def __init__(self, drain: Drain, work: Callable[[Generation], Awaitable[None]]) -> None:
        self._drain = drain
        self._events: asyncio.Queue[ChoiceEvent | None] = asyncio.Queue()  # bounded by max_output_tokens
        self._interruption: Exception | None = None
        self._is_committing = False
        self._first: ChoiceEvent | None = None
        self._task = asyncio.create_task(self._run(work))
        self._drain.add(self)

    async def _run(self, work: Callable[[Generation], Awaitable[None]]) -> None:
        try:
            await work(self)
        except asyncio.CancelledError:
            if self._interruption is None:
                raise
            raise self._interruption from None
        finally:
            self._drain.discard(self)
            self._events.put_nowait(None)

    # -- for the work -------------------------------------------------------------------------------------------------

    def emit(self, event: ChoiceEvent) -> None:
        """Tell the reader."""
        self._events.put_nowait(event)

    def begin_commit(self) -> None:
        """From here on the outcome is the ledger's: no interruption may claim that nothing was applied."""
        self._is_committing = True

    # -- for the drain ------------------------------------------------------------------------------------------------

    def interrupt(self, error: Exception) -> None:
        """End with `error`, unless the turn is already being committed."""
        if not self._is_committing and not self._task.done():
            self._interruption = error
            self._task.cancel()

    # -- for the reader -----------------------------------------------------------------------------------------------

    async def admitted(self, timeout_seconds: float) -> None:
        """Return at the first event, or after `timeout_seconds`; raises what kept the work from beginning."""
        try:
            self._first = await asyncio.wait_for(self._events.get(), timeout_seconds)
        except TimeoutError:
            return
        if self._first is None:
            await self._task

    async def __aiter__(self) -> AsyncIterator[ChoiceEvent]:
        """Yield every event; raises what ended the work early."""
        if self._first is not None:
            yield self._first
        while (event := await self._events.get()) is not None:
            yield event
        await self._task

    async def aclose(self) -> None:
        """End the work if it still runs, and wait for its end."""
        self._task.cancel()
        await asyncio.wait([self._task])
        if not self._task.cancelled():
            self._task.exception()  # the reader has heard of it, or left


# -- the work itself --------------------------------------------------------------------------------------------------


async def generate_choices(services: Services, generation: Generation, plans: Sequence[ChoicePlan]) -> None:
    """Generate independent choices, all at once, each from its initial state."""
    try:
        async with asyncio.TaskGroup() as group:
            for plan in plans:
                group.create_task(_generate_choice(services, generation, plan))
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None  # the first to fail cancelled the others


async def _generate_choice(services: Services, generation: Generation, plan: ChoicePlan) -> None:
    request = GenerationRequest(
        request_id=uuid.uuid4().hex,
        prompt_ids=plan.prompt_ids,
        sampling=plan.sampling,
        stop=plan.stop,
        source=_beginning(plan.initial_state),
        num_prompt_logprobs=plan.num_prompt_logprobs,
    )
    last = await _follow(services, generation, plan, services.engine.generate(request))
    generation.emit(last)


def _beginning(initial_state: InitialStateRef | None) -> StateSource:
    chain = root_digest(initial_state="" if initial_state is None else initial_state.fingerprint)
    return StateSource(num_tokens=0, chain=chain, initial_state=initial_state)


async def generate_turn(services: Services, generation: Generation, turn: OpenTurn, plan: ChoicePlan) -> None:
    """Generate the next turn of a conversation and commit it."""
    events = turn.generate(plan.prompt_ids, plan.sampling, plan.stop, plan.num_prompt_logprobs)
    last = await _follow(services, generation, plan, events)
    generation.begin_commit()
    receipt = await turn.commit()
    generation.emit(replace(last, receipt=receipt))


async def _follow(
    services: Services, generation: Generation, plan: ChoicePlan, events: AsyncIterator[SequenceEvent]
) -> Finished:
    """Emit what the engine tells of one sequence; return its end, which is not told yet."""
    choice = _Choice(services, generation, plan)
    async for event in events:
        if isinstance(event, SequenceStarted):
            choice.started(event)
        else:
            choice.advanced(event)
    return choice.finished()


class _Choice:
    """One choice while it grows."""

    def __init__(self, services: Services, generation: Generation, plan: ChoicePlan) -> None:
        self._generation = generation
        self._plan = plan
        self._clock = services.metrics.engine.watch(len(plan.prompt_ids))
        self._detokenizer = Detokenizer(services.tokenizer)
        self._prompt_logprobs: list[TokenLogprobs | None] = []
        self._is_prompted = False
        self._last: SequenceOutput | None = None
        self._num_output_tokens = 0

    def started(self, event: SequenceStarted) -> None:
        """The choice has a slot."""
        self._clock.started(event)
        self._generation.emit(Started(self._plan.index))

    def advanced(self, event: SequenceOutput) -> None:
        """Emit what a step brought."""
        is_last = event.finish_reason is not None
        self._prompt_logprobs += [entry for entry in event.prompt_logprobs or () if entry is not None]
        if event.token_ids or is_last:
            self._prompted()
        text = self._detokenizer.push(event.token_ids)
        if is_last:
            text += self._detokenizer.flush()
            self._last = event
        if event.token_ids or text:
            self._clock.delivered()
            self._num_output_tokens += len(event.token_ids)
            self._generation.emit(Delivered(self._plan.index, text, event.token_ids, event.logprobs))

    def _prompted(self) -> None:
        if self._is_prompted:
            return
        self._is_prompted = True
        asked = self._plan.num_prompt_logprobs is not None
        logprobs = [None, *self._prompt_logprobs] if asked else None
        self._generation.emit(Prompted(self._plan.index, self._plan.prompt_ids, logprobs))

    def finished(self) -> Finished:
        """Return how it ended; raises `ServerDraining` if the engine cut it short."""
        last = self._last
        assert last is not None, "the engine ends every sequence, or raises"
        assert last.finish_reason is not None, "kept because it has one"
        self._clock.finished(last.finish_reason, last.num_sampled_tokens)
        if last.finish_reason is FinishReason.ABORT:
            raise ServerDraining  # a client that leaves hears nothing: only a drain aborts for somebody who listens
        return Finished(
            self._plan.index, last.finish_reason, last.stop_reason, self._num_output_tokens, None, last.stop_logprobs
        )

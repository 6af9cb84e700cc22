"""From a prompt to choices: what is generated for one request, as events that both forms of a reply are made of.

A request generates in a task of its own, which lives no longer than its reader: when the client leaves, the task is
cancelled, the engine aborts within a step and an open turn is not applied. A client may ask that it be finished all the
same (promise P3). A turn is committed before the event that says how it ended (promise P1).
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import msgspec

from engine.client import Hear, SequenceEvent
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
from server.conversations.open_turn import OpenTurn, TurnContent, TurnReceipt
from server.drain import Drain
from server.errors import ServerDraining
from server.rate_limits import Budget
from server.services import Services
from server.templates import RenderedPrompt

logger = logging.getLogger(__name__)

# Events are msgspec structs because one is made for every token: a frozen dataclass takes five times as long.


class Started(msgspec.Struct, frozen=True):
    """The choice has a slot."""

    index: int


class Prompted(msgspec.Struct, frozen=True):
    """The prompt is consumed. `logprobs` has an entry for every prompt token, `None` for the first, if asked for."""

    index: int
    prompt_ids: list[int]
    logprobs: list[TokenLogprobs | None] | None


class Delivered(msgspec.Struct, frozen=True, gc=False):
    """Tokens have come. `text` is what they complete; it may be empty."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None


class Finished(msgspec.Struct, frozen=True):
    """The choice is complete; if it was a turn of a conversation, the turn is applied."""

    index: int
    reason: FinishReason
    stop_reason: int | bytes | None
    num_output_tokens: int
    receipt: TurnReceipt | None
    num_cached_tokens: int = 0  # of the prompt, not computed: a kept state had consumed them
    num_kept_tokens: int = 0  # of the prompt, computed, and a state that has consumed them is kept
    stop_logprobs: TokenLogprobs | None = None  # of the stop token that ended it, if asked for


ChoiceEvent = Started | Prompted | Delivered | Finished


@dataclass(frozen=True, slots=True)
class Outcome:
    """One choice at its end: everything that its events say, in as few of them."""

    prompted: Prompted
    whole: Delivered
    finished: Finished

    @property
    def events(self) -> tuple[ChoiceEvent, ...]:
        """What a reader would hear who heard it all at once."""
        said = (self.whole,) if self.whole.token_ids or self.whole.text else ()
        return (Started(self.finished.index), self.prompted, *said, self.finished)


@dataclass(frozen=True, slots=True)
class ChoicePlan:
    """One choice to generate."""

    index: int
    prompt_ids: list[int]
    sampling: SamplingParams
    stop: StopRules
    num_prompt_logprobs: int | None = None
    priority: int = 0
    borders: Sequence[int] = ()  # where others may have been before, or may come: see `GenerationRequest.borders`
    keep_state: bool = False  # of a choice without conversation: its answer may come back as history
    initial_state: InitialStateRef | None = None  # what a choice outside a conversation begins from


class Generation:
    """The choices of one request while they are generated.

    One reader takes their events; `aclose` when done, or the work goes on for nobody.
    """

    def __init__(
        self,
        drain: Drain,
        budget: Budget,
        work: Callable[[Generation], Awaitable[None]],
        *,
        outlives_reader: bool = False,
    ) -> None:
        """Begin the work, at the cost of `budget`; raises `RateLimitExceeded`.

        If it `outlives_reader`, closing lets it go on to its end, for nobody.
        """
        budget.begin()
        self._outlives_reader = outlives_reader
        self._is_heard = True
        self._drain = drain
        self._budget = budget
        self._loop = asyncio.get_running_loop()
        self._events: list[ChoiceEvent] = []  # not taken yet; bounded by max_output_tokens
        self._arrival: asyncio.Future[None] | None = None  # what a reader waits for
        self._hear: Callable[[ChoiceEvent], bool] = lambda _: False  # what a reader is called by
        self.interruption: Exception | None = None  # why it is cancelled, if that is not because the reader left
        self.is_committing = False  # or has committed
        self._has_ended = False
        self._task = asyncio.create_task(self._run(work))
        self._task.add_done_callback(self._end)  # also of a task that never came to run
        self._drain.add(self)

    async def _run(self, work: Callable[[Generation], Awaitable[None]]) -> None:
        try:
            await work(self)
        except asyncio.CancelledError:
            if self.interruption is None:
                raise
            raise self.interruption from None

    def _end(self, _: asyncio.Task[None]) -> None:
        self._budget.end()
        self._drain.discard(self)
        self._has_ended = True
        self._wake_reader()

    # -- for the work -------------------------------------------------------------------------------------------------

    def emit(self, event: ChoiceEvent) -> None:
        """Tell the reader, and count what it cost; raises what a reader raises who is called."""
        if isinstance(event, Delivered):  # nearly always
            self._budget.spend_tokens(len(event.token_ids))
        elif isinstance(event, Prompted):
            self._budget.spend_tokens(len(event.prompt_ids))
        if self._is_heard and (self._events or not self._hear(event)):
            self._events.append(event)
            self._wake_reader()

    def _wake_reader(self) -> None:
        if self._arrival is not None:
            if not self._arrival.done():
                self._arrival.set_result(None)
            self._arrival = None

    def begin_commit(self) -> None:
        """From here on the outcome is the ledger's: no interruption may claim that nothing was applied."""
        self.is_committing = True

    # -- for the drain ------------------------------------------------------------------------------------------------

    def interrupt(self, error: Exception) -> None:
        """End with `error`, unless the turn is already being committed, or another error is ending it.

        The work cleans up as it ends; a second interruption must not cut that short.
        """
        if not self.is_committing and not self._task.done() and self.interruption is None:
            self.interruption = error
            self._task.cancel()

    # -- for the reader -----------------------------------------------------------------------------------------------

    async def admitted(self, timeout_seconds: float) -> None:
        """Return at the first event, or after `timeout_seconds`; raises what kept the work from beginning."""
        try:
            await asyncio.wait_for(self._arrived(), timeout_seconds)
        except TimeoutError:
            return
        if not self._events:
            await self._task

    def attend(self, hear: Callable[[ChoiceEvent], bool]) -> None:
        """From now on call `hear` with events before they wait for `take`, unless others wait already.

        It says whether that was all; if not, the event waits. Waking a reader costs more than what most do with one.
        """
        self._hear = hear

    async def take(self) -> list[ChoiceEvent]:
        """Return what has come since the last time, waiting for something; nothing when all is said.

        What was delivered of a choice meanwhile is one event: whoever is late has less to do. Raises what ended the
        work early, after the events before it.
        """
        if not self._events:
            await self._arrived()
            if not self._events:
                await self._task
        events, self._events = self._events, []
        return events if len(events) == 1 else _joined(events)

    async def _arrived(self) -> None:
        if not self._events and not self._has_ended:
            self._arrival = self._loop.create_future()
            await self._arrival

    async def aclose(self) -> None:
        """End the work if it still runs, and wait for its end; or leave it alone, if it is to outlive its reader."""
        if self._outlives_reader and not self._task.done():
            self._go_on_alone()
            return
        self._task.cancel()
        await asyncio.wait([self._task])
        if not self._task.cancelled():
            self._task.exception()  # the reader has heard of it, or left

    def _go_on_alone(self) -> None:
        self._is_heard, self._events = False, []
        self._drain.keep()  # its request has not ended with its answer
        self._task.add_done_callback(self._ended_alone)

    def _ended_alone(self, task: asyncio.Task[None]) -> None:
        self._drain.leave()
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.warning("what a client had left to be finished failed", extra={"reason": type(error).__name__})


def _joined(events: list[ChoiceEvent]) -> list[ChoiceEvent]:
    """Return `events` with all that is delivered of one choice as one, where the first stood: nothing comes between."""
    delivered: defaultdict[int, list[Delivered]] = defaultdict(list)
    told: list[ChoiceEvent] = []
    for event in events:
        if isinstance(event, Delivered):
            delivered[event.index].append(event)
            if len(delivered[event.index]) > 1:
                continue
        told.append(event)
    return [_whole(delivered[event.index]) if isinstance(event, Delivered) else event for event in told]


def _whole(parts: list[Delivered]) -> Delivered:
    """Return consecutive parts of one choice as one."""
    if len(parts) == 1:
        return parts[0]
    logprobs = [part.logprobs for part in parts if part.logprobs is not None]
    return Delivered(
        parts[0].index,
        "".join(part.text for part in parts),
        [token_id for part in parts for token_id in part.token_ids],
        [entry for part in logprobs for entry in part] if logprobs else None,
    )


# -- the work itself --------------------------------------------------------------------------------------------------


async def generate_choices(
    services: Services,
    generation: Generation,
    tenant: str,
    plans: Sequence[ChoicePlan],
    keep: Callable[[list[Outcome]], Awaitable[None]] | None = None,
) -> None:
    """Generate independent choices, all at once, each from the empty history of `tenant` and its initial state.

    With `keep`, which gets them in order, no end is told before all of them are kept.
    """
    generate = _generate_choice if keep is None else generate_alone
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(generate(services, generation, tenant, plan)) for plan in plans]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None  # the first to fail cancelled the others
    if keep is not None:
        outcomes = [task.result() for task in tasks]
        await keep(outcomes)
        for outcome in outcomes:
            generation.emit(outcome.finished)


async def _generate_choice(services: Services, generation: Generation, tenant: str, plan: ChoicePlan) -> Outcome:
    outcome = await generate_alone(services, generation, tenant, plan)
    generation.emit(outcome.finished)
    return outcome


async def generate_alone(services: Services, generation: Generation, tenant: str, plan: ChoicePlan) -> Outcome:
    """Generate one choice from the empty history; its end is not told yet.

    Only prompts of the same tenant share states: what others have asked shows in no count and no delay.
    """
    shares = services.settings.prefix_states
    request = GenerationRequest(
        request_id=uuid.uuid4().hex,
        prompt_ids=plan.prompt_ids,
        sampling=plan.sampling,
        stop=plan.stop,
        source=_beginning(tenant, plan.initial_state),
        keep_state=shares and plan.keep_state,
        num_prompt_logprobs=plan.num_prompt_logprobs,
        priority=plan.priority,
        borders=_with_end(plan) if shares else [],
    )
    choice = _Choice(services, generation, plan)
    await services.engine.run(request, choice.hear)
    return choice.outcome(choice.finished())


def _beginning(tenant: str, initial_state: InitialStateRef | None) -> StateSource:
    chain = root_digest(tenant, "" if initial_state is None else initial_state.fingerprint)
    return StateSource(num_tokens=0, chain=chain, initial_state=initial_state)


def borders_of(prompt: RenderedPrompt, ends: Sequence[int], *, is_stateful: bool) -> Sequence[int]:
    """Return the borders of a prompt whose pieces have these `ends`, as tokens.

    What a conversation says is its own, deleted with it, but not the system prompt that it begins with.
    """
    if not is_stateful:
        return ends
    return ends[:1] if prompt.has_preamble else ()


def _with_end(plan: ChoicePlan) -> list[int]:
    """Return the plan's borders and the place before the last token, where an equal prompt can be sampled again."""
    last = len(plan.prompt_ids) - 1
    return [*(border for border in plan.borders if border < last), *([last] if last else [])]


async def generate_untold(services: Services, generation: Generation, turn: OpenTurn, plan: ChoicePlan) -> Outcome:
    """As `generate_alone`, after a conversation's history, which stays as it is."""
    choice = _Choice(services, generation, plan)
    await _run_turn(services, turn, plan, choice.hear, keep_state=False)
    return choice.outcome(msgspec.structs.replace(choice.finished(), receipt=turn.receipt))


async def generate_turn(
    services: Services,
    generation: Generation,
    turn: OpenTurn,
    plan: ChoicePlan,
    content_of: Callable[[Outcome], TurnContent],
    remembered: Callable[[str], Awaitable[tuple[list[int], list[int]]]] | None = None,
) -> None:
    """Generate the next turn of a conversation and commit it with what `content_of` makes of its outcome.

    `remembered`, if given, says of the answer's text what prompt and what answer the conversation is to remember
    instead, as tokens.
    """
    choice = _Choice(services, generation, plan)
    await _run_turn(services, turn, plan, choice.hear, keep_state=remembered is None)
    last = choice.finished()
    if remembered is not None:
        await turn.consume_instead(*await remembered(choice.whole.text))
    finished = msgspec.structs.replace(last, receipt=turn.receipt)
    content = content_of(choice.outcome(finished))
    generation.begin_commit()
    await turn.commit(content)
    generation.emit(finished)


async def _run_turn(services: Services, turn: OpenTurn, plan: ChoicePlan, hear: Hear, *, keep_state: bool) -> None:
    await turn.generate(
        plan.prompt_ids,
        plan.sampling,
        plan.stop,
        plan.num_prompt_logprobs,
        hear=hear,
        priority=plan.priority,
        keep_state=keep_state,
        borders=plan.borders if services.settings.prefix_states else (),
    )


class _Choice:
    """One choice while it grows."""

    def __init__(self, services: Services, generation: Generation, plan: ChoicePlan) -> None:
        self._generation = generation
        self._plan = plan
        self._clock = services.metrics.engine.watch(len(plan.prompt_ids))
        self._detokenizer = Detokenizer(services.tokenizer)
        self._prompt_logprobs: list[TokenLogprobs | None] = []
        self._prompt: Prompted | None = None
        self._num_cached_tokens = 0
        self._last: SequenceOutput | None = None
        # What was delivered; not the events, of which the garbage collector would have to look after every single one.
        self._texts: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []

    def hear(self, event: SequenceEvent) -> None:
        """Emit what the engine tells; the end is left to be told."""
        if isinstance(event, SequenceOutput):
            self._advanced(event)
        else:
            self._started(event)

    def _started(self, event: SequenceStarted) -> None:
        self._clock.started(event)
        self._num_cached_tokens = event.num_cached_tokens
        self._generation.emit(Started(self._plan.index))

    def _advanced(self, event: SequenceOutput) -> None:
        is_last = event.finish_reason is not None
        if event.prompt_logprobs:
            self._prompt_logprobs += [entry for entry in event.prompt_logprobs if entry is not None]
        if self._prompt is None and (event.token_ids or is_last):
            self._prompted()
        text = self._detokenizer.push(event.token_ids)
        if is_last:
            text += self._detokenizer.flush()
            self._last = event
        if event.token_ids or text:
            self._clock.delivered()
            self._texts.append(text)
            self._token_ids += event.token_ids
            self._logprobs += event.logprobs or ()
            self._generation.emit(Delivered(self._plan.index, text, event.token_ids, event.logprobs))

    def _prompted(self) -> None:
        asked = self._plan.num_prompt_logprobs is not None
        logprobs = [None, *self._prompt_logprobs] if asked else None
        self._prompt = Prompted(self._plan.index, self._plan.prompt_ids, logprobs)
        self._generation.emit(self._prompt)

    def finished(self) -> Finished:
        """Return how it ended; raises `ServerDraining` if the engine cut it short."""
        last = self._last
        assert last is not None, "the engine ends every sequence, or raises"
        assert last.finish_reason is not None, "kept because it has one"
        self._clock.finished(last.finish_reason, last.num_sampled_tokens)
        if last.finish_reason is FinishReason.ABORT:
            raise ServerDraining  # a client that leaves hears nothing: only a drain aborts for somebody who listens
        return Finished(
            self._plan.index,
            last.finish_reason,
            last.stop_reason,
            len(self._token_ids),
            receipt=None,
            num_cached_tokens=self._num_cached_tokens,
            num_kept_tokens=last.num_kept_tokens,
            stop_logprobs=last.stop_logprobs,
        )

    def outcome(self, finished: Finished) -> Outcome:
        """Return everything, with its end."""
        assert self._prompt is not None, "told before the end"
        return Outcome(self._prompt, self.whole, finished)

    @property
    def whole(self) -> Delivered:
        """Everything that was delivered, in one piece."""
        is_asked = self._plan.sampling.num_logprobs is not None
        return Delivered(self._plan.index, "".join(self._texts), self._token_ids, self._logprobs if is_asked else None)

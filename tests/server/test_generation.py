"""A request's generation: a task that lives no longer than its reader, and how it can be cut short."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from engine.messages import FinishReason, SamplingParams, StopRules, TokenLogprobs
from server.drain import Drain
from server.errors import BadRequest, ServerDraining
from server.generation import (
    ChoiceEvent,
    ChoicePlan,
    Delivered,
    Finished,
    Generation,
    Outcome,
    Prompted,
    Started,
    generate_choices,
)
from server.rate_limits import Budget, Limits


class Work:
    """Emits one event, then waits to be told to end."""

    def __init__(self, before_wait: Callable[[Generation], None] = lambda _: None) -> None:
        self.may_end = asyncio.Event()
        self.was_cancelled = False
        self._before_wait = before_wait

    async def __call__(self, generation: Generation) -> None:
        generation.emit(Started(0))
        self._before_wait(generation)
        try:
            await self.may_end.wait()
        except asyncio.CancelledError:
            self.was_cancelled = True
            raise
        generation.emit(Started(1))


async def read(generation: Generation, events: list[ChoiceEvent] | None = None) -> list[ChoiceEvent]:
    """Return all events, after adding them to `events`."""
    events = [] if events is None else events
    while arrived := await generation.take():
        events += arrived
    return events


async def test_events_are_read_in_order() -> None:
    """Also the first, which admission has taken already."""
    work = Work()
    generation = Generation(Drain(), Budget(Limits()), work)
    await generation.admitted(timeout_seconds=60)
    work.may_end.set()
    assert await read(generation) == [Started(0), Started(1)]
    await generation.aclose()


async def test_what_a_late_reader_takes_of_a_choice_is_one_event() -> None:
    """Text, tokens and log-probabilities in order, each choice's own, before what came after them."""

    def piece(index: int, token_id: int) -> Delivered:
        return Delivered(index, chr(token_id), [token_id], [TokenLogprobs(-float(token_id))])

    async def work(generation: Generation) -> None:
        generation.emit(Started(0))
        for token_id in b"abc":
            generation.emit(piece(0, token_id))
            generation.emit(piece(1, token_id + 3))
        generation.emit(Started(1))

    generation = Generation(Drain(), Budget(Limits()), work)
    await generation.admitted(timeout_seconds=60)
    said = [
        Delivered(index, text.decode(), [*text], [TokenLogprobs(-float(token_id)) for token_id in text])
        for index, text in enumerate((b"abc", b"def"))
    ]
    assert await generation.take() == [Started(0), *said, Started(1)]
    assert await generation.take() == []


async def test_who_is_called_need_not_take() -> None:
    """Events are heard in order where they are emitted; one that is declined waits, and so do those after it."""
    heard: list[ChoiceEvent] = []

    def hear(event: ChoiceEvent) -> bool:
        heard.append(event)
        return event != Started(1)

    work = Work(before_wait=lambda generation: generation.attend(hear))
    generation = Generation(Drain(), Budget(Limits()), work)
    await generation.admitted(timeout_seconds=60)
    assert await generation.take() == [Started(0)]
    generation.emit(Started(2))
    assert heard == [Started(2)]
    work.may_end.set()
    assert await read(generation) == [Started(1)]
    assert heard == [Started(2), Started(1)]


async def test_closing_ends_the_work() -> None:
    """The reader has left: the work is cancelled, and over when `aclose` returns."""
    work = Work()
    generation = Generation(Drain(), Budget(Limits()), work)
    await generation.admitted(timeout_seconds=60)
    await generation.aclose()
    assert work.was_cancelled


async def test_work_may_outlive_its_reader() -> None:
    """Closing lets it go on to its end, which a drain waits for and nobody hears."""
    drain, work = Drain(), Work()
    drain.enter()
    generation = Generation(drain, Budget(Limits()), work, outlives_reader=True)
    await generation.admitted(timeout_seconds=60)
    await generation.aclose()
    drain.leave()  # the request is over
    drain.begin()
    waiting = asyncio.create_task(drain.wait(timeout_seconds=60))
    await asyncio.sleep(0)
    assert (work.was_cancelled, waiting.done(), drain.num_running) == (False, False, 1)
    work.may_end.set()
    await waiting
    assert drain.num_running == 0


async def test_work_that_outlives_its_reader_ends_with_the_drain() -> None:
    """It is interrupted like everything else that takes too long."""
    drain, work = Drain(), Work()
    drain.enter()
    generation = Generation(drain, Budget(Limits()), work, outlives_reader=True)
    await generation.admitted(timeout_seconds=60)
    await generation.aclose()
    drain.leave()
    await drain.wait(timeout_seconds=0)
    assert work.was_cancelled
    assert drain.num_running == 0


async def test_an_interruption_is_what_the_reader_hears() -> None:
    """The error, after the events that came before it."""
    generation = Generation(Drain(), Budget(Limits()), Work())
    await generation.admitted(timeout_seconds=60)
    generation.interrupt(ServerDraining())
    events: list[ChoiceEvent] = []
    with pytest.raises(ServerDraining):
        await read(generation, events)
    assert events == [Started(0)]


async def test_a_commit_is_not_interrupted() -> None:
    """Once a turn is being committed nobody may claim that it was not applied."""
    work = Work(before_wait=Generation.begin_commit)
    generation = Generation(Drain(), Budget(Limits()), work)
    await generation.admitted(timeout_seconds=60)
    generation.interrupt(ServerDraining())
    work.may_end.set()
    assert await read(generation) == [Started(0), Started(1)]


async def test_a_second_interruption_does_not_cut_the_end_of_the_first_short() -> None:
    """What the work does to end, it does to its end; the reader hears of what came first."""
    may_end, has_ended = asyncio.Event(), asyncio.Event()

    async def work(generation: Generation) -> None:
        generation.emit(Started(0))
        try:
            await asyncio.Event().wait()
        finally:
            await may_end.wait()
            has_ended.set()

    generation = Generation(Drain(), Budget(Limits()), work)
    await generation.admitted(timeout_seconds=60)
    generation.interrupt(ServerDraining())
    await asyncio.sleep(0)  # the work ends
    generation.interrupt(BadRequest("n: too many.", "n"))
    await asyncio.sleep(0)
    may_end.set()
    with pytest.raises(ServerDraining):
        await read(generation)
    assert has_ended.is_set()


async def test_what_keeps_work_from_beginning_is_raised_before_the_first_byte() -> None:
    """So that it can become a status."""

    async def refuse(generation: Generation) -> None:
        raise BadRequest("n: too many.", "n")

    generation = Generation(Drain(), Budget(Limits()), refuse)
    with pytest.raises(BadRequest):
        await generation.admitted(timeout_seconds=60)
    await generation.aclose()


async def test_admission_is_not_waited_for_forever() -> None:
    """After the time allowed the stream begins, and hears later what becomes of it."""

    async def wait(generation: Generation) -> None:
        await asyncio.Event().wait()

    generation = Generation(Drain(), Budget(Limits()), wait)
    await generation.admitted(timeout_seconds=0)
    await generation.aclose()


async def test_the_drain_knows_what_runs_and_nothing_else() -> None:
    """A generation is interrupted by the drain while it runs, and forgotten when it has ended."""
    drain = Drain()
    running, ended = Work(), Work()
    generations = [Generation(drain, Budget(Limits()), running), Generation(drain, Budget(Limits()), ended)]
    ended.may_end.set()
    await read(generations[1])
    drain.enter()
    drain.begin()
    await drain.wait(timeout_seconds=0, farewell_seconds=0)
    with pytest.raises(ServerDraining):
        await read(generations[0])
    assert running.was_cancelled
    for generation in generations:
        await generation.aclose()


async def test_no_end_is_told_before_all_answers_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever hears the end may ask for the reply again, and whoever cannot be kept hears of that instead."""
    told: list[list[ChoiceEvent]] = []

    async def alone(services: object, generation: Generation, tenant: str, plan: ChoicePlan) -> Outcome:
        finished = Finished(plan.index, FinishReason.STOP, None, 0, None)
        return Outcome(Prompted(plan.index, [], None), Delivered(plan.index, "", [], None), finished)

    async def keep(outcomes: list[Outcome]) -> None:
        told.append(list(generation._events))
        assert [outcome.finished.index for outcome in outcomes] == [0, 1]

    async def work(generation: Generation) -> None:
        plans = [ChoicePlan(index, [], SamplingParams(seed=0), StopRules(max_tokens=1)) for index in range(2)]
        await generate_choices(None, generation, "", plans, keep)  # type: ignore[arg-type]

    monkeypatch.setattr("server.generation.generate_alone", alone)
    generation = Generation(Drain(), Budget(Limits()), work)
    events = await read(generation)
    assert told == [[]]
    assert [type(event) for event in events] == [Finished, Finished]


async def test_work_that_never_began_has_ended_too() -> None:
    """Cancelled before its first step, it leaves nothing behind that a drain would wait for, and no reader waiting."""
    drain, work = Drain(), Work()
    generation = Generation(drain, Budget(Limits()), work)
    await generation.aclose()
    assert drain.num_running == 0
    with pytest.raises(asyncio.CancelledError):
        await generation.take()

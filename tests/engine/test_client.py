from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager

import pytest

from engine.client import AsyncEngine
from engine.errors import (
    CheckpointMissing,
    EngineDied,
    EngineDraining,
    EngineError,
    InvalidRequest,
    NumericalError,
    QueueFull,
    StateUnavailable,
)
from engine.messages import (
    Abort,
    CheckpointFailed,
    CheckpointRef,
    CheckpointStored,
    Command,
    Drain,
    Drained,
    Event,
    FinishReason,
    ForgetState,
    GenerationRequest,
    ResumeKind,
    SamplingParams,
    SaveState,
    SequenceFailed,
    SequenceOutput,
    SequenceStarted,
    StateSource,
    StepReport,
    StopRules,
    Submit,
    TokenLogprobs,
)
from tests.engine.scripted_engine import READY, Answer, ScriptedEngine

STARTED = SequenceStarted(request_id="a", resume=ResumeKind.NEW)


def request(request_id: str = "a") -> GenerationRequest:
    """A short sequence."""
    return GenerationRequest(
        request_id=request_id,
        prompt_ids=[1],
        sampling=SamplingParams(seed=0),
        stop=StopRules(max_tokens=3),
        source=StateSource(num_tokens=0, chain=b""),
    )


def output(*token_ids: int, finish: FinishReason | None = None) -> SequenceOutput:
    """What a step brought for it."""
    return SequenceOutput(request_id="a", token_ids=list(token_ids), finish_reason=finish)


@asynccontextmanager
async def running(answer: Answer) -> AsyncIterator[tuple[AsyncEngine, ScriptedEngine]]:
    """Yield a client that is connected to an engine that says what `answer` returns."""
    script = ScriptedEngine(answer)
    engine = AsyncEngine.in_process(script)
    assert await engine.start() == READY
    try:
        yield engine, script
    finally:
        await engine.close()


async def test_events_arrive_in_order_and_end_with_the_last_output() -> None:
    """A sequence's events are yielded as sent, and iteration ends by itself."""

    def answer(command: Command) -> list[Event]:
        return [StepReport(events=[STARTED]), StepReport(events=[output(5), output(6, finish=FinishReason.LENGTH)])]

    async with running(answer) as (engine, script):
        events = [event async for event in engine.generate(request())]
        assert events[0] == STARTED
        assert [t for event in events[1:] if isinstance(event, SequenceOutput) for t in event.token_ids] == [5, 6]
        await asyncio.sleep(0.1)
        assert not any(isinstance(command, Abort) for command in script.commands)


async def test_outputs_that_wait_together_are_heard_as_one() -> None:
    """Who was late hears everything at once, tokens and what belongs to them in order, and no other sequence's."""
    chosen = [TokenLogprobs(-1.0), TokenLogprobs(-2.0)]
    last = SequenceOutput(request_id="a", token_ids=[2, 3], logprobs=chosen[1:], finish_reason=FinishReason.STOP)
    other = SequenceOutput(request_id="b", token_ids=[7])

    def answer(command: Command) -> list[Event]:
        if not isinstance(command, Submit):
            return []
        first = SequenceOutput(request_id="a", token_ids=[1], logprobs=chosen[:1])
        return [StepReport(events=[STARTED]), StepReport(events=[other, first]), StepReport(events=[last, other])]

    heard: list[SequenceStarted | SequenceOutput] = []
    async with running(answer) as (engine, script):
        sequence = asyncio.create_task(engine.run(request(), heard.append))
        await asyncio.sleep(0)
        engine.forget_state(b"")
        script.wait_for(ForgetState)  # on the loop, so that it is late: all three reports have been sent by now
        await sequence
    whole = SequenceOutput(request_id="a", token_ids=[1, 2, 3], logprobs=chosen, finish_reason=FinishReason.STOP)
    assert heard == [STARTED, whole]


async def test_a_listener_that_fails_ends_its_sequence_alone() -> None:
    """Its error is raised where the sequence was run, the engine is told, and others hear on."""

    def answer(command: Command) -> list[Event]:
        if not isinstance(command, Submit):
            return []
        events = [SequenceStarted(request_id=name, resume=ResumeKind.NEW) for name in "ab"]
        return [StepReport(events=[*events, output(1)])] if command.request.request_id == "b" else []

    def fail(event: SequenceStarted | SequenceOutput) -> None:
        raise KeyError(event.request_id)

    heard: list[SequenceStarted | SequenceOutput] = []
    async with running(answer) as (engine, script):
        failing = asyncio.create_task(engine.run(request("a"), fail))
        await asyncio.sleep(0)
        other = asyncio.create_task(engine.run(request("b"), heard.append))
        with pytest.raises(KeyError, match="a"):
            await failing
        assert await asyncio.to_thread(script.wait_for, Abort) == Abort("a")
        other.cancel()
        assert heard == [SequenceStarted(request_id="b", resume=ResumeKind.NEW)]


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("queue_full", QueueFull),
        ("draining", EngineDraining),
        ("state_unavailable", StateUnavailable),
        ("numerical_error", NumericalError),
        ("invalid_request", InvalidRequest),
        ("engine_error", EngineError),
    ],
)
async def test_a_failed_sequence_raises_its_error(code: str, error: type[EngineError]) -> None:
    """Every failure code of the protocol has its exception."""

    def answer(command: Command) -> list[Event]:
        return [StepReport(events=[SequenceFailed(request_id="a", code=code, message="no", field="prompt_ids")])]

    async with running(answer) as (engine, _):
        with pytest.raises(error, match="no") as caught:
            [event async for event in engine.generate(request())]
        assert type(caught.value) is error


async def test_leaving_early_aborts_the_sequence() -> None:
    """A reader that stops reading tells the engine so."""

    def answer(command: Command) -> list[Event]:
        return [StepReport(events=[STARTED])] if isinstance(command, Submit) else []

    async with running(answer) as (engine, script):
        async with aclosing(engine.generate(request())) as events:
            async for _ in events:
                break
        abort = await asyncio.to_thread(script.wait_for, Abort)
        assert abort == Abort("a")


async def test_the_same_id_cannot_run_twice() -> None:
    """A second sequence under a running id is refused before it is sent."""

    def answer(command: Command) -> list[Event]:
        return [StepReport(events=[STARTED])] if isinstance(command, Submit) else []

    async with running(answer) as (engine, _), aclosing(engine.generate(request())) as events:
        await anext(events)
        with pytest.raises(InvalidRequest):
            [event async for event in engine.generate(request())]


async def test_a_state_is_saved_or_the_reason_is_raised() -> None:
    """`save_state` answers with the stored reference, or raises what kept it from being stored."""
    ref = CheckpointRef(checkpoint_id="c", num_tokens=7, chain=b"kept")

    def answer(command: Command) -> list[Event]:
        assert isinstance(command, SaveState)
        if command.chain == b"kept":
            return [StepReport(events=[CheckpointStored(ref=ref)])]
        failed = CheckpointFailed(chain=command.chain, num_tokens=7, reason="not_kept", message="gone")
        return [StepReport(events=[failed])]

    async with running(answer) as (engine, _):
        assert (await engine.save_state(b"kept", 7)).ref == ref
        with pytest.raises(CheckpointMissing, match="gone"):
            await engine.save_state(b"lost", 7)


async def test_a_drain_is_answered() -> None:
    """`drain` returns when the engine says that nothing runs."""

    def answer(command: Command) -> list[Event]:
        assert command == Drain(1.5)
        return [Drained()]

    async with running(answer) as (engine, _):
        await engine.drain(1.5)


async def test_a_dying_engine_fails_what_runs_and_is_replaced() -> None:
    """Sequences and saves of a dead engine raise at once, requests are refused, and soon another engine serves."""

    def answer(command: Command) -> list[Event]:
        if isinstance(command, Submit) and command.request.request_id == "poison":
            raise RuntimeError("crash")
        if isinstance(command, Submit):
            return [StepReport(events=[STARTED, output(9, finish=FinishReason.STOP)])]
        return []

    async with running(answer) as (engine, _):
        save = asyncio.create_task(engine.save_state(b"x", 1))
        await asyncio.sleep(0)
        with pytest.raises(EngineDied):
            [event async for event in engine.generate(request("poison"))]
        with pytest.raises(EngineDied):
            await save
        with pytest.raises(EngineDied, match="starting"):
            [event async for event in engine.generate(request())]
        async with asyncio.timeout(10):
            while not engine.is_ready:  # noqa: ASYNC110 - what is tested is that it happens, without being told
                await asyncio.sleep(0.02)
        assert engine.restarts == 1
        assert [event async for event in engine.generate(request())][-1] == output(9, finish=FinishReason.STOP)


async def test_an_engine_that_ends_before_it_is_ready_is_an_error() -> None:
    """A model that cannot be loaded is told at the start, not retried for ever."""
    engine = AsyncEngine.in_process(lambda context, endpoint, stop: None)
    with pytest.raises(EngineDied, match="ended"):
        await engine.start()
    await engine.close()


async def test_reports_reach_the_observer() -> None:
    """Whoever counts sees every report, whatever it says."""
    seen: list[StepReport] = []
    report = StepReport(events=[STARTED, output(1, finish=FinishReason.STOP)])
    engine = AsyncEngine.in_process(ScriptedEngine(lambda command: [report]), seen.append)
    await engine.start()
    try:
        [event async for event in engine.generate(request())]
        assert seen == [report]
    finally:
        await engine.close()

"""Both ends of the seam in one process: the client's promises kept by the real loop, on a stub runner."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager

import msgspec
import pytest

from engine.client import AsyncEngine
from engine.errors import (
    CheckpointMissing,
    CheckpointRejected,
    EngineDied,
    EngineDraining,
    EngineError,
    InvalidRequest,
    NumericalError,
    StateUnavailable,
)
from engine.loop import MAX_FAULTS_IN_A_ROW
from engine.messages import (
    CheckpointRef,
    CheckpointStored,
    FinishReason,
    ResumeKind,
    SequenceOutput,
    SequenceStarted,
    StateSource,
)
from engine.state.checkpoint import encode_state
from engine.token_chain import extend_digest, root_digest
from tests.engine.stub_engine import StubEngine, chain_of, request_of
from tests.engine.stub_runner import STUB_SPEC, StubRunner, state_of

pytestmark = pytest.mark.usefixtures("runs_ahead")

PROMPT = [1, 2, 3]
ENDLESS = 1_000_000


@asynccontextmanager
async def running(make_runner: Callable[[], StubRunner] = StubRunner) -> AsyncIterator[tuple[AsyncEngine, StubEngine]]:
    """Yield a started engine on stub runners."""
    stub = StubEngine(make_runner=make_runner)
    engine = AsyncEngine.in_process(stub)
    await engine.start()
    try:
        yield engine, stub
    finally:
        await engine.close()


async def outputs(engine: AsyncEngine, request_id: str = "a", **options: object) -> list[int]:
    """Run a sequence and return its tokens."""
    request = request_of(request_id, **options)  # type: ignore[arg-type]
    events = [event async for event in engine.generate(request) if isinstance(event, SequenceOutput)]
    assert events[-1].finish_reason is not None
    return [token_id for event in events for token_id in event.token_ids]


async def test_many_sequences_at_once_are_each_what_they_are_alone() -> None:
    """More than there are seats, all at once: every one gets its own tokens, in order."""
    async with running() as (engine, _):
        prompts = [[number, number + 1] for number in range(12)]
        alone = [await outputs(engine, prompt_ids=prompt) for prompt in prompts]
        together = await asyncio.gather(
            *(outputs(engine, f"{number}", prompt_ids=prompt) for number, prompt in enumerate(prompts))
        )
        assert together == alone


async def test_a_conversation_is_saved_and_goes_on() -> None:
    """Save right after the last output, whatever the state's settling: the reference names exactly these tokens."""
    async with running() as (engine, _):
        history = PROMPT + await outputs(engine)
        stored = await engine.save_state(chain_of(history), len(history))
        engine.forget_state(chain_of(history))
        source = StateSource(num_tokens=len(history), chain=chain_of(history), checkpoint=stored.ref)
        assert await outputs(engine, prompt_ids=[9], source=source) == await outputs(
            engine, prompt_ids=[*history, 9], keep_state=False
        )


async def test_saves_of_equal_states_are_different_checkpoints() -> None:
    """Two conversations that happen to be the same each get their own, and may delete it."""
    async with running() as (engine, _):
        history = PROMPT + await outputs(engine)
        saves = [engine.save_state(chain_of(history), len(history)) for _ in range(3)]
        stored = await asyncio.gather(*saves)
        assert len({save.ref.checkpoint_id for save in stored}) == 3


async def test_closing_the_iterator_frees_the_slot() -> None:
    """An endless sequence that nobody reads any more does not go on."""
    async with running() as (engine, _):
        async with aclosing(engine.generate(request_of("a", max_tokens=ENDLESS))) as events:
            await anext(events)
        await outputs(engine, "b")
        while engine.latest_stats is None or engine.latest_stats.num_slots_used:  # noqa: ASYNC110 - reports come
            await asyncio.sleep(0.02)


async def test_a_cancelled_reader_frees_the_slot() -> None:
    """Cancellation is one way of leaving."""
    async with running() as (engine, _):
        reader = asyncio.create_task(outputs(engine, max_tokens=ENDLESS))
        await outputs(engine, "b")
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
        await outputs(engine, "c")
        while engine.latest_stats is None or engine.latest_stats.num_slots_used:  # noqa: ASYNC110 - reports come
            await asyncio.sleep(0.02)


async def test_refusals_and_failures_have_their_own_types() -> None:
    """What the engine says no to, and what breaks there, is raised where it was asked for."""
    async with running(lambda: StubRunner(poisonous=66, explosive=77)) as (engine, _):
        with pytest.raises(InvalidRequest) as caught:
            await outputs(engine, prompt_ids=[256])
        assert caught.value.field == "prompt_ids"
        with pytest.raises(StateUnavailable):
            await outputs(engine, source=StateSource(num_tokens=1, chain=b"?" * 16))
        with pytest.raises(NumericalError):
            await outputs(engine, prompt_ids=[66])
        with pytest.raises(EngineError, match="boom"):
            await outputs(engine, prompt_ids=[77])
        assert len(await outputs(engine)) == 4


async def test_a_drain_aborts_what_takes_too_long_and_refuses_what_is_new() -> None:
    """After it nothing runs, and the engine is still there for saves."""
    async with running() as (engine, _):
        history = PROMPT + await outputs(engine)
        endless = engine.generate(request_of("endless", max_tokens=ENDLESS))
        await anext(endless)
        await engine.drain(0)
        ends = [event.finish_reason async for event in endless if isinstance(event, SequenceOutput)]
        assert ends[-1] is FinishReason.ABORT
        with pytest.raises(EngineDraining):
            await outputs(engine, "late")
        assert (await engine.save_state(chain_of(history), len(history))).ref.num_tokens == len(history)


async def test_an_engine_whose_device_is_gone_is_replaced() -> None:
    """It gives up after a few faults in a row, and the next one works."""
    async with running() as (engine, stub):
        stub.runner.broken = True
        failing = [outputs(engine, f"{i}") for i in range(MAX_FAULTS_IN_A_ROW)]  # one more may come to the next engine
        results = await asyncio.gather(*failing, return_exceptions=True)
        assert all(isinstance(result, EngineError) for result in results)
        while engine.restarts == 0 or not engine.is_ready:  # noqa: ASYNC110 - nobody tells when it is back
            await asyncio.sleep(0.02)
        assert len(stub.runners) == 2
        assert len(await outputs(engine)) == 4


async def test_closing_fails_what_still_runs() -> None:
    """Nobody waits for ever for an engine that was closed."""
    async with running() as (engine, _):
        reader = asyncio.create_task(outputs(engine, max_tokens=ENDLESS))
        await outputs(engine, "b")
        await engine.close()
        with pytest.raises(EngineDied):
            await reader


async def test_a_state_from_elsewhere_is_adopted_and_continued() -> None:
    """From the store, under another chain, and not out of memory: as if it had been saved here."""
    async with running() as (engine, stub):
        elsewhere, here = root_digest("elsewhere"), chain_of(PROMPT)
        ref = CheckpointRef(checkpoint_id="ab" * 16, num_tokens=3, chain=extend_digest(elsewhere, PROMPT))
        stub.store.put(ref.checkpoint_id, encode_state(state_of(PROMPT, ref.chain), STUB_SPEC), 60.0)
        stored = await engine.adopt_checkpoint(ref, here)
        source = StateSource(num_tokens=3, chain=here, checkpoint=stored.ref)
        events = [event async for event in engine.generate(request_of("a", [9], source=source))]
        assert isinstance(events[0], SequenceStarted)
        assert events[0].resume is ResumeKind.RESTORED
        goes_on = [
            token_id for event in events[1:] if isinstance(event, SequenceOutput) for token_id in event.token_ids
        ]
        assert goes_on == await outputs(engine, "b", prompt_ids=[*PROMPT, 9], keep_state=False)


async def test_a_state_that_is_not_what_it_should_be_is_not_adopted() -> None:
    """Each of several adoptions, and a save of the same chain beside them, has its own answer."""
    async with running() as (engine, stub):
        history = PROMPT + await outputs(engine)
        chain = chain_of(history)
        good = (await engine.save_state(chain, len(history))).ref
        wrong = msgspec.structs.replace(good, checkpoint_id="ab" * 16)
        stub.store.put(wrong.checkpoint_id, encode_state(state_of(PROMPT, chain), STUB_SPEC), 60.0)
        missing = msgspec.structs.replace(good, checkpoint_id="cd" * 16)
        answers = await asyncio.gather(
            engine.adopt_checkpoint(wrong, chain),
            engine.save_state(chain, len(history)),
            engine.adopt_checkpoint(missing, chain),
            engine.adopt_checkpoint(good, chain),
            return_exceptions=True,
        )
        assert isinstance(answers[0], CheckpointRejected)
        assert isinstance(answers[1], CheckpointStored)
        assert isinstance(answers[2], CheckpointMissing)
        assert isinstance(answers[3], CheckpointStored)
        assert answers[3].adopted == good.checkpoint_id

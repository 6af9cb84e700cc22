"""The engine's side of the seam, spoken to in raw messages over a real socket."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import zmq

from engine.errors import EngineError, StoreUnavailable
from engine.loop import MAX_FAULTS_IN_A_ROW, EngineLoop
from engine.messages import (
    Abort,
    CheckpointFailed,
    CheckpointRef,
    CheckpointStored,
    Command,
    DeleteCheckpoints,
    Drain,
    Drained,
    EngineReady,
    EngineStats,
    Event,
    FinishReason,
    ForgetState,
    Hello,
    ResumeKind,
    SaveState,
    SequenceFailed,
    SequenceOutput,
    SequenceStarted,
    StateSource,
    StepReport,
    Submit,
    decode_event,
    encode,
)
from engine.runner.plan import Chunk, Launch, StepPlan
from engine.state.memory_store import MemoryStore
from tests.engine.stub_engine import READY, StubEngine, chain_of, request_of
from tests.engine.stub_runner import StubRunner

pytestmark = pytest.mark.usefixtures("runs_ahead")

PATIENCE_MS = 20_000
ENDLESS = 100_000  # tokens: more than a stub's state can hold, and than any test waits for
PROMPT = [1, 2, 3]
SequenceEvent = SequenceStarted | SequenceOutput | SequenceFailed


class RawClient:
    """A client that sends what it is told and remembers what it hears."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str) -> None:
        self.socket = context.socket(zmq.DEALER)
        self.socket.set(zmq.LINGER, 0)
        self.socket.connect(endpoint)
        self.reports: list[StepReport] = []

    def send(self, *commands: Command) -> None:
        """Send commands."""
        for command in commands:
            self.socket.send(encode(command))

    def hear(self) -> Event:
        """Return the next message."""
        assert self.socket.poll(PATIENCE_MS), "the engine says nothing"
        event = decode_event(self.socket.recv())
        if isinstance(event, StepReport):
            self.reports.append(event)
        return event

    def hear_until(self, wanted: Callable[[Event], bool]) -> Event:
        """Listen until a message is `wanted`, and return it."""
        while True:
            event = self.hear()
            if wanted(event):
                return event

    def hello(self) -> EngineReady:
        """Greet the engine."""
        self.send(Hello())
        ready = self.hear_until(lambda event: isinstance(event, EngineReady))
        assert isinstance(ready, EngineReady)
        return ready

    def next_of(self, *kinds: type) -> object:
        """Listen until something of `kinds` happens, and return it."""
        while True:
            for report in self.reports:
                for event in report.events:
                    if isinstance(event, kinds):
                        report.events.remove(event)
                        return event
            self.hear()

    def finish(self, request_id: str) -> tuple[SequenceStarted | None, list[int], SequenceOutput | SequenceFailed]:
        """Listen until a sequence ends; returns its start, its tokens and its end."""
        started: SequenceStarted | None = None
        token_ids: list[int] = []
        while True:
            event = self.next_of(SequenceStarted, SequenceOutput, SequenceFailed)
            assert isinstance(event, SequenceEvent)
            assert event.request_id == request_id
            if isinstance(event, SequenceStarted):
                started = event
            elif isinstance(event, SequenceFailed):
                return started, token_ids, event
            else:
                token_ids += event.token_ids
                if event.finish_reason is not None:
                    return started, token_ids, event

    def turn(self, request_id: str = "a") -> list[int]:
        """Run a first turn; returns the history whose state was kept."""
        self.send(Submit(request_of(request_id, PROMPT)))
        return PROMPT + self.finish(request_id)[1]

    def save(self, history: list[int], copy_of: CheckpointRef | None = None) -> CheckpointStored | CheckpointFailed:
        """Have a state saved."""
        self.send(SaveState(chain_of(history), len(history), copy_of))
        event = self.next_of(CheckpointStored, CheckpointFailed)
        assert isinstance(event, CheckpointStored | CheckpointFailed)
        return event

    def stats_when(self, wanted: Callable[[EngineStats], bool]) -> EngineStats:
        """Listen until the engine's statistics are `wanted`, and return them."""
        report = self.hear_until(lambda e: isinstance(e, StepReport) and e.stats is not None and wanted(e.stats))
        assert isinstance(report, StepReport)
        assert report.stats is not None
        return report.stats


class Running:
    """A stub engine in a thread, and any number of raw clients."""

    endpoint = "inproc://engine"

    def __init__(self, engine: StubEngine) -> None:
        self.engine = engine
        self.context = zmq.Context[zmq.Socket[bytes]]()
        self.clients: list[RawClient] = []
        self.error: Exception | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.engine(self.context, self.endpoint, self._stop)
        except Exception as error:
            self.error = error

    def client(self, greet: bool = True) -> RawClient:
        """Connect a client."""
        client = RawClient(self.context, self.endpoint)
        self.clients.append(client)
        if greet:
            assert client.hello() == READY
        return client

    def wait_for_end(self) -> None:
        """Wait until the engine has ended by itself."""
        self._thread.join(PATIENCE_MS / 1000)
        assert not self._thread.is_alive()

    def end(self) -> None:
        """End the engine and close everything."""
        self._stop.set()
        self.wait_for_end()
        self.context.destroy(linger=0)


@contextmanager
def running(engine: StubEngine | None = None) -> Iterator[Running]:
    """Run an engine for the length of a test."""
    it = Running(engine or StubEngine())
    try:
        yield it
    finally:
        it.end()


# -- greetings and reports --------------------------------------------------------------------------------------------


def test_a_client_is_greeted_when_the_model_has_run() -> None:
    """Ready means that a step has worked, not that a file was read."""
    with running() as it:
        it.client()
        assert it.engine.runner.plans[0].num_tokens == 2


def test_a_model_that_cannot_run_is_never_ready() -> None:
    """The engine ends with the reason before anybody is told that it is ready."""
    with running(StubEngine(make_runner=lambda: StubRunner(poisonous=0))) as it:
        it.wait_for_end()
        assert isinstance(it.error, EngineError)
        assert "not a number" in str(it.error)


def test_a_client_of_another_protocol_gets_no_answer() -> None:
    """It could not understand what it would hear, and nothing runs for it."""
    with running() as it:
        stranger = it.client(greet=False)
        stranger.send(Hello(protocol_version=0), Submit(request_of("a")))
        assert len(it.client().turn()) == len(PROMPT) + 4
        assert not stranger.socket.poll(0)


def test_what_is_no_command_is_ignored() -> None:
    """A message that cannot be read harms nobody."""
    with running() as it:
        client = it.client()
        client.socket.send(b"\xc1 not msgpack")
        assert len(client.turn()) == len(PROMPT) + 4


def test_every_step_is_one_message_to_every_client() -> None:
    """Each hears of its own sequences only; all hear how the engine is."""
    with running() as it:
        first, second = it.client(), it.client()
        first.send(Submit(request_of("a", max_tokens=6)))
        first.finish("a")
        second.send(Submit(request_of("b", max_tokens=6)))
        second.finish("b")
        for client, own in [(first, "a"), (second, "b")]:
            named = [e.request_id for report in client.reports for e in report.events if isinstance(e, SequenceEvent)]
            assert set(named) <= {own}
            assert all(report.stats is not None for report in client.reports)
        steps = [report.step for report in first.reports if report.step is not None]
        assert steps[0].num_prefill_tokens == 3
        assert [step.num_decode_tokens for step in steps[1:6]] == [1] * 5


def test_clients_are_told_of_a_step_while_the_next_one_runs() -> None:
    """What is launched next is on its way before anything is sent; and nothing waits to be sent for want of work."""
    engine, order = StubEngine(), list[str]()

    class NotedRunner(StubRunner):
        def launch(self, plan: StepPlan) -> Launch:
            order.append("launch")
            return super().launch(plan)

        def follow(self, rows: Sequence[int], chunks: Sequence[Chunk] = ()) -> Launch:
            order.append("launch")
            return super().follow(rows, chunks)

    engine.make_runner = NotedRunner
    context = zmq.Context[zmq.Socket[bytes]]()
    loop = engine.make_loop(context, "inproc://x")
    loop._send = lambda client, event: order.append("send")  # type: ignore[method-assign,assignment]
    loop._clients.add(b"client")
    loop._scheduler.submit(b"client", request_of("a", max_tokens=3))
    try:
        while loop._scheduler.has_work or loop._must_report:
            loop.step()
        if NotedRunner.runs_ahead:  # the prompt, and three that follow, of which the last one settles
            assert order == ["launch", "launch", "send", "launch", "send", "launch", "send", "send", "send"]
        else:
            assert order == ["launch", "send"] * 4 + ["send"]
    finally:
        loop._socket.close(linger=0)
        loop._checkpointer.close()
        loop._doorbell.close()
        context.destroy(linger=0)


def test_an_idle_engine_waits_in_its_socket_and_speaks_once_a_second() -> None:
    """Nothing runs: no step is made, and the next report is due a second after the last."""
    now = [100.0]
    engine = StubEngine()
    context = zmq.Context[zmq.Socket[bytes]]()
    engine.runners.append(StubRunner())
    loop = EngineLoop(
        engine.config, engine.runner, engine.vocabulary, engine.store, READY, context, "inproc://x", lambda: now[0]
    )
    waits: list[float] = []
    loop._poller.poll = lambda timeout: waits.append(timeout) or []  # type: ignore[assignment,func-returns-value,misc]
    client = RawClient(context, "inproc://x")
    client.send(Hello())
    loop._handle(loop._socket.recv_multipart()[0], Hello())
    try:
        loop.step()
        assert isinstance(client.hear(), EngineReady)
        assert isinstance(client.hear(), StepReport)
        now[0] += 0.25
        loop.step()
        assert not client.socket.poll(50)
        now[0] += 0.75
        loop.step()
        assert isinstance(client.hear(), StepReport)
        assert waits == [0, 750, 0]
        assert engine.runner.plans == []
    finally:
        loop._socket.close(linger=0)
        loop._checkpointer.close()
        loop._doorbell.close()
        context.destroy(linger=0)


def test_a_client_that_is_gone_leaves_nothing_behind() -> None:
    """Its sequences are aborted within a step: those that run, and those that wait."""
    with running() as it:
        leaving, staying = it.client(), it.client()
        leaving.send(*(Submit(request_of(f"{i}", max_tokens=ENDLESS)) for i in range(6)))
        staying.stats_when(lambda stats: stats.num_running == 4 and stats.num_waiting == 2)
        leaving.socket.close(linger=0)
        stats = staying.stats_when(lambda stats: stats.num_running == stats.num_waiting == 0)
        assert stats.num_slots_used == 0
        assert len(staying.turn()) == len(PROMPT) + 4


def test_an_abort_ends_a_sequence() -> None:
    """The last output says so, and its slot is free."""
    with running() as it:
        client = it.client()
        client.send(Submit(request_of("a", max_tokens=ENDLESS)))
        client.next_of(SequenceStarted)
        client.send(Abort("a"))
        _, _, last = client.finish("a")
        assert isinstance(last, SequenceOutput)
        assert last.finish_reason is FinishReason.ABORT
        assert client.stats_when(lambda stats: True).num_slots_used == 0


# -- states -----------------------------------------------------------------------------------------------------------


def test_a_kept_state_can_be_saved_and_resumed() -> None:
    """Saved at once after the last output, forgotten, and restored from the store."""
    with running() as it:
        client = it.client()
        history = client.turn()
        stored = client.save(history)
        assert isinstance(stored, CheckpointStored)
        assert (stored.ref.num_tokens, stored.ref.chain, stored.tier) == (7, chain_of(history), "memory")
        client.send(ForgetState(chain_of(history)))
        source = StateSource(num_tokens=7, chain=chain_of(history), checkpoint=stored.ref)
        request = request_of("b", [9], source=source)
        client.send(Submit(request))
        started, token_ids, _ = client.finish("b")
        assert started is not None
        assert started.resume is ResumeKind.RESTORED
        assert token_ids[0] == it.engine.runner.model([*history, 9], request.sampling)


def test_a_state_that_was_not_kept_cannot_be_saved() -> None:
    """Nobody kept it, or it was forgotten."""
    with running() as it:
        client = it.client()
        history = client.turn()
        client.send(ForgetState(chain_of(history)))
        for missing in (history, [1, 2]):
            failed = client.save(missing)
            assert isinstance(failed, CheckpointFailed)
            assert failed.reason == "not_kept"


def test_every_save_has_a_checkpoint_of_its_own() -> None:
    """Two conversations with the same history can each delete theirs."""
    with running() as it:
        client = it.client()
        history = client.turn()
        first, second = client.save(history), client.save(history)
        assert isinstance(first, CheckpointStored)
        assert isinstance(second, CheckpointStored)
        assert first.ref.checkpoint_id != second.ref.checkpoint_id


def test_a_checkpoint_can_be_copied_when_its_state_is_gone_from_memory() -> None:
    """The copy is one's own: it outlives the original, and the state is in memory again."""
    store = MemoryStore()
    with running(StubEngine(store=store)) as it:
        client = it.client()
        history = client.turn()
        original = client.save(history)
        assert isinstance(original, CheckpointStored)
        client.send(ForgetState(chain_of(history)))
        copy = client.save(history, copy_of=original.ref)
        assert isinstance(copy, CheckpointStored)
        assert copy.ref.checkpoint_id != original.ref.checkpoint_id
        assert store.get(copy.ref.checkpoint_id) == store.get(original.ref.checkpoint_id)
        client.send(Submit(request_of("b", [9], source=StateSource(num_tokens=7, chain=chain_of(history)))))
        started, _, _ = client.finish("b")
        assert started is not None
        assert started.resume is ResumeKind.HOT


def test_what_is_no_checkpoint_of_the_same_tokens_is_not_copied() -> None:
    """A missing original, or one of another history, is reported and nothing is written."""
    with running() as it:
        client = it.client()
        history = client.turn()
        original = client.save(history)
        assert isinstance(original, CheckpointStored)
        client.send(ForgetState(chain_of(history)))
        missing = CheckpointRef(checkpoint_id="0" * 32, num_tokens=7, chain=chain_of(history))
        other = CheckpointRef(checkpoint_id=original.ref.checkpoint_id, num_tokens=2, chain=chain_of([1, 2]))
        for copy_of in (missing, other):
            failed = client.save(history, copy_of=copy_of)
            assert isinstance(failed, CheckpointFailed)
            assert failed.reason == "not_kept"


class BrokenStore(MemoryStore):
    """A store that does not answer."""

    def put(self, checkpoint_id: str, blob: bytes | bytearray | memoryview, ttl_seconds: float) -> None:
        """Fail."""
        raise StoreUnavailable("no answer")


def test_a_state_that_cannot_be_written_is_reported_and_stays_hot() -> None:
    """The client is told; the state is not lost by it."""
    with running(StubEngine(store=BrokenStore())) as it:
        client = it.client()
        history = client.turn()
        failed = client.save(history)
        assert isinstance(failed, CheckpointFailed)
        assert failed.reason == "store_unavailable"
        source = StateSource(num_tokens=len(history), chain=chain_of(history))
        client.send(Submit(request_of("b", source=source)))
        started, _, _ = client.finish("b")
        assert started is not None
        assert started.resume is ResumeKind.HOT


def test_a_damaged_checkpoint_is_refused_counted_and_put_away() -> None:
    """It is never loaded, not even partly, and never found again."""
    store = MemoryStore()
    with running(StubEngine(store=store)) as it:
        client = it.client()
        history = client.turn()
        stored = client.save(history)
        assert isinstance(stored, CheckpointStored)
        blob = store.get(stored.ref.checkpoint_id)
        blob[-1] ^= 1
        store.put(stored.ref.checkpoint_id, blob, 60)
        client.send(ForgetState(chain_of(history)))
        source = StateSource(num_tokens=len(history), chain=chain_of(history), checkpoint=stored.ref)
        client.send(Submit(request_of("b", source=source)))
        started, _, failed = client.finish("b")
        assert started is None
        assert isinstance(failed, SequenceFailed)
        assert failed.code == "state_unavailable"
        stats = client.stats_when(lambda stats: True)
        assert stats.counters["rwkv_checkpoints_rejected_digest_total"] == 1
        assert list(store.quarantined) == [stored.ref.checkpoint_id]


def test_unwanted_checkpoints_are_deleted() -> None:
    """The store loses them, some time soon."""
    store = MemoryStore()
    with running(StubEngine(store=store)) as it:
        client = it.client()
        history = client.turn()
        stored = client.save(history)
        assert isinstance(stored, CheckpointStored)
        client.send(DeleteCheckpoints((stored.ref.checkpoint_id,)))
        while stored.ref.checkpoint_id in store._blobs:
            client.hear()


# -- ends -------------------------------------------------------------------------------------------------------------


def test_a_drain_lets_everything_finish() -> None:
    """What runs and what waits ends by itself, new work is refused, and only then the drain is over."""
    with running() as it:
        client = it.client()
        client.send(*(Submit(request_of(f"{i}", max_tokens=8)) for i in range(6)), Drain(timeout_seconds=3600))
        client.send(Submit(request_of("late")))
        client.hear_until(lambda event: isinstance(event, Drained))
        ends = {
            event.request_id: event.code if isinstance(event, SequenceFailed) else event.finish_reason
            for report in client.reports
            for event in report.events
            if isinstance(event, SequenceFailed) or (isinstance(event, SequenceOutput) and event.finish_reason)
        }
        assert ends == {**{f"{i}": FinishReason.LENGTH for i in range(6)}, "late": "draining"}


def test_a_drain_ends_what_takes_too_long() -> None:
    """With no time left, sequences are aborted, and the drain is over."""
    with running() as it:
        client = it.client()
        client.send(Submit(request_of("a", max_tokens=ENDLESS)), Drain(timeout_seconds=0))
        client.hear_until(lambda event: isinstance(event, Drained))
        _, _, last = client.finish("a")
        assert isinstance(last, SequenceOutput)
        assert last.finish_reason is FinishReason.ABORT


def test_states_can_still_be_saved_after_a_drain() -> None:
    """A turn that was committed last wants its checkpoint too."""
    with running() as it:
        client = it.client()
        history = client.turn()
        client.send(Drain(timeout_seconds=3600))
        client.hear_until(lambda event: isinstance(event, Drained))
        assert isinstance(client.save(history), CheckpointStored)


def test_a_step_that_raises_does_not_end_the_engine() -> None:
    """Its sequences fail; the next one runs."""
    with running(StubEngine(make_runner=lambda: StubRunner(explosive=66))) as it:
        client = it.client()
        client.send(Submit(request_of("a", [66])))
        _, _, failed = client.finish("a")
        assert isinstance(failed, SequenceFailed)
        assert failed.code == "engine_error"
        assert len(client.turn("b")) == len(PROMPT) + 4


def test_a_device_that_is_gone_ends_the_engine() -> None:
    """After a few faults in a row there is no point in going on: another engine can."""
    with running() as it:
        client = it.client()
        it.engine.runner.broken = True
        client.send(*(Submit(request_of(f"{i}")) for i in range(MAX_FAULTS_IN_A_ROW)))
        it.wait_for_end()
        assert isinstance(it.error, EngineError)


@pytest.mark.parametrize("hot_state_bytes", [0, 1])
def test_without_memory_for_states_nothing_is_kept_and_nothing_breaks(hot_state_bytes: int) -> None:
    """The turn ends as ever; its state cannot be saved, and that is said."""
    engine = StubEngine()
    engine.config = type(engine.config)(model_path="", max_num_seqs=4, hot_state_bytes=hot_state_bytes)
    with running(engine) as it:
        client = it.client()
        history = client.turn()
        failed = client.save(history)
        assert isinstance(failed, CheckpointFailed)
        assert failed.reason == "not_kept"
        assert client.stats_when(lambda stats: True).counters["rwkv_hot_states_dropped_total"] == 1

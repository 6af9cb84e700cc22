"""The engine: one thread that owns the device and everything on it.

Commands come in over a ZeroMQ ROUTER socket, events go out over the same one; several clients may be connected, and
each hears of its own sequences. Nothing is shared with other threads but the doorbell they ring when a checkpoint was
read or written, or a grammar compiled.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping

import msgspec
import zmq

from engine.config import EngineConfig
from engine.doorbell import Doorbell
from engine.errors import EngineError
from engine.messages import (
    PROTOCOL_VERSION,
    Abort,
    AdoptCheckpoint,
    CheckpointFailed,
    CheckpointStored,
    Command,
    DeleteCheckpoints,
    Drain,
    Drained,
    EngineReady,
    EngineStats,
    Event,
    ForgetState,
    Hello,
    InitialStateRef,
    SaveState,
    StepReport,
    StepStats,
    Submit,
    decode_command,
    encode,
)
from engine.pipeline import Pipeline
from engine.runner.grammars import Grammars
from engine.runner.plan import Chunk, ModelRunner, StepPlan
from engine.scheduler.output_gate import ByteVocabulary
from engine.scheduler.prefixes import Prefixes
from engine.scheduler.scheduler import Scheduler, SequenceEvent
from engine.state.adoptions import Adoptions
from engine.state.checkpointer import Checkpointer
from engine.state.hot_states import HotStates
from engine.state.prefix_store import PrefixStore
from engine.state.save_queue import SaveQueue
from engine.state.spec import RecurrentState
from engine.state.store import StateStore

_log = logging.getLogger(__name__)

STATS_SECONDS = 1.0  # the longest silence
MAX_COMMANDS_PER_STEP = 256
MAX_FAULTS_IN_A_ROW = 3  # of a device that may have had a bad moment; after that it is gone


class EngineLoop:
    """Runs sequences until it is stopped. Belongs to the thread that calls `run`."""

    def __init__(
        self,
        config: EngineConfig,
        runner: ModelRunner,
        vocabulary: ByteVocabulary,
        store: StateStore,
        ready: EngineReady,
        context: zmq.Context[zmq.Socket[bytes]],
        endpoint: str,
        clock: Callable[[], float] = time.monotonic,
        initial_states: Mapping[InitialStateRef, RecurrentState] = {},
    ) -> None:
        self._runner = runner
        self._ready = ready
        self._clock = clock
        self._socket = _bind(context, endpoint)
        self._doorbell = Doorbell()
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._doorbell.fileno(), zmq.POLLIN)
        self._hot_states = HotStates(config.hot_state_bytes)
        self._checkpointer = Checkpointer(store, runner.spec, config.checkpoint_ttl_seconds, self._doorbell.ring, clock)
        self._prefix_store = PrefixStore(
            self._checkpointer, self._hot_states, runner.spec, f"{ready.device.partition(':')[0]} {ready.dtype}", clock
        )
        self._prefixes = Prefixes(config, runner.spec.num_bytes, self._hot_states, self._prefix_store)
        self._grammars = Grammars(vocabulary, runner.vocab_size, self._doorbell.ring)
        self._scheduler = Scheduler(
            config,
            runner,
            vocabulary,
            self._hot_states,
            self._prefixes,
            self._checkpointer.fetch,
            self._grammars.compile,
            clock,
            initial_states,
        )
        self._pipeline = Pipeline(self._scheduler, runner, clock)
        self._saves = SaveQueue(self._hot_states, self._checkpointer, self._scheduler.is_settling)
        self._adoptions = Adoptions(self._checkpointer)
        self._clients: set[bytes] = set()
        self._draining_clients: set[bytes] = set()
        self._drain_deadline: float | None = None
        self._num_steps = 0
        self._last_step: StepStats | None = None
        self._must_report = False  # a step was read
        self._stats_due_at = 0.0
        if config.hot_state_bytes < runner.spec.num_bytes:
            _log.warning("hot_state_bytes is less than one state: no state will be kept between turns")

    def run(self, stop: threading.Event) -> None:
        """Prove that the model runs, then serve until `stop` is set; raises `EngineError` when the device is gone."""
        threading.Thread(target=self._ring_when_set, args=(stop,), name="engine-stop", daemon=True).start()
        try:
            self._warm_up()
            while not stop.is_set():
                self.step()
        finally:
            self._socket.close(linger=0)
            self._checkpointer.close()
            self._grammars.close()
            self._doorbell.close()

    def _ring_when_set(self, stop: threading.Event) -> None:
        stop.wait()
        self._doorbell.ring()

    def step(self) -> None:
        """Take commands, keep the device busy, say what came of the last step, and read the next one.

        Clients are told of a step while the device works on the one after it.
        """
        self._take_commands()
        self._end_overdue()
        self._checkpointer.sweep_when_due()
        self._pipeline.launch()
        self._send_reports()
        self._answer_drains()
        self._read_step()
        if self._scheduler.num_faults_in_a_row >= MAX_FAULTS_IN_A_ROW:
            self._send_reports()
            raise EngineError(f"the device failed {self._scheduler.num_faults_in_a_row} times in a row")

    def _warm_up(self) -> None:
        self._runner.start(0)
        output = self._runner.launch(StepPlan([Chunk(slot=0, token_ids=[0, 0], position=2)])).output()
        if (problem := output.chunks[0].failed) is not None:
            raise EngineError(f"the model cannot run: {problem}")

    def _read_step(self) -> None:
        if self._pipeline.num_in_flight:
            self._last_step = self._pipeline.read()
            self._num_steps += 1
            self._must_report = True

    # -- commands -----------------------------------------------------------------------------------------------------

    def _take_commands(self) -> None:
        """Handle what clients have sent; with nothing else to do, wait for them, or until somebody must be told."""
        is_busy = self._must_report or self._pipeline.num_in_flight or self._scheduler.has_work
        seconds = 0.0 if is_busy else self._seconds_to_wait()
        ready = dict(self._poller.poll(math.ceil(seconds * 1000)))
        if self._doorbell.fileno() in ready:
            self._doorbell.answer()
        if self._socket in ready:
            for _ in range(MAX_COMMANDS_PER_STEP):
                try:
                    client, data = self._socket.recv_multipart(zmq.NOBLOCK)
                except zmq.Again:
                    return
                self._handle_message(client, data)

    def _seconds_to_wait(self) -> float:
        due_at = self._stats_due_at
        if self._drain_deadline is not None:
            due_at = min(due_at, self._drain_deadline)
        return max(0.0, due_at - self._clock())

    def _handle_message(self, client: bytes, data: bytes) -> None:
        try:
            command = decode_command(data)
        except msgspec.DecodeError:
            _log.error("a message of %d bytes from a client is no command", len(data))
            return
        if client in self._clients or isinstance(command, Hello):
            self._handle(client, command)
        else:
            _log.error("a %s from a client that did not say hello is ignored", type(command).__name__)

    def _handle(self, client: bytes, command: Command) -> None:
        match command:
            case Hello(protocol_version=protocol_version):
                self._greet(client, protocol_version)
            case Submit(request=request):
                self._scheduler.submit(client, request)
            case Abort(request_id=request_id):
                self._scheduler.abort(client, request_id)
            case SaveState():
                self._saves.add(client, command)
            case AdoptCheckpoint():
                self._adoptions.add(client, command)
            case ForgetState(chain=chain):
                self._scheduler.forget(chain)
            case DeleteCheckpoints(checkpoint_ids=checkpoint_ids):
                self._checkpointer.delete(checkpoint_ids)
            case Drain(timeout_seconds=timeout_seconds):
                self._begin_drain(client, timeout_seconds)

    def _greet(self, client: bytes, protocol_version: int) -> None:
        if protocol_version != PROTOCOL_VERSION:
            _log.error("a client speaks protocol %d, not %d", protocol_version, PROTOCOL_VERSION)
            return
        self._clients.add(client)
        self._send(client, self._ready)

    def _lose(self, client: bytes) -> None:
        _log.info("a client is gone; its sequences are aborted")
        self._clients.discard(client)
        self._draining_clients.discard(client)
        self._scheduler.abort_client(client)

    # -- events -------------------------------------------------------------------------------------------------------

    def _send_reports(self) -> None:
        """Send every client one message with all that concerns it; silence lasts no longer than `STATS_SECONDS`."""
        events: defaultdict[bytes, list[SequenceEvent | CheckpointStored | CheckpointFailed]] = defaultdict(list)
        for client, event in [*self._scheduler.take_events(), *self._saves.advance(), *self._adoptions.take_done()]:
            events[client].append(event)
        now = self._clock()
        if not self._must_report and not events and now < self._stats_due_at:
            return
        step, self._last_step, self._must_report = self._last_step, None, False
        self._stats_due_at = now + STATS_SECONDS
        stats = self._stats()
        for client in list(self._clients):
            self._send(client, StepReport(events=events[client], step=step, stats=stats))

    def _send(self, client: bytes, event: Event) -> None:
        try:
            self._socket.send_multipart([client, encode(event)], zmq.NOBLOCK)
        except zmq.ZMQError:  # it is not there any more
            self._lose(client)

    def _stats(self) -> EngineStats:
        scheduler, hot_states = self._scheduler, self._hot_states
        return EngineStats(
            num_steps=self._num_steps,
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            num_slots_used=scheduler.num_slots_used,
            num_slots=scheduler.num_slots,
            num_hot_states=len(hot_states),
            hot_state_bytes=hot_states.num_bytes,
            pending_checkpoints=self._saves.num_pending + self._adoptions.num_pending,
            counters={
                **(scheduler.counters + self._prefixes.counters),
                "rwkv_prefix_states_written_total": self._prefix_store.num_written,
                "rwkv_prefix_states_not_written_total": self._prefix_store.num_failed,
                "rwkv_hot_state_evictions_total": hot_states.num_evicted,
                "rwkv_hot_states_dropped_total": hot_states.num_dropped,
            },
        )

    # -- drain --------------------------------------------------------------------------------------------------------

    def _begin_drain(self, client: bytes, timeout_seconds: float) -> None:
        _log.info("draining", extra={"timeout_seconds": timeout_seconds})
        deadline = self._clock() + timeout_seconds
        self._scheduler.draining = True
        self._draining_clients.add(client)
        self._drain_deadline = min(deadline, self._drain_deadline or deadline)

    def _end_overdue(self) -> None:
        if self._drain_deadline is not None and self._clock() >= self._drain_deadline:
            self._drain_deadline = None
            self._scheduler.abort_all()

    def _answer_drains(self) -> None:
        scheduler = self._scheduler
        if scheduler.num_running or scheduler.num_waiting or self._saves.num_pending or self._adoptions.num_pending:
            return
        for client in list(self._draining_clients):
            self._draining_clients.discard(client)
            self._send(client, Drained())


def _bind(context: zmq.Context[zmq.Socket[bytes]], endpoint: str) -> zmq.Socket[bytes]:
    socket = context.socket(zmq.ROUTER)
    socket.set(zmq.ROUTER_MANDATORY, 1)  # sending to a client that is gone raises, which is how we learn of it
    socket.set(zmq.SNDHWM, 0)  # a client that is stopped for a while misses nothing: what it asked for is finite
    socket.bind(endpoint)
    return socket

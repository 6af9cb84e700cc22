"""The client's end of the seam: submit a sequence, hear its events, whatever process the engine lives in.

Belongs to one event loop. It knows token ids and names of states, never text. Whoever runs a sequence is called with
its events: waking a task for each costs more than what is done with one. Whoever is late is told of more at once. When
the engine dies, every sequence that ran raises `EngineDied` at once, a new engine is started, and requests are refused
until it is ready.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import msgspec
import zmq

from engine.config import EngineConfig
from engine.errors import (
    CheckpointError,
    CheckpointMissing,
    CheckpointRejected,
    EngineDied,
    EngineDraining,
    EngineError,
    InitialStateUnavailable,
    InvalidRequest,
    NumericalError,
    QueueFull,
    StateUnavailable,
    StoreUnavailable,
)
from engine.launch import EngineHost, EngineMain, EngineProcess, EngineThread
from engine.messages import (
    Abort,
    AdoptCheckpoint,
    CheckpointFailed,
    CheckpointRef,
    CheckpointStored,
    Command,
    DeleteCheckpoints,
    Drain,
    Drained,
    EngineReady,
    EngineStats,
    ForgetState,
    GenerationRequest,
    Hello,
    SaveState,
    SequenceFailed,
    SequenceOutput,
    SequenceStarted,
    StepReport,
    Submit,
    decode_event,
    encode,
)

logger = logging.getLogger(__name__)

Entry = TypeVar("Entry")
SequenceEvent = SequenceStarted | SequenceOutput
ReportedEvent = SequenceEvent | SequenceFailed | CheckpointStored | CheckpointFailed
Hear = Callable[[SequenceEvent], None]
Result = TypeVar("Result")

MIN_BACKOFF_SECONDS = 0.2
MAX_BACKOFF_SECONDS = 30.0
READABLE = int(zmq.POLLIN)  # sums of the package's flags are made slowly
MAX_REPORTS_AT_ONCE = 32  # then everything else on the loop has its turn

_FAILURES: dict[str, type[EngineError]] = {
    "queue_full": QueueFull,
    "draining": EngineDraining,
    "state_unavailable": StateUnavailable,
    "initial_state_unavailable": InitialStateUnavailable,
    "numerical_error": NumericalError,
}
_CHECKPOINT_FAILURES: dict[str, type[CheckpointError]] = {
    "not_kept": CheckpointMissing,
    "missing": CheckpointMissing,
    "store_unavailable": StoreUnavailable,
}


class AsyncEngine:
    """An engine, seen from an event loop."""

    def __init__(self, host: EngineHost, on_report: Callable[[StepReport], None] | None = None) -> None:
        self.restarts = 0
        self.latest_stats: EngineStats | None = None
        self._host = host
        self._on_report = on_report
        self._ready: EngineReady | None = None
        self._started: asyncio.Future[EngineReady] | None = None  # the first engine
        self._sequences: dict[str, _Sequence] = {}
        self._saves: defaultdict[bytes, list[asyncio.Future[CheckpointStored]]] = defaultdict(list)  # oldest first
        self._adoptions: dict[str, asyncio.Future[CheckpointStored]] = {}  # by the checkpoint to adopt
        self._drained: list[asyncio.Future[None]] = []
        self._context = zmq.Context[zmq.Socket[bytes]]()
        self._socket: zmq.Socket[bytes] | None = None
        self._supervisor: asyncio.Task[None] | None = None

    @classmethod
    def spawn(cls, config: EngineConfig, on_report: Callable[[StepReport], None] | None = None) -> AsyncEngine:
        """Return an engine that runs in a process of its own."""
        return cls(EngineProcess(config), on_report)

    @classmethod
    def in_process(cls, main: EngineMain, on_report: Callable[[StepReport], None] | None = None) -> AsyncEngine:
        """Return an engine that runs `main(context, endpoint, stop)` in a thread of this process."""
        return cls(EngineThread(main), on_report)

    @property
    def is_ready(self) -> bool:
        """Whether sequences can be submitted."""
        return self._ready is not None

    async def start(self) -> EngineReady:
        """Start the engine and return what it serves; raises `EngineDied` if it ends before it is ready."""
        loop = asyncio.get_running_loop()
        started: asyncio.Future[EngineReady] = loop.create_future()
        self._started = started
        self._supervisor = loop.create_task(self._supervise(started))
        either: list[asyncio.Future[Any]] = [started, self._supervisor]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not started.done():
            self._supervisor.result()  # raises what kept the host from starting anything
        return await started

    async def close(self) -> None:
        """End the engine at once; sequences that still run raise `EngineDied`."""
        if self._supervisor is not None:
            self._supervisor.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._supervisor
            self._supervisor = None
        self._context.term()

    async def run(self, request: GenerationRequest, hear: Hear) -> None:
        """Run `request` to its end, and call `hear` with its events on the way; outputs that wait together come as one.

        An error of `hear`, which is raised here, and being cancelled abort the sequence within one step. Raises
        `InvalidRequest`, `QueueFull`, `EngineDraining`, `StateUnavailable`, `InitialStateUnavailable`,
        `NumericalError`, `EngineDied` or `EngineError`.
        """
        with self._submitted(request, hear) as sequence:
            await sequence.ended

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[SequenceEvent]:
        """As `run`, but yield the events. Leaving early aborts the sequence."""
        events: asyncio.Queue[SequenceEvent | None] = asyncio.Queue()
        with self._submitted(request, events.put_nowait) as sequence:
            sequence.ended.add_done_callback(lambda _: events.put_nowait(None))
            while (event := await events.get()) is not None:
                yield event
            sequence.ended.result()

    @contextlib.contextmanager
    def _submitted(self, request: GenerationRequest, hear: Hear) -> Iterator[_Sequence]:
        if request.request_id in self._sequences:
            raise InvalidRequest("request_id", f"a sequence {request.request_id!r} is running")
        sequence = self._sequences[request.request_id] = _Sequence(hear)
        try:
            self._send(Submit(request))
            yield sequence
        finally:
            del self._sequences[request.request_id]
            sequence.forget()
            if sequence.is_running and self.is_ready:
                self._send(Abort(request.request_id))

    async def save_state(self, chain: bytes, num_tokens: int, copy_of: CheckpointRef | None = None) -> CheckpointStored:
        """Write a kept state to the state store, or for want of it a copy of another checkpoint of the same tokens.

        Raises `CheckpointError` or `EngineDied`.
        """
        stored: asyncio.Future[CheckpointStored] = asyncio.get_running_loop().create_future()
        self._saves[chain].append(stored)
        try:
            self._send(SaveState(chain, num_tokens, copy_of))
            return await stored
        finally:
            self._forget_save(chain, stored)

    async def adopt_checkpoint(self, checkpoint: CheckpointRef, chain: bytes) -> CheckpointStored:
        """Verify a stored state that came from elsewhere and write it anew, named by `chain`: see `AdoptCheckpoint`.

        Raises `CheckpointRejected` if it is not what `checkpoint` says, another `CheckpointError`, or `EngineDied`.
        """
        stored: asyncio.Future[CheckpointStored] = asyncio.get_running_loop().create_future()
        self._adoptions[checkpoint.checkpoint_id] = stored
        try:
            self._send(AdoptCheckpoint(checkpoint, chain))
            return await stored
        finally:
            del self._adoptions[checkpoint.checkpoint_id]

    def forget_state(self, chain: bytes) -> None:
        """Drop a kept state from the engine's memory."""
        if self.is_ready:  # a new engine has nothing to forget
            self._send(ForgetState(chain))

    def delete_checkpoints(self, checkpoint_ids: Iterable[str]) -> None:
        """Remove stored states that nothing points to; lost with a dying engine, they expire by themselves."""
        if self.is_ready:
            self._send(DeleteCheckpoints(tuple(checkpoint_ids)))

    async def drain(self, timeout_seconds: float) -> None:
        """Refuse new sequences, finish or abort the running ones, write pending checkpoints; raises `EngineDied`."""
        drained: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._drained.append(drained)
        try:
            self._send(Drain(timeout_seconds))
            await drained
        finally:
            self._drained.remove(drained)

    # -- the engine's life ---------------------------------------------------------------------------------------------

    async def _supervise(self, started: asyncio.Future[EngineReady]) -> None:
        """Keep an engine running: the first that ends before it is ready is an error, later ones are replaced."""
        backoff_seconds = MIN_BACKOFF_SECONDS
        while True:
            born_at = time.monotonic()
            reason = await self._live()
            if not started.done():
                started.set_exception(EngineDied(reason))
                return
            if started.exception() is not None:
                return
            self.restarts += 1
            logger.error("engine lost: starting another", extra={"reason": reason, "restarts": self.restarts})
            if time.monotonic() - born_at > MAX_BACKOFF_SECONDS:
                backoff_seconds = MIN_BACKOFF_SECONDS
            await asyncio.sleep(backoff_seconds)
            backoff_seconds = min(2 * backoff_seconds, MAX_BACKOFF_SECONDS)

    async def _live(self) -> str:
        """Run one engine from its start to its end; returns why it ended."""
        endpoint = await self._host.start(self._context)
        loop = asyncio.get_running_loop()
        socket = self._socket = self._context.socket(zmq.DEALER)
        socket.set_hwm(0)
        socket.linger = 0
        loop.add_reader(socket.FD, self._take_in)
        reason = "the engine was closed"
        try:
            socket.connect(endpoint)
            self._transmit(Hello())
            reason = await self._host.wait()
            return reason
        finally:
            loop.remove_reader(socket.FD)
            self._ready = self._socket = None
            socket.close()
            self._fail_all(EngineDied(reason))
            await self._host.stop()

    def _take_in(self) -> None:
        """Take in what has come; called whenever something may have.

        The descriptor of a ZeroMQ socket says that its state has changed, and says it once: also after sending, what
        has come must be looked for.
        """
        reports: list[StepReport] = []
        while self._socket is not None and int(self._socket.getsockopt(zmq.EVENTS)) & READABLE:
            if len(reports) == MAX_REPORTS_AT_ONCE:
                asyncio.get_running_loop().call_soon(self._take_in)
                break
            try:
                event = decode_event(self._socket.recv(zmq.NOBLOCK))
            except msgspec.MsgspecError:  # one bad report must not deafen the client
                logger.exception("event not understood")
                continue
            if isinstance(event, StepReport):
                reports.append(event)
            else:
                self._note(event)
        if reports:
            self._tell(_joined(reports))
            self._observe(reports)

    def _note(self, event: EngineReady | Drained) -> None:
        if isinstance(event, Drained):
            _resolve(self._drained, None)
            return
        self._ready = event
        if self._started is not None and not self._started.done():
            self._started.set_result(event)

    def _tell(self, events: Iterable[ReportedEvent]) -> None:
        for event in events:
            if isinstance(event, (SequenceOutput, SequenceStarted, SequenceFailed)):  # nearly always the first
                if (sequence := self._sequences.get(event.request_id)) is not None:
                    sequence.tell(event)
            elif isinstance(event, CheckpointStored):
                _resolve(self._waiting_for(event.adopted, event.ref.chain), event)
            else:
                _reject(self._waiting_for(event.adopted, event.chain), _checkpoint_failure(event))

    def _observe(self, reports: Iterable[StepReport]) -> None:
        for report in reports:
            self.latest_stats = report.stats or self.latest_stats
            if self._on_report is not None:
                self._on_report(report)

    def _waiting_for(self, adopted: str, chain: bytes) -> list[asyncio.Future[CheckpointStored]]:
        """Return, as a list of at most one, who waits for a checkpoint."""
        if not adopted:
            return self._oldest_save(chain)
        return [self._adoptions[adopted]] if adopted in self._adoptions else []

    def _oldest_save(self, chain: bytes) -> list[asyncio.Future[CheckpointStored]]:
        """Return, as a list of at most one, the save that an answer is for: every save has an answer of its own.

        Conversations with equal histories have equal states; each gets a checkpoint that it can delete alone.
        """
        waiting = self._saves.get(chain, ())
        oldest = [*waiting[:1]]
        for stored in oldest:
            self._forget_save(chain, stored)
        return oldest

    def _forget_save(self, chain: bytes, stored: asyncio.Future[CheckpointStored]) -> None:
        if stored in self._saves[chain]:
            self._saves[chain].remove(stored)
        if not self._saves[chain]:
            del self._saves[chain]

    def _fail_all(self, error: EngineError) -> None:
        for sequence in self._sequences.values():
            sequence.end(error)
        for saves in self._saves.values():
            _reject(saves, error)
        _reject(self._adoptions.values(), error)
        _reject(self._drained, error)

    def _send(self, command: Command) -> None:
        if not self.is_ready:
            raise EngineDied("the engine is starting")
        self._transmit(command)

    def _transmit(self, command: Command) -> None:
        assert self._socket is not None, "a ready engine has a socket"
        self._socket.send(encode(command), zmq.NOBLOCK)  # without a high-water mark it never waits
        asyncio.get_running_loop().call_soon(self._take_in)


class _Sequence:
    """A sequence that runs, and who hears of it."""

    def __init__(self, hear: Hear) -> None:
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.is_running = True  # as far as the engine has said
        self._hear = hear

    def tell(self, event: SequenceEvent | SequenceFailed) -> None:
        """Pass on what happened to it."""
        if isinstance(event, SequenceFailed):
            self.end(_failure(event))
            return
        if self.ended.done():
            return
        try:
            self._hear(event)
        except Exception as error:
            self.ended.set_exception(error)
            return
        if isinstance(event, SequenceOutput) and event.finish_reason is not None:
            self.is_running = False
            self.ended.set_result(None)

    def end(self, error: EngineError) -> None:
        """End it with `error`: it runs no more."""
        self.is_running = False
        if not self.ended.done():
            self.ended.set_exception(error)

    def forget(self) -> None:
        """Let nobody care any more how it ended."""
        if not self.ended.cancel() and not self.ended.cancelled():
            self.ended.exception()  # or asyncio complains that it was never asked for


def _joined(reports: Sequence[StepReport]) -> Sequence[ReportedEvent]:
    """Return what the reports say, in order, but all outputs of one sequence as one, where the first stood."""
    if len(reports) == 1:
        return reports[0].events
    events: list[ReportedEvent] = []
    outputs: defaultdict[str, list[SequenceOutput]] = defaultdict(list)
    for event in itertools.chain.from_iterable(report.events for report in reports):
        if isinstance(event, SequenceOutput):
            outputs[event.request_id].append(event)
            if len(outputs[event.request_id]) > 1:
                continue
        events.append(event)
    return [_merged(outputs[event.request_id]) if isinstance(event, SequenceOutput) else event for event in events]


def _merged(outputs: list[SequenceOutput]) -> SequenceOutput:
    """Return consecutive outputs of a sequence as one."""
    if len(outputs) == 1:
        return outputs[0]
    return msgspec.structs.replace(
        outputs[-1],
        token_ids=[token_id for output in outputs for token_id in output.token_ids],
        logprobs=_concatenated(output.logprobs for output in outputs),
        prompt_logprobs=_concatenated(output.prompt_logprobs for output in outputs),
    )


def _concatenated(parts: Iterable[list[Entry] | None]) -> list[Entry] | None:
    known = [part for part in parts if part is not None]
    return [entry for part in known for entry in part] if known else None


def _failure(failed: SequenceFailed) -> EngineError:
    if failed.code == "invalid_request":
        return InvalidRequest(failed.field or "request", failed.message)
    return _FAILURES.get(failed.code, EngineError)(failed.message)


def _checkpoint_failure(failed: CheckpointFailed) -> CheckpointError:
    if failed.reason == "rejected":
        return CheckpointRejected(failed.reason, failed.message)
    return _CHECKPOINT_FAILURES.get(failed.reason, CheckpointError)(failed.message)


def _resolve(futures: Iterable[asyncio.Future[Result]], result: Result) -> None:
    for future in futures:
        if not future.done():
            future.set_result(result)


def _reject(futures: Iterable[asyncio.Future[Any]], error: Exception) -> None:
    for future in futures:
        if not future.done():
            future.set_exception(error)

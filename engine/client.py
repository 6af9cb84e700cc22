"""The client's end of the seam: submit a sequence, read its events, whatever process the engine lives in.

Belongs to one event loop. It knows token ids and names of states, never text. When the engine dies, every sequence
that ran raises `EngineDied` at once, a new engine is started, and requests are refused until it is ready.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Iterable
from typing import Any, TypeVar

import zmq
import zmq.asyncio

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
    Event,
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
Result = TypeVar("Result")

MIN_BACKOFF_SECONDS = 0.2
MAX_BACKOFF_SECONDS = 30.0

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
        self._mailboxes: dict[str, _Mailbox] = {}
        self._saves: defaultdict[bytes, list[asyncio.Future[CheckpointStored]]] = defaultdict(list)  # oldest first
        self._adoptions: dict[str, asyncio.Future[CheckpointStored]] = {}  # by the checkpoint to adopt
        self._drained: list[asyncio.Future[None]] = []
        self._context = zmq.Context[zmq.Socket[bytes]]()
        self._socket: zmq.asyncio.Socket | None = None
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

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[SequenceStarted | SequenceOutput]:
        """Run `request` and yield its events; outputs that wait together arrive as one.

        Leaving early aborts the sequence within one step. Raises `InvalidRequest`, `QueueFull`, `EngineDraining`,
        `StateUnavailable`, `InitialStateUnavailable`, `NumericalError`, `EngineDied` or `EngineError`.
        """
        if request.request_id in self._mailboxes:
            raise InvalidRequest("request_id", f"a sequence {request.request_id!r} is running")
        mailbox = self._mailboxes[request.request_id] = _Mailbox()
        is_running = True
        try:
            self._send(Submit(request))
            while is_running:
                for event in await mailbox.take():
                    if isinstance(event, SequenceOutput):
                        is_running = event.finish_reason is None
                    elif isinstance(event, SequenceFailed):
                        is_running = False
                        raise _failure(event)
                    yield event
        finally:
            del self._mailboxes[request.request_id]
            if is_running and self.is_ready:
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
            reason = await self._live(started)
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

    async def _live(self, started: asyncio.Future[EngineReady]) -> str:
        """Run one engine from its start to its end; returns why it ended."""
        endpoint = await self._host.start(self._context)
        socket = self._socket = zmq.asyncio.Context(self._context).socket(zmq.DEALER)
        socket.set_hwm(0)
        socket.linger = 0
        receiving: asyncio.Task[None] | None = None
        reason = "the engine was closed"
        try:
            socket.connect(endpoint)
            receiving = asyncio.create_task(self._receive(socket, started))
            self._transmit(Hello())
            reason = await self._host.wait()
            return reason
        finally:
            if receiving is not None:
                receiving.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await receiving
            self._ready = self._socket = None
            socket.close()
            self._fail_all(EngineDied(reason))
            await self._host.stop()

    async def _receive(self, socket: zmq.asyncio.Socket, started: asyncio.Future[EngineReady]) -> None:
        while True:
            event = decode_event(await socket.recv())
            try:
                self._dispatch(event, started)
            except Exception:  # one bad report must not deafen the client
                logger.exception("event not handled")

    def _dispatch(self, event: Event, started: asyncio.Future[EngineReady]) -> None:
        if isinstance(event, StepReport):
            self._report(event)
        elif isinstance(event, EngineReady):
            self._ready = event
            if not started.done():
                started.set_result(event)
        elif isinstance(event, Drained):
            _resolve(self._drained, None)

    def _report(self, report: StepReport) -> None:
        for event in report.events:
            if isinstance(event, (SequenceOutput, SequenceStarted, SequenceFailed)):  # nearly always the first
                if (mailbox := self._mailboxes.get(event.request_id)) is not None:
                    mailbox.put(event)
            elif isinstance(event, CheckpointStored):
                _resolve(self._waiting_for(event.adopted, event.ref.chain), event)
            else:
                _reject(self._waiting_for(event.adopted, event.chain), _checkpoint_failure(event))
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
        for mailbox in self._mailboxes.values():
            mailbox.break_with(error)
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
        self._socket.send(encode(command))  # without a high-water mark it never waits


class _Mailbox:
    """The events of one sequence that nobody has read yet. Has one reader."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: list[SequenceStarted | SequenceOutput | SequenceFailed] = []
        self._error: EngineError | None = None
        self._arrival: asyncio.Future[None] | None = None  # what the reader waits for

    def put(self, event: SequenceStarted | SequenceOutput | SequenceFailed) -> None:
        """Add an event; an output is merged into one that still waits."""
        events = self._events
        if events and isinstance(event, SequenceOutput) and isinstance(last := events[-1], SequenceOutput):
            events[-1] = _merged(last, event)
        else:
            events.append(event)
        self._wake_reader()

    def break_with(self, error: EngineError) -> None:
        """Let the reader raise `error` after what has arrived."""
        self._error = error
        self._wake_reader()

    def _wake_reader(self) -> None:
        if self._arrival is not None:
            if not self._arrival.done():
                self._arrival.set_result(None)
            self._arrival = None

    async def take(self) -> list[SequenceStarted | SequenceOutput | SequenceFailed]:
        """Return what has arrived, waiting for the first; raises what broke the sequence."""
        if not self._events and self._error is None:
            self._arrival = self._loop.create_future()
            await self._arrival
        events, self._events = self._events, []
        if not events and self._error is not None:
            raise self._error
        return events


def _merged(first: SequenceOutput, second: SequenceOutput) -> SequenceOutput:
    return SequenceOutput(
        request_id=first.request_id,
        token_ids=first.token_ids + second.token_ids,
        logprobs=_joined(first.logprobs, second.logprobs),
        prompt_logprobs=_joined(first.prompt_logprobs, second.prompt_logprobs),
        finish_reason=second.finish_reason,
        stop_reason=second.stop_reason,
        stop_logprobs=second.stop_logprobs,
        num_sampled_tokens=second.num_sampled_tokens,
        num_kept_tokens=second.num_kept_tokens,
    )


def _joined(first: list[Entry] | None, second: list[Entry] | None) -> list[Entry] | None:
    if first is None or second is None:
        return second if first is None else first
    return first + second


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

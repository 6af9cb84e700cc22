"""How a request is answered: whole, or as server-sent events while it is generated.

What an answer says is its writer's affair: the framing of its events, its end, and how it tells an error. Here is when
it is said: what has come meanwhile goes out in one write, a quiet stream is kept alive, a client that left or does not
read ends the work.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, Protocol, TypeVar

import msgspec
from sse_starlette.event import ServerSentEvent
from sse_starlette.sse import AppStatus, EventSourceResponse
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from server.eager import begin
from server.errors import Answer, answer, is_our_fault
from server.frames import KEEP_ALIVE
from server.generation import ChoiceEvent, Generation, Outcome
from server.metrics import HttpMetrics
from server.middleware import DIRECT_SEND

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

PING_SECONDS = 15.0
# A reader that takes nothing for this long is cut off; its events wait in memory, bounded by max_output_tokens.
SEND_SECONDS = 30.0
# What is not admitted by then streams anyway: pings keep the connection open while it waits, errors come as events.
ADMISSION_SECONDS = 10.0

# The package ends every stream at the first sign of SIGTERM; here `server.drain` lets them finish.
AppStatus.disable_automatic_graceful_drain()  # type: ignore[no-untyped-call]

STREAM_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}

_encoder = msgspec.json.Encoder()


class ReplyWriter(Protocol):
    """Turns a request's events into what its endpoint says: frames of a stream, or one whole reply.

    A frame is one server-sent event with everything around it. A request is answered in one of the two ways only.
    """

    def opening(self) -> bytes:
        """Return the frames a stream begins with, before anything has happened."""
        ...

    def frames(self, event: ChoiceEvent) -> bytes:
        """Return the frames that tell of `event`; nothing if a reader cannot see it."""
        ...

    def closing(self) -> bytes:
        """Return the frames a stream ends with when all choices are complete."""
        ...

    def failure(self, told: Answer) -> bytes:
        """Return the frames a stream ends with when it failed; `told` has an HTTP status that comes too late."""
        ...

    def add(self, event: ChoiceEvent) -> None:
        """Add what `event` brings to the whole reply."""
        ...

    def reply(self) -> msgspec.Struct:
        """Return the whole reply."""
        ...


class SlowReader(ClientDisconnect):
    """The client has taken nothing for `SEND_SECONDS`."""


async def respond(
    request: Request, generation: Generation, writer: ReplyWriter, metrics: HttpMetrics, *, stream: bool
) -> Response:
    """Answer `request` with what `generation` brings; ends it when the client leaves."""
    try:
        if not stream:
            await unless_disconnected(request, _collect(generation, writer))
            return json_response(writer.reply())
        await unless_disconnected(request, generation.admitted(ADMISSION_SECONDS))
    except BaseException:
        await generation.aclose()
        raise
    return EventStream(generation, writer, metrics)


async def _collect(generation: Generation, writer: ReplyWriter) -> None:
    def hear(event: ChoiceEvent) -> bool:
        writer.add(event)
        return True

    generation.attend(hear)
    while events := await generation.take():
        for event in events:
            writer.add(event)
    await generation.aclose()


def whole_reply(writer: ReplyWriter, outcomes: Iterable[Outcome]) -> bytes:
    """Return what a fresh `writer` says of the outcomes, as JSON."""
    for outcome in outcomes:
        for event in outcome.events:
            writer.add(event)
    return _encoder.encode(writer.reply())


def json_response(body: msgspec.Struct, status: int = 200) -> Response:
    """Return `body` as JSON."""
    return Response(_encoder.encode(body), status, media_type="application/json")


async def unless_disconnected(request: Request, work: Awaitable[Result]) -> Result:
    """Return the result of `work`, or cancel it and raise `ClientDisconnect` when the client leaves first."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(request.receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        await _end(working, leaving)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


def told_of(error: Exception, metrics: HttpMetrics) -> Answer:
    """Return what a reader is told of the error that ends a stream, which is being handled; count it, log a defect."""
    told = answer(error)
    metrics.errors.labels(told.code).inc()
    if is_our_fault(error):
        logger.exception("stream failed")
    return told


class RecordedStream(EventSourceResponse):
    """Frames of a recorded run; whoever leaves does not end it.

    Here many tokens share a frame or are long past, so the package's care for each event costs nothing that matters.
    """

    def __init__(
        self, frames: AsyncIterator[bytes], metrics: HttpMetrics, headers: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        super().__init__(
            frames,
            headers={**STREAM_HEADERS, **headers},
            ping=PING_SECONDS,
            ping_message_factory=lambda: ServerSentEvent(comment="keep-alive", sep="\n"),
            send_timeout=SEND_SECONDS,
            sep="\n",
        )
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send what there is, and what comes."""
        self._metrics.streams.inc()
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._metrics.streams.dec()


def _body(data: bytes, *, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": more}


class EventStream(Response):
    """A reply as it comes.

    Written to the ASGI interface itself: a task group, a lock and a timeout scope for every event cost more than the
    event. And written where the event is told, while the client reads: only when it does not, events wait for a task.
    """

    media_type = "text/event-stream"

    def __init__(self, generation: Generation, writer: ReplyWriter, metrics: HttpMetrics) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers(STREAM_HEADERS)
        self._generation = generation
        self._writer = writer
        self._metrics = metrics
        self._sent_at = time.monotonic()  # when the latest write began
        self._is_sending = True  # the head, to begin with
        self._writes_at_once = False  # nothing else is being written, or waits to be
        self._unsent: asyncio.Task[None] | None = None  # the latest of these writes, if it waits for the client

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events; whatever ends this, the generation ends with it.

        Raises `ClientDisconnect` where the client did not get them all.
        """
        self._metrics.streams.inc()
        self._send_body: Send = scope.get(DIRECT_SEND, send)  # each layer on the way costs a coroutine a message
        writing = asyncio.create_task(self._write(send))
        watching = asyncio.create_task(self._watch())
        leaving = asyncio.create_task(_disconnected(receive))
        try:
            ended, _ = await asyncio.wait({writing, watching, leaving}, return_when=asyncio.FIRST_COMPLETED)
            for task in ended:
                task.result()
            if writing not in ended:
                raise ClientDisconnect
        finally:
            self._writes_at_once = False
            await _end(writing, watching, leaving, *([self._unsent] if self._unsent else ()))
            self._metrics.streams.dec()
            await self._generation.aclose()

    async def _write(self, send_head: Send) -> None:
        head = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        await self._send(send_head(head))
        self._generation.attend(self._write_now)
        data, is_over = self._writer.opening(), False
        while not is_over:
            if data:
                await self._send(self._send_body(_body(data)))
            self._writes_at_once = True
            data, is_over = await self._next()
            self._writes_at_once = False
            if self._unsent is not None:
                await self._unsent
        await self._send(self._send_body(_body(data, more=False)))

    def _write_now(self, event: ChoiceEvent) -> bool:
        """Write the frames of `event`, unless something earlier is still to be written; say whether."""
        if not self._writes_at_once:
            return False
        if data := self._writer.frames(event):
            self._sent_at = time.monotonic()
            self._unsent = begin(self._send_body(_body(data)))
            self._writes_at_once = self._unsent is None  # else what comes waits, and then for this
        return True

    async def _next(self) -> tuple[bytes, bool]:
        """Return the frames of everything that has come meanwhile, or of the end, and whether it is that."""
        try:
            if events := await self._generation.take():
                return b"".join(map(self._writer.frames, events)), False
            return self._writer.closing(), True
        except Exception as error:
            return self._writer.failure(told_of(error, self._metrics)), True

    async def _send(self, sending: Awaitable[None]) -> None:
        self._sent_at = time.monotonic()
        self._is_sending = True
        await sending
        self._is_sending = False

    @property
    def _waits_for_client(self) -> bool:
        return self._is_sending or (self._unsent is not None and not self._unsent.done())

    async def _watch(self) -> None:
        """Say that a quiet stream lives; raises `SlowReader` when a write takes too long.

        One sleeper a stream instead of a timer a write; it wakes in time, because pings are due sooner than writes.
        """
        while True:
            patience = SEND_SECONDS if self._waits_for_client else PING_SECONDS
            remaining = self._sent_at + patience - time.monotonic()
            if remaining > 0:
                await asyncio.sleep(remaining)
            elif self._waits_for_client:
                raise SlowReader
            else:
                await self._ping()

    async def _ping(self) -> None:
        try:
            async with asyncio.timeout(SEND_SECONDS):
                await self._send_body(_body(KEEP_ALIVE))
        except TimeoutError:
            raise SlowReader from None
        if not self._waits_for_client:
            self._sent_at = time.monotonic()

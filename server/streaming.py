"""Server-sent events: one write an event, an error event where something fails, `[DONE]` only after a whole reply."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Iterable
from typing import Protocol, TypeVar

import msgspec
from sse_starlette.event import ServerSentEvent
from sse_starlette.sse import AppStatus, EventSourceResponse
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.errors import answer, is_our_fault
from server.generation import ChoiceEvent, Generation
from server.metrics import HttpMetrics

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

PING_SECONDS = 15.0
# A reader that takes nothing for this long is cut off; its events wait in memory, bounded by max_output_tokens.
SEND_SECONDS = 30.0
# What is not admitted by then streams anyway: pings keep the connection open while it waits, errors come as events.
ADMISSION_SECONDS = 10.0

DONE = b"data: [DONE]\n\n"

_encoder = msgspec.json.Encoder()

# The package ends every stream at the first sign of SIGTERM; here `server.drain` lets them finish.
AppStatus.disable_automatic_graceful_drain()  # type: ignore[no-untyped-call]


Part = TypeVar("Part")


class ReplyWriter(Protocol[Part]):
    """Turns a request's events into what its endpoint says: parts of choices, streamed or put together."""

    def parts(self, event: ChoiceEvent) -> Iterable[Part]:
        """Return what the event adds to its choice."""
        ...

    def chunk(self, part: Part) -> msgspec.Struct:
        """Return `part` as an event of a stream."""
        ...

    def closing_chunks(self) -> Iterable[msgspec.Struct]:
        """Return what a stream says when all choices are complete."""
        ...

    def merge(self, part: Part) -> None:
        """Add `part` to the whole reply."""
        ...

    def reply(self) -> msgspec.Struct:
        """Return the whole reply."""
        ...


async def respond(
    request: Request, generation: Generation, writer: ReplyWriter[Part], metrics: HttpMetrics, *, stream: bool
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


async def _collect(generation: Generation, writer: ReplyWriter[Part]) -> None:
    async for event in generation:
        for part in writer.parts(event):
            writer.merge(part)
    await generation.aclose()


def json_response(body: msgspec.Struct, status: int = 200) -> Response:
    """Return `body` as JSON."""
    return Response(_encoder.encode(body), status, media_type="application/json")


async def unless_disconnected(request: Request, work: Awaitable[Result]) -> Result:
    """Return the result of `work`, or cancel it and raise `ClientDisconnect` when the client leaves first."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.wait({working, leaving})


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class EventStream(EventSourceResponse):
    """A reply as it comes."""

    def __init__(self, generation: Generation, writer: ReplyWriter[Part], metrics: HttpMetrics) -> None:
        super().__init__(
            frames(generation, writer, metrics),
            headers={"cache-control": "no-cache"},
            ping=PING_SECONDS,
            ping_message_factory=lambda: ServerSentEvent(comment="keep-alive", sep="\n"),
            send_timeout=SEND_SECONDS,
            sep="\n",
        )
        self._generation = generation
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events; whatever ends this, the generation ends with it."""
        self._metrics.streams.inc()
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._metrics.streams.dec()
            await self._generation.aclose()


async def frames(generation: Generation, writer: ReplyWriter[Part], metrics: HttpMetrics) -> AsyncGenerator[bytes]:
    """Yield the events of a stream as bytes: chunks and `[DONE]`, or chunks and an error."""
    try:
        async for event in generation:
            for part in writer.parts(event):
                yield _frame(writer.chunk(part))
        for chunk in writer.closing_chunks():
            yield _frame(chunk)
        yield DONE
    except Exception as error:
        told = answer(error)
        metrics.errors.labels(told.code).inc()
        if is_our_fault(error):
            logger.exception("stream failed")
        yield _frame(told.body)


def _frame(chunk: msgspec.Struct) -> bytes:
    return b"data: %b\n\n" % _encoder.encode(chunk)

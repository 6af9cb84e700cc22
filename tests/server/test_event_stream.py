"""The event stream as an ASGI application: pings, errors, and who is told what when."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import msgspec
import pytest
from sse_starlette.sse import SendTimeoutError
from starlette.requests import ClientDisconnect
from starlette.types import Message

from server import streaming
from server.drain import Drain
from server.errors import ServerDraining
from server.generation import ChoiceEvent, Generation, Started
from server.metrics import Metrics
from server.rate_limits import Budget, Limits
from server.streaming import EventStream


class Part(msgspec.Struct):
    """A part of a reply."""

    index: int


class Writer:
    """Says the index of every event, and that it is done."""

    def parts(self, event: ChoiceEvent) -> Iterator[Part]:
        """Return one part."""
        yield Part(event.index)

    def chunk(self, part: Part) -> Part:
        """Return the part."""
        return part

    def closing_chunks(self) -> Iterator[Part]:
        """Return a last one."""
        yield Part(-1)

    def merge(self, part: Part) -> None:
        """Not asked for."""
        raise AssertionError

    def reply(self) -> Part:
        """Not asked for."""
        raise AssertionError


class Client:
    """Reads a stream, and may leave."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.has_heard = asyncio.Event()
        self.leaves = asyncio.Event()

    async def receive(self) -> Message:
        """Say when the client has left."""
        await self.leaves.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        """Take what the server sends."""
        if message["type"] == "http.response.body" and message["body"]:
            self.bodies.append(message["body"])
            self.has_heard.set()

    async def read(self, stream: EventStream) -> None:
        """Run the stream to its end."""
        await stream({"type": "http", "method": "POST"}, self.receive, self.send)


async def two_events(generation: Generation) -> None:
    """Say two things."""
    generation.emit(Started(0))
    generation.emit(Started(1))


async def test_a_whole_stream_ends_with_done() -> None:
    """Parts, closing chunks, `[DONE]`: one body message each."""
    client = Client()
    await client.read(EventStream(Generation(Drain(), Budget(Limits()), two_events), Writer(), Metrics().http))
    assert client.bodies == [
        b'data: {"index":0}\n\n',
        b'data: {"index":1}\n\n',
        b'data: {"index":-1}\n\n',
        b"data: [DONE]\n\n",
    ]


@pytest.mark.parametrize(("error", "code"), [(ServerDraining(), "server_draining"), (KeyError("x"), "internal_error")])
async def test_a_stream_that_fails_ends_with_an_error(error: Exception, code: str) -> None:
    """The error takes the place of `[DONE]`, is counted, and says nothing of our insides."""

    async def fail(generation: Generation) -> None:
        generation.emit(Started(0))
        raise error

    client, metrics = Client(), Metrics()
    await client.read(EventStream(Generation(Drain(), Budget(Limits()), fail), Writer(), metrics.http))
    assert client.bodies[0] == b'data: {"index":0}\n\n'
    told = msgspec.json.decode(client.bodies[1].removeprefix(b"data: "))
    assert told["error"]["code"] == code
    assert sorted(told["error"]) == ["code", "message", "param", "type"]
    assert len(client.bodies) == 2
    assert metrics.registry.get_sample_value("rwkv_errors_total", {"code": code}) == 1


async def test_a_quiet_stream_is_kept_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    """Comments come while no token does."""
    monkeypatch.setattr(streaming, "PING_SECONDS", 0.001)

    async def wait(generation: Generation) -> None:
        await asyncio.Event().wait()

    client = Client()
    reading = asyncio.create_task(
        client.read(EventStream(Generation(Drain(), Budget(Limits()), wait), Writer(), Metrics().http))
    )
    await client.has_heard.wait()
    assert client.bodies[0] == b": keep-alive\n\n"
    client.leaves.set()
    with pytest.raises(ClientDisconnect):
        await reading


async def test_a_client_that_leaves_takes_the_work_with_it() -> None:
    """When the stream is over so is the generation, and the stream counts no more."""
    ended = asyncio.Event()

    async def endless(generation: Generation) -> None:
        generation.emit(Started(0))
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    client, metrics = Client(), Metrics()
    reading = asyncio.create_task(
        client.read(EventStream(Generation(Drain(), Budget(Limits()), endless), Writer(), metrics.http))
    )
    await client.has_heard.wait()
    assert metrics.registry.get_sample_value("rwkv_sse_streams") == 1
    client.leaves.set()
    with pytest.raises(ClientDisconnect):
        await reading
    assert ended.is_set()
    assert metrics.registry.get_sample_value("rwkv_sse_streams") == 0


async def test_a_client_that_reads_nothing_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """A send that does not come to an end is not waited for longer than allowed."""
    monkeypatch.setattr(streaming, "SEND_SECONDS", 0.001)

    async def never(message: Message) -> None:
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    stream = EventStream(Generation(Drain(), Budget(Limits()), two_events), Writer(), Metrics().http)
    with pytest.raises(SendTimeoutError):
        await stream({"type": "http", "method": "POST"}, Client().receive, never)

"""The event stream as an ASGI application: pings, errors, and who is told what when."""

from __future__ import annotations

import asyncio

import msgspec
import pytest
from starlette.requests import ClientDisconnect
from starlette.types import Message

from server import streaming
from server.drain import Drain
from server.errors import Answer, ServerDraining
from server.frames import KEEP_ALIVE
from server.generation import ChoiceEvent, Delivered, Generation, Started
from server.metrics import Metrics
from server.rate_limits import Budget, Limits
from server.streaming import EventStream, SlowReader


class Writer:
    """Says that it begins, the index of every event but the tenth, how it failed, and that it is done."""

    def opening(self) -> bytes:
        """Begin."""
        return b"opening\n\n"

    def frames(self, event: ChoiceEvent) -> bytes:
        """Say the index."""
        return b"" if event.index == 10 else b"%d\n\n" % event.index

    def closing(self) -> bytes:
        """End."""
        return b"closing\n\n"

    def failure(self, told: Answer) -> bytes:
        """Tell the error."""
        return told.render() + b"\n\n"

    def add(self, event: ChoiceEvent) -> None:
        """Not asked for."""
        raise AssertionError

    def reply(self) -> msgspec.Struct:
        """Not asked for."""
        raise AssertionError


class Client:
    """Reads a stream, and may leave."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.has_heard = asyncio.Event()
        self.leaves = asyncio.Event()

    async def receive(self) -> Message:
        """Say when the client has left."""
        await self.leaves.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        """Take what the server sends."""
        if message["type"] == "http.response.body":
            self.messages.append(message)
            self.has_heard.set()

    @property
    def bodies(self) -> list[bytes]:
        """What was said, by write."""
        return [message["body"] for message in self.messages]

    async def hear(self) -> None:
        """Wait for the next write."""
        self.has_heard.clear()
        await self.has_heard.wait()

    async def read(self, stream: EventStream) -> None:
        """Run the stream to its end."""
        await stream({"type": "http", "method": "POST"}, self.receive, self.send)


async def two_events(generation: Generation) -> None:
    """Say two things."""
    generation.emit(Started(0))
    generation.emit(Started(1))


async def test_a_whole_stream_is_what_its_writer_says() -> None:
    """How it begins, its events, and how it ends; events that come together go out in one write, even with the end."""
    may_go_on = asyncio.Event()

    async def pause(generation: Generation) -> None:
        await two_events(generation)
        await may_go_on.wait()
        generation.emit(Started(10))
        generation.emit(Started(2))

    client = Client()
    reading = asyncio.create_task(
        client.read(EventStream(Generation(Drain(), Budget(Limits()), pause), Writer(), Metrics().http))
    )
    while len(client.bodies) < 2:
        await client.hear()
    may_go_on.set()
    await reading
    assert client.bodies[:2] == [b"opening\n\n", b"0\n\n1\n\n"]
    assert b"".join(client.bodies[2:]) == b"2\n\nclosing\n\n"


async def test_an_event_without_a_frame_is_no_write() -> None:
    """An empty body message would mean nothing, or the end."""

    async def silent(generation: Generation) -> None:
        generation.emit(Started(10))

    client = Client()
    await client.read(EventStream(Generation(Drain(), Budget(Limits()), silent), Writer(), Metrics().http))
    assert client.messages == [
        {"type": "http.response.body", "body": b"opening\n\n", "more_body": True},
        {"type": "http.response.body", "body": b"closing\n\n", "more_body": False},
    ]


@pytest.mark.parametrize(("error", "code"), [(ServerDraining(), "server_draining"), (KeyError("x"), "internal_error")])
async def test_a_stream_that_fails_ends_with_an_error(error: Exception, code: str) -> None:
    """The error takes the place of the end, is counted, and says nothing of our insides."""

    async def fail(generation: Generation) -> None:
        generation.emit(Started(0))
        raise error

    client, metrics = Client(), Metrics()
    await client.read(EventStream(Generation(Drain(), Budget(Limits()), fail), Writer(), metrics.http))
    assert client.bodies[:2] == [b"opening\n\n", b"0\n\n"]
    told = msgspec.json.decode(client.bodies[2])
    assert told["error"]["code"] == code
    assert sorted(told["error"]) == ["code", "message", "param", "type"]
    assert len(client.bodies) == 3
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
    while len(client.bodies) < 3:
        await client.hear()
    assert client.bodies == [b"opening\n\n", b": keep-alive\n\n", b": keep-alive\n\n"]
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
    await client.hear()
    assert metrics.registry.get_sample_value("rwkv_sse_streams") == 1
    client.leaves.set()
    with pytest.raises(ClientDisconnect):
        await reading
    assert ended.is_set()
    assert metrics.registry.get_sample_value("rwkv_sse_streams") == 0


async def test_a_client_that_reads_nothing_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """A send that does not come to an end is not waited for longer than allowed."""
    monkeypatch.setattr(streaming, "SEND_SECONDS", 0.002)
    monkeypatch.setattr(streaming, "PING_SECONDS", 0.001)  # pings are due sooner than writes

    async def never(message: Message) -> None:
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    stream = EventStream(Generation(Drain(), Budget(Limits()), two_events), Writer(), Metrics().http)
    with pytest.raises(SlowReader):
        await stream({"type": "http", "method": "POST"}, Client().receive, never)


class Counter(Writer):
    """Says the text and how many tokens it is."""

    def frames(self, event: ChoiceEvent) -> bytes:
        """Say both."""
        assert isinstance(event, Delivered)
        return b"%b%d\n\n" % (event.text.encode(), len(event.token_ids))


class MoodyClient(Client):
    """Takes nothing while it does not read."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = asyncio.Event()
        self.reads.set()

    async def send(self, message: Message) -> None:
        """Take what the server sends, when it reads again."""
        await self.reads.wait()
        await super().send(message)


async def settled() -> None:
    """Return when every task has come to wait."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_what_comes_while_a_client_does_not_read_is_told_as_one() -> None:
    """After the write that waits for the client; all others go out where they are told."""
    client, may_end = MoodyClient(), asyncio.Event()

    async def work(_: Generation) -> None:
        await may_end.wait()

    def say(text: str) -> None:
        for character in text:
            generation.emit(Delivered(0, character, [0], None))

    generation = Generation(Drain(), Budget(Limits()), work)
    reading = asyncio.create_task(client.read(EventStream(generation, Counter(), Metrics().http)))
    await settled()
    say("a")
    assert client.bodies == [b"opening\n\n", b"a1\n\n"]
    client.reads.clear()
    say("bcd")
    await settled()
    say("ef")
    assert client.bodies[2:] == []
    client.reads.set()
    say("g")
    await settled()
    assert client.bodies[2:] == [b"b1\n\n", b"cd2\n\n", b"efg3\n\n"]
    say("h")
    assert client.bodies[-1] == b"h1\n\n"
    may_end.set()
    await reading
    assert client.bodies[-1] == b"closing\n\n"


async def test_a_client_that_stops_reading_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though nothing more comes that would have to wait for it."""
    monkeypatch.setattr(streaming, "SEND_SECONDS", 0.01)
    monkeypatch.setattr(streaming, "PING_SECONDS", 0.002)
    client = MoodyClient()

    async def work(_: Generation) -> None:
        await asyncio.Event().wait()

    generation = Generation(Drain(), Budget(Limits()), work)
    reading = asyncio.create_task(client.read(EventStream(generation, Counter(), Metrics().http)))
    await settled()
    client.reads.clear()
    generation.emit(Delivered(0, "a", [0], None))
    with pytest.raises(SlowReader):
        await reading
    assert b"a1\n\n" not in client.bodies


async def test_a_write_that_fails_ends_the_stream() -> None:
    """Also one that was begun where its event was told."""
    client = MoodyClient()

    async def work(_: Generation) -> None:
        await asyncio.Event().wait()

    async def send(message: Message) -> None:
        await client.send(message)
        if message.get("body") == b"a1\n\n":
            raise OSError("broken")

    generation = Generation(Drain(), Budget(Limits()), work)
    stream = EventStream(generation, Counter(), Metrics().http)
    reading = asyncio.create_task(stream({"type": "http", "method": "POST"}, client.receive, send))
    await settled()
    client.reads.clear()
    generation.emit(Delivered(0, "a", [0], None))
    generation.emit(Delivered(0, "b", [0], None))
    client.reads.set()
    with pytest.raises(OSError, match="broken"):
        await reading


async def test_a_client_that_does_not_even_take_a_ping_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quiet stream whose connection is stuck is not kept."""
    monkeypatch.setattr(streaming, "SEND_SECONDS", 0.002)
    monkeypatch.setattr(streaming, "PING_SECONDS", 0.001)

    async def wait(generation: Generation) -> None:
        await asyncio.Event().wait()

    async def send(message: Message) -> None:
        if message.get("body") == KEEP_ALIVE:
            await asyncio.Event().wait()

    stream = EventStream(Generation(Drain(), Budget(Limits()), wait), Writer(), Metrics().http)
    with pytest.raises(SlowReader):
        await stream({"type": "http", "method": "POST"}, Client().receive, send)

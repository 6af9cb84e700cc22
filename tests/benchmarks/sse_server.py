"""`python -m tests.benchmarks.sse_server ENDPOINT PORT DIRECTORY`: the real server on an engine that another plays.

Everything is as `sostenuto serve` makes it, but the engine is expected at a ZeroMQ endpoint instead of being started.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import uvloop
import zmq
from pydantic import BaseModel
from sse_starlette import EventSourceResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from server.assembly import open_services
from server.process import DrainingServer
from server.settings import Settings


class PlayedEngine:
    """An engine that runs already and never ends."""

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint

    async def start(self, context: zmq.Context[zmq.Socket[bytes]]) -> str:
        """Return where it is."""
        return self._endpoint

    async def wait(self) -> str:
        """Never return."""
        await asyncio.Event().wait()
        raise AssertionError

    async def stop(self) -> None:
        """Leave it alone."""


class Choice(BaseModel):
    """A piece of an answer."""

    index: int
    text: str
    finish_reason: str | None = None


class Chunk(BaseModel):
    """What a server whose author wrote no more than the API's schema makes for every token."""

    id: str
    object: str
    created: int
    model: str
    choices: list[Choice]


class BareStreams:
    """In front of the server: two applications that send as many chunks as a query says, each in a trip of the loop.

    `/bare` sends constants: the least that any server in this language, on this loop and with this protocol, can take
    for a chunk. `/plain` makes a pydantic model of each and leaves the rest to the library's event source.
    """

    CHUNK = (
        b'data: {"id":"cmpl-0123456789abcdef","object":"text_completion","choices":[{"index":0,"text":" word"}]}\n\n'
    )

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        path = scope["path"] if scope["type"] == "http" else ""
        if path == "/bare":
            await self._bare(int(scope["query_string"]), send)
        elif path == "/plain":
            await EventSourceResponse(_plain(int(scope["query_string"])), sep="\n")(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _bare(self, count: int, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(count):
            await asyncio.sleep(0)
            await send({"type": "http.response.body", "body": self.CHUNK, "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})


async def _plain(count: int) -> AsyncIterator[str]:
    for _ in range(count):
        await asyncio.sleep(0)
        choice = Choice(index=0, text=" word")
        chunk = Chunk(id="cmpl-0123456789abcdef", object="text_completion", created=0, model="bench", choices=[choice])
        yield chunk.model_dump_json()
    yield "[DONE]"


async def serve(endpoint: str, port: int, directory: Path) -> None:
    """Serve until told to end."""
    settings = Settings(
        model="played", served_model_name="bench", tokenizer="world", template="world", port=port, data_dir=directory,
        log_level="warning", max_output_tokens=1 << 20,
    )  # fmt: skip
    async with open_services(settings, PlayedEngine(endpoint)) as services:
        server = DrainingServer(services)
        server.config.app = BareStreams(server.config.app)  # type: ignore[arg-type]
        await server.serve()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])))

"""`python -m tests.benchmarks.sse_server ENDPOINT PORT DIRECTORY`: the real server on an engine that another plays.

Everything is as `sostenuto serve` makes it, but the engine is expected at a ZeroMQ endpoint instead of being started.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import uvloop
import zmq
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


class BareStreams:
    """In front of the server: `/bare` sends as many constant chunks as its query says, each in a trip of the loop.

    The least that any server in this language, on this loop and with this protocol, can take for a chunk.
    """

    CHUNK = (
        b'data: {"id":"cmpl-0123456789abcdef","object":"text_completion","choices":[{"index":0,"text":" word"}]}\n\n'
    )

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http" or scope["path"] != "/bare":
            await self._app(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(int(scope["query_string"])):
            await asyncio.sleep(0)
            await send({"type": "http.response.body", "body": self.CHUNK, "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})


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

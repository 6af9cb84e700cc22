"""A small OpenAI-like server with known delays and faults, for tests of the load generator. Real sockets, no model."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

WORDS = ("one ", "two ", "three ", "four ")


@dataclass
class Behaviour:
    """What the stub does; tests set the fields before they send."""

    first_token_seconds: float = 0.0
    token_seconds: float = 0.0
    refuse: Callable[[int], tuple[int, str] | None] = lambda number: None  # request number -> status, code
    edit: Callable[[dict[str, Any]], dict[str, Any] | None] = lambda event: event  # None drops the event
    done: bool = True
    break_after: int | None = None  # events, then the connection breaks


@dataclass
class StubServer:
    """The stub on a free loopback port, in a thread of its own."""

    behaviour: Behaviour = field(default_factory=Behaviour)
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)
    versions: dict[str, int] = field(default_factory=dict)
    most_at_once: int = 0

    def __enter__(self) -> StubServer:
        self._at_once = 0
        routes = [
            Route("/v1/models", self._models),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/conversations/{name}", self._delete, methods=["DELETE"]),
        ]
        config = uvicorn.Config(Starlette(routes=routes), log_level="critical", lifespan="off", ws="none")
        self._server = uvicorn.Server(config)
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]}, daemon=True)
        self._thread.start()
        self._socket.listen(128)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.should_exit = True
        self._thread.join(timeout=20)
        self._socket.close()
        assert not self._thread.is_alive()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self._socket.getsockname()[1]}"

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": "stub-model", "object": "model"}]})

    async def _delete(self, request: Request) -> Response:
        self.deleted.append(request.path_params["name"])
        return JSONResponse({"deleted": True})

    async def _chat(self, request: Request) -> Response:
        body = await request.json()
        self.requests.append(body)
        self.headers.append(dict(request.headers))
        if refusal := self.behaviour.refuse(len(self.requests)):
            status, code = refusal
            return JSONResponse({"error": {"message": "no", "type": "t", "param": None, "code": code}}, status)
        return StreamingResponse(self._stream(body), media_type="text/event-stream")

    async def _stream(self, body: dict[str, Any]) -> AsyncIterator[bytes]:
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            behaviour = self.behaviour
            await asyncio.sleep(behaviour.first_token_seconds)
            yield b": keep-alive\r\n\r\n"
            for number, event in enumerate(self._events(body)):
                if number == behaviour.break_after:
                    raise ConnectionAbortedError
                if (edited := behaviour.edit(event)) is not None:
                    yield b"data: " + json.dumps(edited).encode() + b"\r\n\r\n"
                await asyncio.sleep(behaviour.token_seconds)
            if behaviour.done:
                yield b"data: [DONE]\r\n\r\n"
        finally:
            self._at_once -= 1

    def _events(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        words = WORDS[: body["max_tokens"]]
        common = {"id": f"chatcmpl-{len(self.requests)}", "object": "chat.completion.chunk", "model": body["model"]}
        deltas = [{"role": "assistant", "content": ""}, *({"content": word} for word in words)]
        events = [common | {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
        events.append(common | {"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]})
        usage = {"prompt_tokens": 10, "completion_tokens": len(words), "total_tokens": 10 + len(words)}
        events.append(common | {"choices": [], "usage": usage} | self._conversation(body))
        return events

    def _conversation(self, body: dict[str, Any]) -> dict[str, Any]:
        name = body.get("conversation_id")
        if name is None:
            return {}
        parent = self.versions.get(name, 0)
        self.versions[name] = parent + 1
        resume = "hot" if parent else "new"
        return {"conversation": {"id": name, "version": parent + 1, "parent_version": parent or None, "resume": resume}}

"""A stage for tests that were written for a mock server: what they take for granted is there.

They name models, conversations and responses that no real server has. The stage stands between them and ours: it
replaces each of those names by that of something that it has just made there, and passes everything else on as it is,
both ways. The server knows nothing of it.
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from tests.redis_server import free_port

METHODS = ["GET", "POST", "DELETE", "PATCH", "PUT"]
HOP_HEADERS = frozenset({"host", "content-length", "connection", "transfer-encoding", "date", "server"})

CONVERSATION = re.compile(r"^/v1/conversations/(conv_123)(?:/items/(msg_abc))?$|^/v1/conversations/(conv_123)/")
RESPONSE = re.compile(r"^/v1/responses/(resp_677efb5139a88190b512bc3fef8e535d|response_id)(/cancel)?")
CHAT = re.compile(r"^/v1/chat/completions/(completion_id)")
MODEL = re.compile(r"^/v1/models/(gpt-6-astra)$")


class Stage:
    """A proxy on a loopback port, in a thread of its own, for as long as its context lasts."""

    def __init__(self, url: str, model: str) -> None:
        self._model = model
        self._client = httpx.AsyncClient(base_url=url, timeout=60, verify=False)
        self._port = free_port()
        app = Starlette(routes=[Route("/{path:path}", self._pass, methods=METHODS)], lifespan=self._closing)
        config = uvicorn.Config(app, host="127.0.0.1", port=self._port, log_level="error", loop="asyncio")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, name="stage")

    @property
    def base_url(self) -> str:
        """What an OpenAI client is pointed at."""
        return f"http://127.0.0.1:{self._port}/v1"

    def __enter__(self) -> Stage:
        self._thread.start()
        with httpx.Client(verify=False, transport=httpx.HTTPTransport(verify=False, retries=20)) as client:
            client.get(f"{self.base_url}/models")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.should_exit = True
        self._thread.join()

    @contextlib.asynccontextmanager
    async def _closing(self, app: Starlette) -> AsyncIterator[None]:
        async with self._client:
            yield

    # -- one request --------------------------------------------------------------------------------------------------

    async def _pass(self, request: Request) -> Response:
        body = self._body(request, await request.body())
        try:
            path = await self._path(request.url.path)
        except httpx.HTTPStatusError as error:  # the stage cannot be set: the server says why
            return Response(error.response.content, error.response.status_code, media_type="application/json")
        headers = [(name, value) for name, value in request.headers.items() if name not in HOP_HEADERS]
        query = request.url.query.encode()
        url = self._client.base_url.copy_with(raw_path=path.encode() + (b"?" + query if query else b""))
        sent = self._client.build_request(request.method, url, headers=headers, content=body)
        reply = await self._client.send(sent, stream=True)
        kept = {name: value for name, value in reply.headers.items() if name not in HOP_HEADERS}
        return StreamingResponse(_raw(reply), reply.status_code, kept, background=BackgroundTask(reply.aclose))

    def _body(self, request: Request, data: bytes) -> bytes:
        """Return the body with a model that is served, and with an input where a response is asked for without."""
        if not data:
            return data
        body = json.loads(data)
        if "model" in body or request.url.path == "/v1/responses":
            body["model"] = self._model
        if request.url.path == "/v1/responses":
            body.setdefault("input", "Hello.")
        return json.dumps(body).encode()

    async def _path(self, path: str) -> str:
        """Return the path with names of things that exist."""
        if matched := CONVERSATION.match(path):
            return await self._with_conversation(path, matched[2])
        if matched := RESPONSE.match(path):
            made = await self._make("/v1/responses", {"input": "x", "background": bool(matched[2]), "store": True})
            return path.replace(matched[1], made["id"], 1)
        if matched := CHAT.match(path):
            messages = [{"role": "user", "content": "x"}]
            made = await self._make("/v1/chat/completions", {"messages": messages, "store": True})
            return path.replace(matched[1], made["id"], 1)
        if matched := MODEL.match(path):
            return path.replace(matched[1], self._model)
        return path

    async def _with_conversation(self, path: str, item_id: str | None) -> str:
        made = await self._make("/v1/conversations", {"items": [{"role": "user", "content": "x"}]})
        path = path.replace("conv_123", made["id"], 1)
        if item_id is None:
            return path
        items = (await self._client.get(f"/v1/conversations/{made['id']}/items")).json()
        return path.replace(item_id, items["data"][0]["id"], 1)

    async def _make(self, path: str, body: dict[str, Any]) -> Any:
        reply = await self._client.post(path, json=body)
        return reply.raise_for_status().json()


async def _raw(reply: httpx.Response) -> AsyncIterator[bytes]:
    async for data in reply.aiter_raw():
        yield data

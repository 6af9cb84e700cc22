"""One turn over HTTP: what is sent, what comes back, and what can go wrong on the way."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Any

import httpx
import orjson

from loadtest.options import Options
from loadtest.reply import StreamedReply, TurnRecord, error_name
from loadtest.workload import TurnPlan

Message = dict[str, str]


class ServerUnusable(Exception):
    """The server cannot be load-tested: it does not answer, or lists no model."""


class ChatClient:
    """Sends turns and times the replies with `clock` (seconds since the run began)."""

    def __init__(self, options: Options, clock: Callable[[], float]) -> None:
        self._options = options
        self._clock = clock
        self._model = options.model
        headers = {"accept-encoding": "identity", "content-type": "application/json"}
        if options.api_key is not None:
            headers["authorization"] = f"Bearer {options.api_key}"
        self._http = httpx.AsyncClient(
            base_url=options.url,
            headers=headers,
            timeout=None,  # each turn has one limit of its own
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=options.max_in_flight),
            trust_env=False,
        )

    async def __aenter__(self) -> ChatClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.aclose()

    async def find_model(self) -> str:
        """Return the name of the model to ask for; raises `ServerUnusable`."""
        if self._model is None:
            try:
                answer = await self._http.get("/v1/models", timeout=self._options.timeout_seconds)
                answer.raise_for_status()
                self._model = str(answer.json()["data"][0]["id"])
            except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
                raise ServerUnusable(f"{self._options.url}/v1/models: {error or type(error).__name__}") from error
        return self._model

    async def turn(
        self,
        record: TurnRecord,
        plan: TurnPlan,
        *,
        messages: list[Message],
        conversation_id: str | None,
        previous_version: int | None,
    ) -> str:
        """Send one turn, fill in `record`, and return the reply's text. What goes wrong is in `record.error`.

        A cancellation is recorded as the error `unfinished` and goes on.
        """
        body = orjson.dumps(self._body(plan, messages, conversation_id))
        reply = StreamedReply(record, max_tokens=plan.max_tokens, previous_version=previous_version)
        record.request_bytes = len(body)
        try:
            async with asyncio.timeout(self._options.timeout_seconds):
                await self._exchange(body, reply)
        except TimeoutError:
            record.error = "timeout"
        except httpx.ConnectError:
            record.error = "connect"
        except httpx.HTTPError:
            record.error = "broken_stream" if record.first_token is not None else "broken_connection"
        except asyncio.CancelledError:
            record.error = "unfinished"
            raise
        finally:
            record.end = self._clock()
        return reply.text

    async def delete(self, conversation_id: str) -> None:
        """Delete a conversation, or leave it where that fails."""
        try:
            await self._http.delete(f"/v1/conversations/{conversation_id}", timeout=self._options.timeout_seconds)
        except httpx.HTTPError:
            return

    async def _exchange(self, body: bytes, reply: StreamedReply) -> None:
        record = reply.record
        record.sent = self._clock()
        async with self._http.stream("POST", "/v1/chat/completions", content=body) as response:
            if response.status_code != 200:
                record.error = f"http_{response.status_code}:{_error_name(await response.aread())}"
                return
            if not response.headers.get("content-type", "").startswith("text/event-stream"):
                record.violations.append("not_an_event_stream")
            async for piece in response.aiter_raw():
                reply.feed(piece, self._clock())
            reply.finish()

    def _body(self, plan: TurnPlan, messages: list[Message], conversation_id: str | None) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self._model,
            "messages": messages,
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": plan.max_tokens,
            "temperature": self._options.temperature,
            "seed": plan.seed,
        }
        if conversation_id is not None:
            body["conversation_id"] = conversation_id
        if self._options.ignore_eos:
            body["ignore_eos"] = True
        return body


def _error_name(body: bytes) -> str:
    try:
        return error_name(orjson.loads(body))
    except orjson.JSONDecodeError:
        return "unknown"

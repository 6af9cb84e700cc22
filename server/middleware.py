"""What holds for every request, whatever it asks: pure ASGI, so that streams and disconnects pass untouched."""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Awaitable, Mapping
from typing import Final

from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.drain import Drain
from server.errors import Answer, BodyTooLarge, HeadTooLarge, answer, is_our_fault
from server.metrics import HttpMetrics
from server.security import OPEN_PATHS
from server.tenants import Tenant

logger = logging.getLogger(__name__)

REQUEST_ID: Final = re.compile(r"[\w-]{1,64}", re.ASCII)
REFUSED_STATUSES: Final = frozenset({429, 503})  # before anything ran: for the tenant's limits, or the server's
DIRECT_SEND: Final = "sostenuto.direct_send"  # in the scope: see `DirectSend`
OPENAI_VERSION: Final = "2020-10-01"  # the version of OpenAI's API that clients expect: there has been no other
MAX_HEAD_BYTES: Final = 32 << 10
METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class DirectSend:
    """Around everything: bodies may go past the layers in between, which look at heads only and cost time."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on the server's own `send` with the request."""
        scope[DIRECT_SEND] = send
        await self._app(scope, receive, send)


class RequestScope:
    """The outermost layer: a request has an id, is counted, timed, logged once, and always answered.

    Every error ends here and is told in OpenAI's form, unless the answer had already begun.
    """

    def __init__(self, app: ASGIApp, metrics: HttpMetrics, drain: Drain) -> None:
        self.app = app
        self._metrics = metrics
        self._drain = drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        exchange = Exchange(scope, send)
        self._metrics.in_flight.inc()
        try:
            await self._answer(exchange, scope, receive)
        finally:
            self._metrics.in_flight.dec()
            self._record(exchange)

    async def _answer(self, exchange: Exchange, scope: Scope, receive: Receive) -> None:
        is_counted = scope["path"] not in OPEN_PATHS
        try:
            if is_counted:
                self._drain.enter()
        except Exception as error:
            await self._tell(exchange, error)
            return
        try:
            await self.app(scope, receive, exchange.send)
        except ClientDisconnect:
            exchange.code = "client_disconnected"
            self._metrics.disconnects.inc()
        except Exception as error:
            await self._tell(exchange, error)
        finally:
            if is_counted:
                self._drain.leave()

    async def _tell(self, exchange: Exchange, error: Exception) -> None:
        if is_our_fault(error):
            logger.exception("request failed", extra={"request_id": exchange.request_id})
        told = answer(error)
        exchange.code = told.code
        self._metrics.errors.labels(told.code).inc()
        if told.status in REFUSED_STATUSES:
            self._metrics.rejections.labels(told.code).inc()
        if exchange.status is not None:
            raise error  # too late to tell: the connection is closed
        await exchange.send_answer(told)

    def _record(self, exchange: Exchange) -> None:
        # A client that left before its answer began: nginx's 499, since HTTP has no status for it.
        status = str(exchange.status or 499)
        route, method = exchange.route, exchange.method
        self._metrics.requests.labels(route, method, status).inc()
        self._metrics.request_seconds.labels(route).observe(exchange.seconds)
        logger.info(
            "request",
            extra={
                "request_id": exchange.request_id,
                "method": method,
                "route": route,
                "status": status,
                "ms": round(exchange.seconds * 1000, 1),
                "code": exchange.code,
            },
        )


class Exchange:
    """One request and what became of it."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self.status: int | None = None
        self.code: str | None = None
        self.request_id = _request_id(scope)
        self._scope = scope
        self._send = send
        self._started_at = time.perf_counter()

    @property
    def seconds(self) -> float:
        """How long it has lasted."""
        return time.perf_counter() - self._started_at

    @property
    def route(self) -> str:
        """The pattern of the route that matched: a label, so never the path itself."""
        path: str = getattr(self._scope.get("route"), "path", "unmatched")
        return path

    @property
    def method(self) -> str:
        """The method, if it is one."""
        method: str = self._scope["method"]
        return method if method in METHODS else "other"

    def send(self, message: Message) -> Awaitable[None]:
        """Pass `message` on; a head gets what every reply has."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self.request_id
            headers["openai-processing-ms"] = str(round(self.seconds * 1000))
            headers["openai-version"] = OPENAI_VERSION
            headers["x-content-type-options"] = "nosniff"
            headers.setdefault("cache-control", "no-store")
            tenant: Tenant | None = self._scope.get("state", {}).get("tenant")
            if tenant is not None:
                headers.update(dict(tenant.budget.headers()))
        return self._send(message)

    async def send_answer(self, told: Answer) -> None:
        """Send an error."""
        body = told.render()
        headers = {**told.headers, "content-type": "application/json", "content-length": str(len(body))}
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        await self.send({"type": "http.response.start", "status": told.status, "headers": raw})
        await self.send({"type": "http.response.body", "body": body})


def _request_id(scope: Scope) -> str:
    given = [value for name, value in scope["headers"] if name == b"x-request-id"]
    if len(given) == 1 and (matched := REQUEST_ID.fullmatch(given[0].decode("latin-1"))):
        return str(matched[0])
    return uuid.uuid4().hex


class SizeLimits:
    """Refuses long heads, and counts a body while it is read, chunked or not.

    Raises `HeadTooLarge`, and `BodyTooLarge` at the byte that is too much.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int, exceptions: Mapping[str, int]) -> None:
        self.app = app
        self._max_body_bytes = max_body_bytes
        self._exceptions = exceptions  # by path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on with a counting `receive`."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        head = (scope["raw_path"], scope["query_string"], *(part for header in scope["headers"] for part in header))
        if sum(map(len, head)) > MAX_HEAD_BYTES:
            raise HeadTooLarge
        max_body_bytes = self._exceptions.get(scope["path"], self._max_body_bytes)
        announced = [value for name, value in scope["headers"] if name == b"content-length"]
        if announced and announced[0].isdigit() and int(announced[0][:20]) > max_body_bytes:
            raise BodyTooLarge
        num_bytes = 0

        async def receive_counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > max_body_bytes:
                raise BodyTooLarge
            return message

        await self.app(scope, receive_counted, send)

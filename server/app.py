"""The application: routes, and what surrounds them."""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import Awaitable, Callable, Mapping

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from server.api import chat, completions, conversations, health, models, responses, stored_chats, tokenize, transfers
from server.api.operations import describe
from server.errors import Answer, answer, answer_status
from server.middleware import DirectSend, RequestScope, SizeLimits
from server.parsing import problem_of
from server.security import Authentication
from server.services import Services
from server.version import server_version

FAMILIES = (completions, chat, stored_chats, responses, transfers, conversations, models, tokenize, health)
ROUTERS = tuple(family.router for family in FAMILIES)


def create_app(services: Services) -> ASGIApp:
    """Return the ASGI application that serves `services`.

    A request passes, from the outside in: its scope (id, counting, errors), the key, the size limits, the route.
    """
    # No pages about itself and no redirects: every address is one that is written down here.
    app = FastAPI(
        title="Sostenuto",
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        generate_unique_id_function=lambda route: route.name,
    )
    app.state.services = services
    for router in ROUTERS:
        app.include_router(router)
    if services.settings.openapi:
        app.add_route("/openapi.json", _document_of(app))
    app.add_exception_handler(HTTPException, _answer_router)
    app.add_exception_handler(RequestValidationError, _answer_address)
    settings = services.settings
    limits = {transfers.IMPORT_PATH: settings.max_import_bytes}
    app.add_middleware(SizeLimits, max_body_bytes=settings.max_body_bytes, exceptions=limits)
    # The last added is the outermost, but for a layer of the framework.
    app.add_middleware(Authentication, tenants=services.tenants)
    app.add_middleware(RequestScope, metrics=services.metrics.http, drain=services.drain)
    return DirectSend(app)


def _document_of(app: FastAPI) -> Callable[[Request], Awaitable[Response]]:
    """Return the endpoint that describes `app`: in a document that is made once, off the loop, when it is asked for."""

    @functools.cache
    def document() -> bytes:
        return json.dumps(describe(app, ROUTERS, server_version())).encode()  # its integers may be beyond orjson

    async def endpoint(request: Request) -> Response:
        return Response(await asyncio.to_thread(document), media_type="application/json")

    return endpoint


async def _answer_router(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _tell(request, answer_status(error.status_code), error.headers)


async def _answer_address(request: Request, error: Exception) -> Response:
    """Refuse what stands in the address, behind the question mark for example."""
    assert isinstance(error, RequestValidationError)
    return _tell(request, answer(problem_of(error.errors()[0], begin=1)))


def _tell(request: Request, told: Answer, headers: Mapping[str, str] | None = None) -> Response:
    request.app.state.services.metrics.http.errors.labels(told.code).inc()
    return Response(told.render(), told.status, {**told.headers, **(headers or {})}, media_type="application/json")

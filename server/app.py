"""The application: routes, and what surrounds them."""

from __future__ import annotations

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from server.api import chat, completions, conversations, health, models, responses, tokenize
from server.errors import answer_status
from server.middleware import RequestScope, SizeLimits
from server.security import Authentication
from server.services import Services


def create_app(services: Services) -> FastAPI:
    """Return the ASGI application that serves `services`.

    A request passes, from the outside in: its scope (id, counting, errors), the key, the size limits, the route.
    """
    # No pages about itself and no redirects: every address is one that is written down here.
    app = FastAPI(title="Sostenuto", openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.services = services
    for family in (completions, chat, responses, conversations, models, tokenize, health):
        app.include_router(family.router)
    app.add_exception_handler(HTTPException, _answer_router)
    app.add_middleware(SizeLimits, max_body_bytes=services.settings.max_body_bytes)  # the last added is the outermost
    app.add_middleware(Authentication, tenants=services.tenants)
    app.add_middleware(RequestScope, metrics=services.metrics.http, drain=services.drain)
    return app


async def _answer_router(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    told = answer_status(error.status_code)
    request.app.state.services.metrics.http.errors.labels(told.code).inc()
    headers = {**told.headers, **(error.headers or {})}
    return Response(told.render(), told.status, headers, media_type="application/json")

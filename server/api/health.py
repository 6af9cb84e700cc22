"""For probes, scrapers and balancers; nothing here touches a store. `/health` and `/metrics` are open."""

from __future__ import annotations

from fastapi import Response
from prometheus_client import CONTENT_TYPE_LATEST

from server.api.operations import Router
from server.schemas.health import HealthReply, LoadReply, VersionReply
from server.services import Services, ServicesOf
from server.streaming import json_response
from server.version import server_version

router = Router()


@router.operation("GET", "/health", reply=HealthReply, other_replies={503: HealthReply})
async def health(services: ServicesOf) -> Response:
    """Say whether requests sent now will be worked on: the engine makes progress and nobody is shutting down."""
    status = _status(services)
    return json_response(HealthReply(status), 200 if status == "ok" else 503)


def _status(services: Services) -> str:
    if services.drain.has_begun:
        return "draining"
    if not services.engine.is_ready:
        return "engine_down"
    return "stalled" if services.pulse.is_stalled else "ok"


@router.operation("GET", "/metrics", media_type="text/plain")
async def metrics(services: ServicesOf) -> Response:
    """Return every metric in Prometheus' text format."""
    return Response(services.metrics.render(), media_type=CONTENT_TYPE_LATEST)


@router.operation("GET", "/version", reply=VersionReply)
async def version() -> Response:
    """Say which release this is."""
    return json_response(VersionReply(server_version()))


@router.operation("GET", "/load", reply=LoadReply)
async def load(services: ServicesOf) -> Response:
    """Say how many requests are being generated for, running or waiting: what a balancer compares servers by."""
    return json_response(LoadReply(services.drain.num_running))

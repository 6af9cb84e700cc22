"""`/health` and `/metrics`: for probes and scrapers. Both are open and touch no store."""

from __future__ import annotations

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST

from server.schemas.health import HealthReply
from server.services import Services, ServicesOf
from server.streaming import json_response

router = APIRouter()


@router.get("/health")
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


@router.get("/metrics")
async def metrics(services: ServicesOf) -> Response:
    """Return every metric in Prometheus' text format."""
    return Response(services.metrics.render(), media_type=CONTENT_TYPE_LATEST)

"""Who may ask, and how often: decided before anything of a request is read."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from server.errors import Unauthorized
from server.tenants import Tenant, Tenants

# Answered without a key: probes and scrapers have none, and neither tells about what anybody asked.
OPEN_PATHS = frozenset({"/health", "/metrics"})


class Authentication:
    """Refuses every request without a key, or beyond what its key may ask, except to `OPEN_PATHS`.

    A server without keys lets everybody in.

    Deny by default: the path is compared as a whole, as the router does, and what is not on the list needs the key
    even if there is nothing at that address. What passes has `tenant` in its state.
    """

    def __init__(self, app: ASGIApp, tenants: Tenants) -> None:
        self.app = app
        self._tenants = tenants

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the request pass, or raise `Unauthorized` or `RateLimitExceeded`."""
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            tenant = self._tenant(scope)
            scope.setdefault("state", {})["tenant"] = tenant
            tenant.budget.take_request()
        await self.app(scope, receive, send)

    def _tenant(self, scope: Scope) -> Tenant:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        tenant = self._tenants.find(_bearer_token(given[0]) if len(given) == 1 else b"")
        if tenant is None:
            raise Unauthorized
        return tenant


def _bearer_token(header: bytes) -> bytes:
    scheme, _, token = header.partition(b" ")
    return token.strip() if scheme.lower() == b"bearer" else b""

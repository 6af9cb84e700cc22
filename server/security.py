"""Who may ask: one API key, checked before anything of a request is read."""

from __future__ import annotations

import hashlib
import hmac

from pydantic import SecretStr
from starlette.types import ASGIApp, Receive, Scope, Send

from server.errors import Unauthorized

# Answered without a key: probes and scrapers have none, and neither tells about what anybody asked.
OPEN_PATHS = frozenset({"/health", "/metrics"})


class Authentication:
    """Refuses every request without the key, except to `OPEN_PATHS`; a server without a key lets everybody in.

    Deny by default: the path is compared as a whole, as the router does, and what is not on the list needs the key
    even if there is nothing at that address.
    """

    def __init__(self, app: ASGIApp, api_key: SecretStr | None) -> None:
        self.app = app
        self._digest = None if api_key is None else _digest(api_key.get_secret_value().encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the request pass, or raise `Unauthorized`."""
        if scope["type"] == "http" and not self._admits(scope):
            raise Unauthorized
        await self.app(scope, receive, send)

    def _admits(self, scope: Scope) -> bool:
        if self._digest is None or scope["path"] in OPEN_PATHS:
            return True
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        # Digests have one length: the comparison takes the same time whatever was sent.
        return len(given) == 1 and hmac.compare_digest(_digest(_bearer_token(given[0])), self._digest)


def _bearer_token(header: bytes) -> bytes:
    scheme, _, token = header.partition(b" ")
    return token.strip() if scheme.lower() == b"bearer" else b""


def _digest(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()

"""The API process's logs: as the engine's, with the libraries' own chatter turned down."""

from __future__ import annotations

import logging

from engine.logs import configure_logging as send_to_standard_error

# These say on `debug` what was sent, and on `info` what our own request line says better.
CHATTY = ("sse_starlette", "uvicorn.access", "httpx", "asyncio")


def configure_logging(level: str) -> None:
    """Send every logger of this process to standard error as JSON lines."""
    send_to_standard_error(logging.getLevelNamesMapping()[level.upper()])
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)

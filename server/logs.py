"""Logs: one JSON object a line on standard error. Never a prompt, an answer, a key or a conversation's id."""

from __future__ import annotations

import logging

from engine import logs

# These say on `debug` what was sent, and on `info` what our own request line says better.
CHATTY = ("uvicorn.access", "httpx", "asyncio")


def configure_logging(level: str) -> None:
    """Send every logger of this process to standard error as JSON lines, from `level` (debug, info, ...) upwards."""
    logs.configure_logging(logging.getLevelNamesMapping()[level.upper()])
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)

"""Those who wait for a conversation to be free, in order of arrival, inside one API process (promise P6)."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TypeVar

from server.conversations.ledger import ConversationBusy

Taken = TypeVar("Taken")

MAX_WAITING = 4
# How often the head of the line asks again: another process's release is not heard here.
POLL_SECONDS = 0.1


class WaitingLine:
    """One line a conversation. Only its head asks for the lease, so turns that wait here run in the order they came."""

    def __init__(self) -> None:
        self._lines: dict[str, deque[asyncio.Event]] = {}

    def wake(self, conversation_id: str) -> None:
        """Let the head of the line ask again: the lease was given back."""
        line = self._lines.get(conversation_id)
        if line:
            line[0].set()

    async def wait(self, conversation_id: str, attempt: Callable[[], Awaitable[Taken]], max_seconds: float) -> Taken:
        """Return what `attempt` returns, trying again while it raises `ConversationBusy`, for up to `max_seconds`.

        Raises `ConversationBusy` at once when `max_seconds` is 0 or the line is full.
        """
        if conversation_id not in self._lines:
            try:
                return await attempt()
            except ConversationBusy:
                if max_seconds <= 0:
                    raise
        line = self._lines.setdefault(conversation_id, deque())
        if max_seconds <= 0 or len(line) >= MAX_WAITING:
            raise ConversationBusy(conversation_id, POLL_SECONDS)
        place = asyncio.Event()
        line.append(place)
        try:
            return await self._wait_in(line, place, conversation_id, attempt, time.monotonic() + max_seconds)
        finally:
            line.remove(place)
            if line:
                line[0].set()
            else:
                del self._lines[conversation_id]

    async def _wait_in(
        self,
        line: deque[asyncio.Event],
        place: asyncio.Event,
        conversation_id: str,
        attempt: Callable[[], Awaitable[Taken]],
        deadline: float,
    ) -> Taken:
        while (remaining := deadline - time.monotonic()) > 0:
            place.clear()
            if line[0] is place:
                try:
                    return await attempt()
                except ConversationBusy:
                    remaining = min(remaining, POLL_SECONDS)
            try:
                async with asyncio.timeout(remaining):
                    await place.wait()
            except TimeoutError:
                pass
        raise ConversationBusy(conversation_id, POLL_SECONDS)

"""Which servers live: what one has begun and not finished is lost when it has died, and others must be able to tell.

A server says so with a document that lasts a few seconds, and only while it has something that others may ask about.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import AsyncGenerator

from server.conversations.ledger import Document, Ledger, LedgerUnavailable

logger = logging.getLogger(__name__)

KIND = "server"
BEAT_SECONDS = 5.0
LIFE_SECONDS = 15.0


class Presence:
    """The sign of life of one server. Belongs to one event loop."""

    def __init__(self, ledger: Ledger) -> None:
        self.owner = uuid.uuid4().hex
        self._ledger = ledger
        self._num_holders = 0
        self._task: asyncio.Task[None] | None = None

    @contextlib.asynccontextmanager
    async def shown(self) -> AsyncGenerator[None]:
        """Be known to live, to those who share the ledger; raises `LedgerUnavailable` if they cannot be told."""
        if not self._ledger.is_shared:
            yield
            return
        if self._num_holders == 0:
            await self._beat()
        self._num_holders += 1
        if self._task is None:
            self._task = asyncio.create_task(self._keep())
        try:
            yield
        finally:
            self._num_holders -= 1
            if self._num_holders == 0 and self._task is not None:
                self._task.cancel()
                self._task = None

    async def lives(self, owner: str) -> bool:
        """Say whether the server called `owner` lives; of a ledger that is not shared no other can."""
        if owner == self.owner or not self._ledger.is_shared:
            return owner == self.owner
        return await self._ledger.get_document(KIND, owner) is not None

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(BEAT_SECONDS)
            try:
                await self._beat()
            except LedgerUnavailable:
                logger.warning("the ledger does not answer: other servers may take this one for dead")

    async def _beat(self) -> None:
        document = Document(
            kind=KIND, document_id=self.owner, body=b"", created_at=time.time(), ttl_seconds=LIFE_SECONDS
        )
        await self._ledger.put_document(document)

"""Keeping a lease while a turn runs. The ledger, not this module, decides whether the turn may be committed."""

from __future__ import annotations

import asyncio
import contextlib
import time
from types import TracebackType

from server.conversations.ledger import Lease, LeaseLost, Ledger, LedgerUnavailable


class LeaseKeeper:
    """Renews a lease while it is used. If it cannot be kept, `check` says so; the ledger refuses the commit anyway."""

    RENEWALS_PER_LEASE = 3

    def __init__(self, ledger: Ledger, lease: Lease) -> None:
        self.lease = lease
        self._ledger = ledger
        self._lost: LeaseLost | None = None
        self._task: asyncio.Task[None] | None = None

    def check(self) -> None:
        """Raise `LeaseLost` if the lease is known to be gone."""
        if self._lost is not None:
            raise self._lost

    async def _keep(self) -> None:
        renewed_at = time.monotonic()
        while self._lost is None:
            await asyncio.sleep(self.lease.ttl_seconds / self.RENEWALS_PER_LEASE)
            try:
                await self._ledger.renew(self.lease)
                renewed_at = time.monotonic()
            except LeaseLost as lost:
                self._lost = lost
            except LedgerUnavailable:
                if time.monotonic() - renewed_at >= self.lease.ttl_seconds:
                    self._lost = LeaseLost("the ledger did not answer for as long as the lease lasts")

    async def __aenter__(self) -> LeaseKeeper:
        self._task = asyncio.create_task(self._keep())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._task is not None
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

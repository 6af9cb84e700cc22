"""Body of `/health`."""

from __future__ import annotations

import msgspec


class HealthReply(msgspec.Struct, frozen=True):
    """How the server is."""

    status: str  # ok | draining | stalled | engine_down

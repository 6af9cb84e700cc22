"""Bodies of `/health`, `/version` and `/load`."""

from __future__ import annotations

import msgspec


class HealthReply(msgspec.Struct, frozen=True):
    """How the server is."""

    status: str  # ok | draining | stalled | engine_down


class VersionReply(msgspec.Struct, frozen=True):
    """Which release the server is."""

    version: str


class LoadReply(msgspec.Struct, frozen=True):
    """How much the server has to do, by vLLM's name."""

    server_load: int

"""How a server begins: its engine's process first, then what this process needs, while that one loads.

Either imports for a second or two, a web framework here and PyTorch there, and neither waits for the other.
"""

from __future__ import annotations

import asyncio

import uvloop

from engine.launch import EngineProcess
from server.logs import configure_logging
from server.settings import Settings


def serve(settings: Settings) -> int:
    """Serve until told to end; returns the exit status."""
    configure_logging(settings.log_level)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_serve(settings))


async def _serve(settings: Settings) -> int:
    engine = EngineProcess(settings.engine_config)
    try:
        await engine.launch()
        from server.process import run_server  # after the launch: that is the point

        return await run_server(settings, engine)
    finally:
        await engine.stop()

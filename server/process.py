"""The server as a process: from settings to a listening socket, and back on SIGTERM. Begun by `server.start`."""

from __future__ import annotations

import asyncio
import logging
from socket import socket
from types import FrameType

import uvicorn

from engine import garbage
from engine.launch import EngineHost
from server.app import create_app
from server.assembly import open_services
from server.services import Services
from server.settings import Settings

logger = logging.getLogger(__name__)

# After the drain nothing should be left; a connection that will not close does not keep the process.
CLOSE_SECONDS = 1
# Who reuses an idle connection must not meet its end: longer than proxies (60 s, usually) and clients keep theirs.
KEEP_ALIVE_SECONDS = 75
FORCED = 1  # exit status of a server that was told twice


async def run_server(settings: Settings, host: EngineHost) -> int:
    """Serve with an engine of `host` until told to end; returns the exit status."""
    async with open_services(settings, host) as services:
        server = DrainingServer(services)
        await server.serve()
        return FORCED if services.drain.is_forced else 0


class DrainingServer(uvicorn.Server):
    """A uvicorn server that drains on SIGTERM or SIGINT, and aborts on the second."""

    def __init__(self, services: Services) -> None:
        settings = services.settings
        super().__init__(
            uvicorn.Config(
                create_app(services),
                host=settings.host,
                port=settings.port,
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                ws="none",
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=CLOSE_SECONDS,
            )
        )
        self._services = services
        self._loop = asyncio.get_running_loop()
        self._draining: asyncio.Task[None] | None = None

    async def serve(self, sockets: list[socket] | None = None) -> None:
        """Serve until told to end."""
        garbage.settle()  # what start-up made stays
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin the drain at the first signal; give up at the second. The signal itself is dealt with here."""
        if self._services.drain.has_begun:
            self._services.drain.force()
            self.force_exit = self.should_exit = True
            return
        self._services.drain.begin()
        self._loop.call_soon_threadsafe(self._start_draining)

    def _start_draining(self) -> None:
        self._draining = self._loop.create_task(self._drain())

    async def _drain(self) -> None:
        # The listener stays open meanwhile, so that newcomers are told 503 instead of nothing.
        logger.info("draining", extra={"seconds": self._services.settings.shutdown_timeout})
        await self._services.drain.wait(self._services.settings.shutdown_timeout)
        self.should_exit = True

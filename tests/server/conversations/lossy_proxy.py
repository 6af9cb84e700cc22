"""A TCP proxy that can swallow a reply: the request arrives and is carried out, and nobody learns of it."""

from __future__ import annotations

import asyncio
from types import TracebackType


class LossyProxy:
    """Passes bytes on between loopback ports until it is told to lose the next reply, and the connection with it."""

    def __init__(self, target_port: int) -> None:
        self.target_port = target_port
        self.port = 0
        self.num_lost = 0
        self._loses_next = False
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    def lose_next_reply(self) -> None:
        """Swallow the next reply and close its connection."""
        self._loses_next = True

    async def _serve(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        redis, to_redis = await asyncio.open_connection("127.0.0.1", self.target_port)
        requests = asyncio.create_task(self._pass_requests(client, to_redis))
        try:
            while data := await redis.read(65_536):
                if self._loses_next:
                    self._loses_next = False
                    self.num_lost += 1
                    return
                to_client.write(data)
                await to_client.drain()
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            requests.cancel()
            to_redis.close()
            to_client.close()
            self._connections.discard(task)

    async def _pass_requests(self, client: asyncio.StreamReader, to_redis: asyncio.StreamWriter) -> None:
        while data := await client.read(65_536):
            to_redis.write(data)
            await to_redis.drain()
        to_redis.close()

    async def __aenter__(self) -> LossyProxy:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        for connection in list(self._connections):
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        await self._server.wait_closed()

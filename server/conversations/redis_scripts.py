"""The ledger's Redis: its scripts, its deadline, and what its settings keep. Knows no conversation."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError, RedisError, ResponseError

from server.conversations.ledger import Durability, LedgerCorrupt, LedgerUnavailable
from server.conversations.uninterrupted import UninterruptedCalls

MAX_CONNECTIONS = 32

Result = TypeVar("Result")

logger = logging.getLogger(__name__)


class RedisScripts:
    """The Redis at `url` and the Lua scripts `names` beside this file.

    Every call gives an answer, or `LedgerUnavailable` or `LedgerCorrupt`, within `timeout_seconds`, and runs to its end
    even if its caller is cancelled.
    """

    def __init__(self, url: str, names: Sequence[str], timeout_seconds: float) -> None:
        self.address = _without_credentials(url)
        self.calls = UninterruptedCalls()
        self._timeout_seconds = timeout_seconds
        pool = BlockingConnectionPool.from_url(
            url,
            max_connections=MAX_CONNECTIONS,
            timeout=timeout_seconds,
            socket_timeout=timeout_seconds,
            socket_connect_timeout=timeout_seconds,
            retry=Retry(NoBackoff(), 0),  # whether an operation can be repeated is decided here
            decode_responses=False,
        )
        self._redis = Redis.from_pool(pool)
        prelude = _script("prelude")
        self._scripts = {name: self._redis.register_script(prelude + _script(name)) for name in names}

    async def open(self) -> Durability:
        """Connect; return what a commit survives. Warns of settings that cannot keep what a ledger promises."""
        try:
            await self._call(self._redis.ping)
            durability = await self._call(self._read_durability)
            await self._call(self._warn_if_evicting)
        except BaseException:
            await self.close()
            raise
        return durability

    async def close(self) -> None:
        """Wait for the calls that are under way, and disconnect."""
        await self.calls.wait()
        await self._redis.aclose()

    async def run(self, script: str, keys: Sequence[str], *arguments: str | bytes | float) -> list[Any]:
        """Run one script; return its status and what follows."""
        reply: list[Any] = await self._call(self._scripts[script], keys, arguments)
        return reply

    async def command(self, *command: str | bytes | float) -> Any:
        """Run one command that only reads; return its answer."""
        return await self._call(self._redis.execute_command, *command)

    async def scan(self, cursor: int, pattern: str, page: int) -> tuple[int, list[bytes]]:
        """Return where to go on, and those of about `page` keys that match."""
        answer: tuple[int, list[bytes]] = await self._call(self._scan, cursor, pattern, page)
        return answer

    async def read_field(self, keys: Sequence[bytes], field: str) -> tuple[int, list[Any]]:
        """Return the server's time in milliseconds and that field of each hash; an exception for what is no hash."""
        answer: tuple[int, list[Any]] = await self._call(self._read_field, keys, field)
        return answer

    async def _scan(self, cursor: int, pattern: str, page: int) -> tuple[int, list[bytes]]:
        answer: Any = await self._redis.scan(cursor, match=pattern, count=page)
        cursor, keys = answer
        return cursor, keys

    async def _read_field(self, keys: Sequence[bytes], field: str) -> tuple[int, list[Any]]:
        async with self._redis.pipeline(transaction=False) as pipeline:
            pipeline.time()
            for key in keys:
                pipeline.hget(key, field)
            (seconds, microseconds), *values = await pipeline.execute(raise_on_error=False)
        return seconds * 1000 + microseconds // 1000, values

    async def _read_durability(self) -> Durability:
        """Return what a commit survives, as far as the server tells: many hosts hide their configuration."""
        try:
            settings = await self._redis.config_get("append*")
        except ResponseError:
            return Durability.ACKED
        if settings["appendonly"] != "yes":
            logger.warning("%s keeps no append-only file: turns are lost when it ends", self.address)
            return Durability.MEMORY
        return Durability.FSYNCED if settings["appendfsync"] == "always" else Durability.ACKED

    async def _warn_if_evicting(self) -> None:
        try:
            settings = await self._redis.config_get("maxmemory-policy")
        except ResponseError:
            return
        if settings["maxmemory-policy"] != "noeviction":
            logger.warning(
                "%s evicts keys when its memory is full (maxmemory-policy %s): conversations would vanish; "
                "set it to noeviction",
                self.address,
                settings["maxmemory-policy"],
            )

    async def _call(self, operation: Callable[..., Awaitable[Result]], *arguments: Any) -> Result:
        return await self.calls.run(self._with_deadline(operation, *arguments))

    async def _with_deadline(self, operation: Callable[..., Awaitable[Result]], *arguments: Any) -> Result:
        """Run `operation` within the deadline, a second time if the connection broke: a restart of Redis is no error.

        All operations can be repeated without harm but deletions, which may then find their own work done.
        """
        try:
            async with asyncio.timeout(self._timeout_seconds):
                try:
                    return await operation(*arguments)
                except ConnectionError:
                    return await operation(*arguments)
        except (RedisError, OSError) as error:
            raise _translate(error) from error


def new_call_id() -> str:
    """Return the name of a call, by which a script knows it again after a lost reply."""
    return secrets.token_hex(16)


def milliseconds(seconds: float) -> int:
    """Return a time to live as Redis takes it."""
    return max(1, round(seconds * 1000))


def _translate(error: Exception) -> LedgerUnavailable | LedgerCorrupt:
    # A script of ours stumbles only over a record that is not what a script of ours has written.
    is_stumble = getattr(error, "status_code", None) == "ERR" and "user_script" in str(error)
    if isinstance(error, ResponseError) and (is_stumble or "WRONGTYPE" in str(error)):
        return LedgerCorrupt(f"a key of the ledger does not hold what it should: {error}")
    return LedgerUnavailable(f"the ledger's Redis did not do as asked: {error or type(error).__name__}")


def _script(name: str) -> str:
    return Path(__file__).with_name(f"{name}.lua").read_text()


def _without_credentials(url: str) -> str:
    """Return the part of `url` that may be shown."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"

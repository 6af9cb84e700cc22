"""Where an engine runs: in a process of its own, or in a thread of this one. Torch-free; used by `engine.client`.

An engine process is started as `python -m engine ENDPOINT`. The first line on its standard input is its configuration
as JSON; the pipe then stays open as a lifeline: when this process ends, however it ends, the engine sees the end of its
input and ends too. On its standard output it says one thing: why it could not start.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import msgspec
import zmq

from engine.config import EngineConfig

EngineMain = Callable[[zmq.Context[zmq.Socket[bytes]], str, threading.Event], None]

# What an engine may take to end after its lifeline is cut, before it is killed.
END_SECONDS = 5.0

_thread_numbers = itertools.count()


class EngineHost(Protocol):
    """Something that runs one engine at a time."""

    async def start(self, context: zmq.Context[zmq.Socket[bytes]]) -> str:
        """Start an engine; returns the endpoint it is going to bind."""
        ...

    async def wait(self) -> str:
        """Return when the engine has ended, with what is known of the reason."""
        ...

    async def stop(self) -> None:
        """End the engine if it still runs, and wait for its end."""
        ...


class EngineProcess:
    """Runs engines as child processes, reached through a socket in a directory only this user can enter."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._process: asyncio.subprocess.Process | None = None
        self._directory: Path | None = None
        self._ahead: str | None = None  # endpoint of a child that nobody has asked for yet

    @property
    def pid(self) -> int | None:
        """The child's process id."""
        return None if self._process is None else self._process.pid

    async def launch(self) -> None:
        """Start the child that the next `start` is going to return, so that it loads while this process does."""
        self._ahead = await self._launch()

    async def start(self, context: zmq.Context[zmq.Socket[bytes]]) -> str:
        """Start a child, unless one was launched; returns its endpoint."""
        ahead, self._ahead = self._ahead, None
        return ahead or await self._launch()

    async def _launch(self) -> str:
        self._directory = Path(tempfile.mkdtemp(prefix="sostenuto-"))
        endpoint = f"ipc://{self._directory}/engine"
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "engine",
            endpoint,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            # An interrupt typed at the terminal is the server's to handle: it drains the engine first.
            start_new_session=True,
        )
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(self._config) + b"\n")
        with contextlib.suppress(ConnectionError):  # it is gone already: `wait` says so
            await self._process.stdin.drain()
        return endpoint

    async def wait(self) -> str:
        """Return when the child has ended."""
        assert self._process is not None
        assert self._process.stdout is not None
        said = (await self._process.stdout.read()).decode(errors="replace").strip()
        status = await self._process.wait()
        return said or f"the engine process ended with status {status}"

    async def stop(self) -> None:
        """Cut the lifeline; kill the child if it does not end."""
        self._ahead = None
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            try:
                await asyncio.wait_for(self._process.wait(), END_SECONDS)
            except TimeoutError:
                self._process.kill()
                await self._process.wait()
            self._process = None
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None


class EngineThread:
    """Runs engines in a thread of this process, over `inproc://`: the same code, for tests and embedding."""

    def __init__(self, main: EngineMain) -> None:
        self._main = main
        self._stop = threading.Event()
        self._ended: asyncio.Future[str] | None = None
        self._thread: threading.Thread | None = None

    async def start(self, context: zmq.Context[zmq.Socket[bytes]]) -> str:
        """Start the thread; returns its endpoint."""
        endpoint = f"inproc://engine-{next(_thread_numbers)}"
        loop = asyncio.get_running_loop()
        ended = self._ended = loop.create_future()
        stop = self._stop = threading.Event()

        def tell(reason: str) -> None:
            if not ended.done():
                ended.set_result(reason)

        def run() -> None:
            reason = "the engine thread ended"
            try:
                self._main(context, endpoint, stop)
            except BaseException as error:
                reason = f"the engine thread ended with {type(error).__name__}: {error}"
            with contextlib.suppress(RuntimeError):  # the event loop is closed: nobody waits any more
                loop.call_soon_threadsafe(tell, reason)

        self._thread = threading.Thread(target=run, name=endpoint, daemon=True)
        self._thread.start()
        return endpoint

    async def wait(self) -> str:
        """Return when the thread has ended."""
        assert self._ended is not None
        return await asyncio.shield(self._ended)

    async def stop(self) -> None:
        """Ask the thread to end, and wait for it."""
        self._stop.set()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)
            self._thread = None

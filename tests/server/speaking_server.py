"""The whole server in a thread, on an engine whose model says what a test tells it to.

Everything is real but the model: sockets, scheduler, stop strings, states, ledger.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import httpx
import openai
import uvicorn

from engine.config import EngineConfig
from engine.launch import EngineThread
from engine.messages import SamplingParams
from server.app import create_app
from server.assembly import open_services
from server.settings import Settings
from tests.engine.stub_engine import StubEngine
from tests.engine.stub_runner import StubRunner

END_OF_ANSWER = "\n\nUser:"  # a stop of the template


def speaker(lines: Mapping[str, str]) -> StubRunner:
    """Return a runner whose model, over bytes, answers a prompt that ends in a key with what stands there."""

    def next_token(history: Sequence[int], sampling: SamplingParams) -> int:
        told = bytes(history)
        place, key = max((told.rfind(key.encode()), key) for key in lines)
        assert place >= 0, "the script has no answer to this prompt"
        said = len(told) - place - len(key.encode())
        return (lines[key] + END_OF_ANSWER).encode()[said]

    return StubRunner(model=next_token)


class SpeakingServer:
    """A server on a loopback port whose model speaks `lines`."""

    def __init__(self, model: Path, data_dir: Path, lines: Mapping[str, str], *, template: str = "world") -> None:
        self._settings = Settings(
            model=str(model), data_dir=data_dir, template=template, tokenizer="bytes", served_model_name="test"
        )
        config = EngineConfig(model_path="", max_num_seqs=4, max_num_batched_tokens=64)
        self._engine = StubEngine(config, make_runner=lambda: speaker(lines))
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))
        self._started = threading.Event()
        self._server: uvicorn.Server | None = None
        self._socket = socket.create_server(("127.0.0.1", 0))  # listens from now on, whoever accepts
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"

    def client(self) -> openai.OpenAI:
        """Return the unmodified OpenAI client, which validates every reply."""
        return openai.OpenAI(
            base_url=f"{self.url}/v1", api_key="unused", max_retries=0, timeout=60, _strict_response_validation=True
        )

    def http(self) -> httpx.Client:
        """Return a plain client."""
        return httpx.Client(base_url=self.url, timeout=60)

    async def _serve(self) -> None:
        async with open_services(self._settings, EngineThread(self._engine)) as services:
            self._server = uvicorn.Server(uvicorn.Config(create_app(services), lifespan="off", log_config=None))
            self._started.set()
            await self._server.serve([self._socket])

    def __enter__(self) -> SpeakingServer:
        self._thread.start()
        assert self._started.wait(timeout=60)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.should_exit = True
        self._thread.join()
        self._socket.close()

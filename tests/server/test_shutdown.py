"""How a server ends: told once, it finishes what runs; told twice, it does not (promise P19)."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.conftest import OPTIONS
from tests.server.replies import error_of, events_of
from tests.server_process import ServerProcess

Start = Callable[..., ServerProcess]


@pytest.fixture
def start(tiny_model: Path, tmp_path: Path) -> Iterator[Start]:
    """Start servers on the same data that are killed in the end if they still run."""
    started: list[ServerProcess] = []

    def start_one(*options: str) -> ServerProcess:
        process = ServerProcess(tiny_model, tmp_path / "data", *OPTIONS, *options)
        started.append(process)
        process.start()
        return process

    yield start_one
    for process in started:
        if process.process is not None:
            process.kill()


def body(max_tokens: int, **extra: Any) -> dict[str, Any]:
    """Return a streamed turn of the conversation `c`."""
    return {"prompt": "hello", "max_tokens": max_tokens, "conversation_id": "c", "stream": True, **extra}


class Stream:
    """A streamed request that is read in a thread of its own."""

    def __init__(self, server: ServerProcess, request: dict[str, Any]) -> None:
        self.lines: list[str] = []
        self.has_begun = threading.Event()
        self._thread = threading.Thread(target=self._read, args=(server.url, request))
        self._thread.start()
        assert self.has_begun.wait(30)

    def _read(self, url: str, request: dict[str, Any]) -> None:
        with (
            contextlib.suppress(httpx.RemoteProtocolError),  # the connection broke
            httpx.stream("POST", f"{url}/v1/completions", json=request, timeout=60) as response,
        ):
            assert response.status_code == 200, response.read()
            for line in response.iter_lines():
                self.lines.append(line)
                self.has_begun.set()

    def ended(self) -> list[str]:
        """Return all its lines when it has ended; of a connection that was cut, the last may be half a line."""
        self._thread.join(60)
        assert not self._thread.is_alive()
        return self.lines

    def events(self) -> list[Any]:
        """Return all its events when it has ended."""
        return events_of(self.ended())


def terminate(server: ServerProcess) -> None:
    """Send SIGTERM and wait until the server has noticed."""
    assert server.process is not None
    os.kill(server.process.pid, signal.SIGTERM)
    deadline = time.monotonic() + 10
    while httpx.get(f"{server.url}/health", timeout=10).status_code == 200:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def wait(server: ServerProcess) -> int:
    """Return the exit status."""
    assert server.process is not None
    status = server.process.wait(timeout=60)
    server.process = None
    return status


def test_an_idle_server_ends_at_once_with_status_0(start: Start) -> None:
    """Nothing runs, nothing waits."""
    assert start().stop() == 0


def test_a_running_turn_finishes_and_newcomers_are_turned_away(start: Start) -> None:
    """The stream ends as any other; meanwhile health is 503 and requests get 503 with Retry-After."""
    server = start()
    stream = Stream(server, body(6000, ignore_eos=True))
    terminate(server)
    refused = httpx.post(f"{server.url}/v1/completions", json=body(1), timeout=30)
    assert refused.status_code == 503
    assert error_of(refused)["code"] == "server_draining"
    assert int(refused.headers["retry-after"]) > 0
    health = httpx.get(f"{server.url}/health", timeout=30)
    assert (health.status_code, health.json()) == (503, {"status": "draining"})
    events = stream.events()
    assert events[-1] == "[DONE]"
    assert events[-2]["choices"][0]["finish_reason"] == "length"
    assert wait(server) == 0
    again = start()
    assert httpx.get(f"{again.url}/v1/conversations/c", timeout=30).json()["version"] == 1


def test_what_takes_too_long_ends_with_an_error_event_and_is_not_applied(start: Start) -> None:
    """After --shutdown-timeout the stream is told `server_draining`; the conversation is where it was."""
    server = start("--shutdown-timeout", "0.2")
    assert httpx.post(f"{server.url}/v1/completions", json=body(1) | {"stream": False}, timeout=30).status_code == 200
    stream = Stream(server, body(8000, ignore_eos=True))
    terminate(server)
    events = stream.events()
    assert events[-1]["error"]["code"] == "server_draining"
    assert "[DONE]" not in events
    assert wait(server) == 0
    again = start()
    assert httpx.get(f"{again.url}/v1/conversations/c", timeout=30).json()["version"] == 1
    assert httpx.post(f"{again.url}/v1/completions", json=body(1) | {"stream": False}, timeout=30).status_code == 200


def test_a_reply_in_one_piece_is_cut_off_with_503(start: Start) -> None:
    """A request that does not stream hears the same as a status."""
    server = start("--shutdown-timeout", "0.2")
    replies: list[httpx.Response] = []
    request = body(8000, ignore_eos=True) | {"stream": False}
    waiting = threading.Thread(
        target=lambda: replies.append(httpx.post(f"{server.url}/v1/completions", json=request, timeout=60))
    )
    waiting.start()
    while "rwkv_http_requests_in_flight 2.0" not in httpx.get(f"{server.url}/metrics", timeout=30).text:
        time.sleep(0.01)
    terminate(server)
    waiting.join(60)
    assert replies[0].status_code == 503
    assert error_of(replies[0])["code"] == "server_draining"
    assert wait(server) == 0


def test_a_response_in_the_background_that_is_cut_off_says_why(start: Start) -> None:
    """It is found as failed, for the same reason as its stream was told: nobody has cancelled it."""
    server = start("--shutdown-timeout", "0.2")
    endless = {"input": "hello", "background": True, "max_output_tokens": 8000, "ignore_eos": True}
    made = httpx.post(f"{server.url}/v1/responses", json=endless, timeout=30).json()
    while httpx.get(f"{server.url}/v1/responses/{made['id']}", timeout=30).json()["status"] == "queued":
        time.sleep(0.01)
    terminate(server)
    assert wait(server) == 0
    found = httpx.get(f"{start().url}/v1/responses/{made['id']}", timeout=30).json()
    assert found["status"] == "failed"
    assert found["error"]["code"] == "server_draining"


def test_a_half_sent_body_does_not_keep_the_server(start: Start) -> None:
    """A client that never finishes its request is not waited for beyond the timeouts."""
    server = start("--shutdown-timeout", "0.2")
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
        while "rwkv_http_requests_in_flight 2.0" not in httpx.get(f"{server.url}/metrics", timeout=30).text:
            time.sleep(0.01)
        terminate(server)
        assert wait(server) == 0


def test_a_second_signal_aborts(start: Start) -> None:
    """Told twice, the server does not wait for running turns, and does not claim to have ended well."""
    server = start()
    stream = Stream(server, body(8000, ignore_eos=True))
    terminate(server)
    assert server.process is not None
    os.kill(server.process.pid, signal.SIGTERM)
    assert wait(server) != 0
    assert "data: [DONE]" not in stream.ended()

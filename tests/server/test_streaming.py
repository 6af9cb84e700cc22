"""Streams over a real socket: every write whole events, errors told inside, nobody generates for a client that left."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.conftest import OPTIONS
from tests.server.replies import error_of, stream_events
from tests.server_process import ServerProcess

LONG = {"prompt": "abc", "max_tokens": 8000, "ignore_eos": True}


@pytest.fixture(scope="module")
def narrow(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server that runs one sequence at a time, lets one wait, and has little patience with slow bodies."""
    limits = ("--max-num-seqs", "1", "--max-num-queued-reqs", "1", "--body-seconds", "0.5")
    with ServerProcess(tiny_model, tmp_path_factory.mktemp("narrow") / "data", *OPTIONS, *limits) as process:
        yield process


def until(condition: Callable[[], bool]) -> None:
    """Wait until `condition` holds, for a bounded time."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def sample(client: httpx.Client, name: str) -> float:
    """Return a metric without labels."""
    lines = client.get("/metrics").text.splitlines()
    return float(next(line.removeprefix(f"{name} ") for line in lines if line.startswith(f"{name} ")))


def request_bytes(path: str, body: dict[str, Any]) -> bytes:
    """Return a request as it goes over the wire."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
    return head.encode() + data


def kill_engine(server: ServerProcess) -> None:
    """Kill the engine process of a server, as a driver that gives up would."""
    assert server.process is not None
    server_pid = server.process.pid
    children = Path(f"/proc/{server_pid}/task/{server_pid}/children").read_text().split()
    assert len(children) == 1
    os.kill(int(children[0]), signal.SIGKILL)


def test_every_write_holds_whole_events(server: ServerProcess) -> None:
    """No HTTP chunk ends inside an event: parsers that look at one read at a time see whole events."""
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 5, "stream": True, "logprobs": True}
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(request_bytes("/v1/chat/completions", body))
        reader = connection.makefile("rb")
        while reader.readline() != b"\r\n":
            pass
        writes = []
        while size := int(reader.readline(), 16):
            writes.append(reader.read(size))
            reader.readline()
    assert len(writes) >= 2
    assert all(write.endswith(b"\n\n") for write in writes)
    events = b"".join(writes).removesuffix(b"\n\n").split(b"\n\n")
    assert len(events) >= 4
    assert all(event.startswith(b"data: ") and b"\n" not in event for event in events)
    assert events[-1] == b"data: [DONE]"


def test_proxies_are_asked_not_to_hold_a_stream_back(http: httpx.Client) -> None:
    """Neither buffered nor stored."""
    body = {"prompt": "x", "max_tokens": 1, "stream": True}
    with http.stream("POST", "/v1/completions", json=body) as response:
        response.read()
    assert response.headers["x-accel-buffering"] == "no"
    assert response.headers["cache-control"] == "no-cache"


def test_tokens_arrive_while_others_are_still_to_come(http: httpx.Client) -> None:
    """The first event is there long before the last."""
    with http.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")
        assert sample(http, "rwkv_sequences_running") >= 1


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_turn(http: httpx.Client, stream: bool) -> None:
    """The sequence is aborted, nothing is applied, and the conversation is free at once."""
    conversation_id = f"left-{stream}"
    body = {**LONG, "conversation_id": conversation_id, "stream": stream}
    before = sample(http, "rwkv_client_disconnects_total")
    with socket.create_connection(("127.0.0.1", http.base_url.port or 0), timeout=30) as connection:
        connection.sendall(request_bytes("/v1/completions", body))
        until(lambda: sample(http, "rwkv_sequences_running") == 1)
    until(lambda: sample(http, "rwkv_sequences_running") == 0)
    assert http.get(f"/v1/conversations/{conversation_id}").json()["version"] == 0
    again = {**LONG, "max_tokens": 2, "conversation_id": conversation_id}
    assert http.post("/v1/completions", json=again).json()["conversation"]["version"] == 1
    until(lambda: sample(http, "rwkv_client_disconnects_total") == before + 1)


def test_all_choices_end_with_their_client(http: httpx.Client) -> None:
    """Also those of a request with several."""
    with socket.create_connection(("127.0.0.1", http.base_url.port or 0), timeout=30) as connection:
        connection.sendall(request_bytes("/v1/completions", {**LONG, "prompt": ["a", "b"], "n": 2, "stream": True}))
        until(lambda: sample(http, "rwkv_sequences_running") == 4)
    until(lambda: sample(http, "rwkv_sequences_running") == 0)


def test_a_full_queue_is_told_before_the_first_byte(narrow: ServerProcess) -> None:
    """One runs, one waits, the third is refused with 503 and Retry-After; those that waited are served."""
    with (
        httpx.Client(base_url=narrow.url, timeout=60) as client,
        httpx.Client(base_url=narrow.url, timeout=60) as waiting,
        client.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as running,
    ):
        lines = running.iter_lines()
        next(lines)
        with socket.create_connection(("127.0.0.1", narrow.port), timeout=30) as queued:
            queued.sendall(request_bytes("/v1/completions", {**LONG, "stream": True}))
            until(lambda: sample(waiting, "rwkv_sequences_waiting") == 1)
            for stream in (True, False):
                refused = waiting.post("/v1/completions", json={**LONG, "stream": stream})
                assert refused.status_code == 503
                assert error_of(refused)["code"] == "queue_full"
                assert int(refused.headers["retry-after"]) >= 1
        # The one that waited has left: its place is free, though it never ran.
        until(lambda: sample(waiting, "rwkv_sequences_waiting") == 0)
        assert sample(waiting, "rwkv_sequences_running") == 1
    with httpx.Client(base_url=narrow.url, timeout=60) as client:
        until(lambda: sample(client, "rwkv_sequences_running") == 0)
        assert stream_events(client, "/v1/completions", {"prompt": "x", "max_tokens": 1})[-1] == "[DONE]"


def test_a_body_that_does_not_come_is_not_waited_for(narrow: ServerProcess) -> None:
    """408 after the time allowed, and the connection is closed."""
    with socket.create_connection(("127.0.0.1", narrow.port), timeout=30) as connection:
        connection.sendall(b"POST /tokenize HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
        reply = b""
        while piece := connection.recv(4096):
            reply += piece
    assert reply.startswith(b"HTTP/1.1 408 ")
    assert b'"body_timeout"' in reply


def test_an_engine_that_dies_is_told_and_replaced(tiny_model: Path, tmp_path: Path) -> None:
    """Streams end with `engine_restarted`, nothing is applied, and the next turn finds a new engine."""
    with (
        ServerProcess(tiny_model, tmp_path / "data", *OPTIONS) as process,
        httpx.Client(base_url=process.url, timeout=60) as client,
    ):
        first = {"prompt": "abc", "max_tokens": 4, "temperature": 0, "conversation_id": "survivor"}
        assert client.post("/v1/completions", json=first).status_code == 200
        body = {**LONG, "conversation_id": "survivor", "stream": True}
        with client.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            kill_engine(process)
            last = [line for line in lines if line][-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_restarted"
        until(process.is_healthy)
        assert sample(client, "rwkv_engine_restarts") == 1
        reply = client.post("/v1/completions", json=first).json()
        assert reply["conversation"]["version"] == 2
        assert reply["conversation"]["resume"] in ("restored", "replayed")

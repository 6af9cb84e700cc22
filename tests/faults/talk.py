"""A fixed conversation for fault tests: what is said, how a turn is asked for, and what came back."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from tests.server_process import ServerProcess

LINES = ("Good morning.", "My name is Ada.", "Tell me about the sea.", "And what is my name?", "Good night.")
MAX_TOKENS = 24


@dataclass(frozen=True, slots=True)
class Reply:
    """One answered turn."""

    token_ids: tuple[int, ...]
    version: int
    resume: str


def turn_body(line: str, conversation_id: str, seed: int, **extra: Any) -> dict[str, Any]:
    """Return the request for one sampled turn: same line, same seed, same history, hence same tokens."""
    return {
        "model": "test",
        "messages": [{"role": "user", "content": line}],
        "conversation_id": conversation_id,
        "max_tokens": MAX_TOKENS,
        "seed": seed,
        "temperature": 1.0,
        "stop": ["\n\n"],
        "return_token_ids": True,
        **extra,
    }


def say(server: ServerProcess, line: str, conversation_id: str, seed: int, **extra: Any) -> Reply:
    """Run one turn to its end, waiting while the conversation is busy."""
    response = post_turn(server, turn_body(line, conversation_id, seed, **extra))
    assert response.status_code == 200, response.text
    body = response.json()
    return Reply(
        token_ids=tuple(body["choices"][0]["token_ids"]),
        version=body["conversation"]["version"],
        resume=body["conversation"]["resume"],
    )


def post_turn(server: ServerProcess, body: dict[str, Any]) -> httpx.Response:
    """Ask for a turn; while another one holds the lease, come back when told to."""
    deadline = time.monotonic() + 60
    while True:
        response = server.http.post("/v1/chat/completions", json=body)
        if response.status_code != 409 or time.monotonic() > deadline:
            return response
        time.sleep(min(float(response.headers["retry-after"]), 0.5))


def talk(server: ServerProcess, conversation_id: str, lines: Sequence[str] = LINES) -> list[Reply]:
    """Hold a whole conversation, turn `i` seeded with `i`."""
    return [say(server, line, conversation_id, seed) for seed, line in enumerate(lines)]


def version(server: ServerProcess, conversation_id: str) -> int:
    """Return the version the server reports."""
    response = server.http.get(f"/v1/conversations/{conversation_id}")
    assert response.status_code == 200, response.text
    return int(response.json()["version"])


@contextlib.contextmanager
def streaming_turn(server: ServerProcess, body: dict[str, Any]) -> Iterator[Iterator[dict[str, Any]]]:
    """Open a streaming turn and hand over its events as they arrive."""
    with server.http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as response:
        assert response.status_code == 200, response.read()
        yield (
            json.loads(line.removeprefix("data: "))
            for line in response.iter_lines()
            if line.startswith("data: ") and line != "data: [DONE]"
        )


def kill_while_streaming(server: ServerProcess, body: dict[str, Any], after_events: int = 5) -> None:
    """Start a streaming turn and kill the server in the middle of it; the client sees the connection break."""
    with contextlib.suppress(httpx.TransportError), streaming_turn(server, body) as events:
        for number, event in enumerate(events):
            assert "error" not in event
            if number == after_events:
                server.kill()
                break
    assert server.process is None, "the turn ended before the server was killed"

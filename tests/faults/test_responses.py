"""Responses through kills, and on two servers: what was answered stays, what was not says why."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.redis_server import RedisServer
from tests.server_process import ServerProcess, redis_options

ENDLESS = {"max_output_tokens": 8000, "ignore_eos": True, "background": True}


def ask(server: ServerProcess, text: str, **extra: Any) -> dict[str, Any]:
    """Return a response, short unless told otherwise."""
    reply = server.http.post("/v1/responses", json={"input": text, "max_output_tokens": 8, "seed": 1, **extra})
    assert reply.status_code == 200, reply.text
    body: dict[str, Any] = reply.json()
    return body


def find(server: ServerProcess, response_id: str) -> dict[str, Any]:
    """Return a response as it stands."""
    reply = server.http.get(f"/v1/responses/{response_id}")
    assert reply.status_code == 200, reply.text
    body: dict[str, Any] = reply.json()
    return body


def events(server: ServerProcess, response_id: str, after: int | None = None) -> list[dict[str, Any]]:
    """Return the events of a response to their end."""
    params: dict[str, Any] = {"stream": True} if after is None else {"stream": True, "starting_after": after}
    with server.http.stream("GET", f"/v1/responses/{response_id}", params=params) as reply:
        assert reply.status_code == 200, reply.read()
        return [json.loads(line.removeprefix("data: ")) for line in reply.iter_lines() if line.startswith("data: ")]


def begin(server: ServerProcess) -> str:
    """Begin a long response in the background and return its id once it is being generated."""
    body = {"input": "Hello.", "stream": True, **ENDLESS}
    with server.http.stream("POST", "/v1/responses", json=body) as reply:
        for line in reply.iter_lines():
            event = json.loads(line.removeprefix("data: ")) if line.startswith("data: ") else {}
            if event.get("type") == "response.created":
                response_id: str = event["response"]["id"]
            if event.get("type") == "response.output_text.delta":
                return response_id
    raise AssertionError("the stream ended without a word")


def test_what_was_answered_outlives_a_kill(server: ServerProcess) -> None:
    """It is found as it was told, and continued as if nothing had happened: tokens, branches and usage."""
    first = ask(server, "Hello.")
    calm = ask(server, "And?", previous_response_id=first["id"])
    server.restart()
    assert find(server, first["id"]) == first
    killed = ask(server, "And?", previous_response_id=first["id"])
    assert killed["output"][0]["content"] == calm["output"][0]["content"]
    assert killed["usage"]["total_tokens"] == calm["usage"]["total_tokens"]
    assert killed["state"]["resume"] in ("restored", "replayed")


def test_a_response_that_a_kill_interrupts_has_failed(tiny_model: Path, tmp_path: Path) -> None:
    """It says so, its stream ends, and it cannot be continued."""
    with ServerProcess(tiny_model, tmp_path / "data") as server:
        response_id = begin(server)
        server.restart()
        found = find(server, response_id)
        assert (found["status"], found["error"]["code"]) == ("failed", "server_restarted")
        told = events(server, response_id, after=9)
        assert [event["sequence_number"] for event in told] == list(range(10, 10 + len(told)))
        assert (told[-1]["type"], told[-1]["response"]) == ("response.failed", found)
        assert events(server, response_id)[-1]["response"] == found
        body = {"input": "Go on.", "previous_response_id": response_id}
        refused = server.http.post("/v1/responses", json=body)
        assert refused.json()["error"]["code"] == "previous_response_unfinished"


@pytest.fixture
def pair(tiny_model: Path, tmp_path: Path, redis_server: RedisServer) -> Iterator[Sequence[ServerProcess]]:
    """Two running servers that share a Redis and nothing else."""
    options = redis_options(redis_server.url)
    with (
        ServerProcess(tiny_model, tmp_path / "first", *options) as first,
        ServerProcess(tiny_model, tmp_path / "second", *options) as second,
    ):
        yield first, second


def test_a_response_of_one_server_is_known_to_another(pair: Sequence[ServerProcess]) -> None:
    """Found, followed to its end, and continued."""
    first, second = pair
    made = ask(first, "Hello.", background=True, max_output_tokens=400, ignore_eos=True)
    told = events(second, made["id"])
    assert [event["sequence_number"] for event in told] == list(range(len(told)))
    assert told[0]["type"] == "response.created"
    assert told[-1]["response"]["status"] == "incomplete"
    assert told[-1]["response"] == find(first, made["id"]) == find(second, made["id"])
    there = ask(second, "And?", previous_response_id=made["id"])
    here = ask(first, "And?", previous_response_id=made["id"])
    assert there["output"][0]["content"] == here["output"][0]["content"]
    assert there["usage"]["total_tokens"] == here["usage"]["total_tokens"]


@pytest.mark.parametrize("verb", ["cancel", "delete"])
def test_a_response_of_one_server_is_ended_by_another(pair: Sequence[ServerProcess], verb: str) -> None:
    """Cancelled or deleted, wherever it is generated; whoever follows it is told."""
    first, second = pair
    response_id = begin(first)
    if verb == "delete":
        assert second.http.delete(f"/v1/responses/{response_id}").status_code == 200
        for server in pair:
            assert server.http.get(f"/v1/responses/{response_id}").status_code == 404
        return
    assert second.http.post(f"/v1/responses/{response_id}/cancel").json()["status"] == "cancelled"
    for server in pair:
        assert find(server, response_id)["status"] == "cancelled"
        assert events(server, response_id)[-1]["response"]["status"] == "cancelled"


def test_a_response_of_a_dead_server_has_failed(pair: Sequence[ServerProcess]) -> None:
    """Whoever follows it on another server is told, as soon as that one is known to be dead."""
    first, second = pair
    response_id = begin(first)
    assert find(second, response_id)["status"] == "in_progress"
    first.kill()
    last = events(second, response_id)[-1]
    assert (last["type"], last["response"]["error"]["code"]) == ("response.failed", "server_restarted")
    assert second.http.post(f"/v1/responses/{response_id}/cancel").json()["status"] == "failed"

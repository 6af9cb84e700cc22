"""What tests look for in replies."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import httpx


def error_of(response: httpx.Response) -> dict[str, Any]:
    """Return the error of a refused request, which has OpenAI's form and carries a request id."""
    body = response.json()
    assert list(body) == ["error"]
    assert sorted(body["error"]) == ["code", "message", "param", "type"]
    assert isinstance(body["error"]["message"], str)
    assert isinstance(body["error"]["code"], str)
    assert response.headers["x-request-id"]
    error: dict[str, Any] = body["error"]
    return error


def events_of(lines: Iterable[str]) -> list[Any]:
    """Return the data of every event, `[DONE]` as it is."""
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    return [item if item == "[DONE]" else json.loads(item) for item in data]


def stream_events(client: httpx.Client, path: str, body: dict[str, Any]) -> list[Any]:
    """Run a streamed request to its end and return its events."""
    with client.stream("POST", path, json={**body, "stream": True}) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        return events_of(response.iter_lines())

"""What becomes of a turn whose client leaves (promise P3), over real sockets."""

from __future__ import annotations

import json
import socket
import uuid
from typing import Any

import httpx
import pytest

from tests.server.replies import error_of
from tests.server_process import ServerProcess

LONG = "[a-z]{400}"
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hello."}], "max_tokens": 2000},
    "/v1/completions": {"prompt": "Hello.", "max_tokens": 2000},
    "/v1/responses": {"input": "Hello.", "max_output_tokens": 2000},
}


@pytest.fixture
def conversation(http: httpx.Client) -> str:
    """A new conversation."""
    return str(http.post("/v1/conversations", json={}).json()["id"])


def ask_and_leave(server: ServerProcess, path: str, body: dict[str, Any]) -> None:
    """Send a request and hang up: a stream when it has begun, anything else when it runs."""
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(content)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(head.encode() + content)
        if body["stream"]:
            connection.recv(1)
        while server.http.get("/load").json()["server_load"] == 0:
            pass


def wait_until_idle(http: httpx.Client) -> None:
    """Return when nothing is generated."""
    while http.get("/load").json()["server_load"] > 0:
        pass


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", BODIES)
def test_a_turn_can_be_finished_for_a_client_that_left(
    server: ServerProcess, http: httpx.Client, conversation: str, path: str, stream: bool
) -> None:
    """With `finish` it is applied, whole; without, the conversation is where it was."""
    body = {**BODIES[path], "conversation": conversation, "guided_regex": LONG, "stream": stream}
    ask_and_leave(server, path, body)
    wait_until_idle(http)
    assert http.get(f"/v1/conversations/{conversation}").json()["version"] == 0
    ask_and_leave(server, path, {**body, "on_disconnect": "finish"})
    wait_until_idle(http)
    assert http.get(f"/v1/conversations/{conversation}").json()["version"] == 1
    last = http.get(f"/v1/conversations/{conversation}/items", params={"limit": 1}).json()["data"][0]
    assert len(last["content"][0]["text"]) >= 400


def test_a_stored_completion_can_be_finished(server: ServerProcess, http: httpx.Client) -> None:
    """It is found afterwards though nobody was told of it."""
    topic = uuid.uuid4().hex
    body = {**BODIES["/v1/chat/completions"], "guided_regex": LONG, "stream": True}
    ask_and_leave(
        server,
        "/v1/chat/completions",
        {**body, "store": True, "metadata": {"topic": topic}, "on_disconnect": "finish"},
    )
    wait_until_idle(http)
    page = http.get("/v1/chat/completions", params={"metadata[topic]": topic}).json()
    assert [reply["choices"][0]["finish_reason"] for reply in page["data"]] == ["stop"]


@pytest.mark.parametrize("path", BODIES)
def test_what_nobody_will_remember_is_not_finished(http: httpx.Client, path: str) -> None:
    """The switch is refused where nothing would be left."""
    extra = {"store": False} if path == "/v1/responses" else {}
    response = http.post(path, json={**BODIES[path], **extra, "on_disconnect": "finish"})
    assert response.status_code == 400
    assert error_of(response)["param"] == "on_disconnect"

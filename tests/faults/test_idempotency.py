"""A request with an `Idempotency-Key` is carried out once, wherever its server was killed (promise P15)."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from typing import Any

import httpx

from server.idempotency import HEADER
from tests.faults.talk import LINES, kill_while_streaming, say, turn_body, version
from tests.server_process import ServerProcess

KEY = {HEADER: "the-key"}


def send_and_forget(server: ServerProcess, body: dict[str, Any], key: str = KEY[HEADER]) -> socket.socket:
    """Send a turn whose reply nobody will read."""
    content = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(content)}\r\n{HEADER}: {key}\r\n\r\n"
    connection = socket.create_connection(("127.0.0.1", server.port))
    connection.sendall(head.encode() + content)
    return connection


def send_until_settled(server: ServerProcess, body: dict[str, Any], key: str = KEY[HEADER]) -> httpx.Response:
    """Send a turn as a client does that was told to try again."""
    deadline = time.monotonic() + 60
    while True:
        response = server.http.post("/v1/chat/completions", json=body, headers={HEADER: key})
        if response.status_code != 409 or time.monotonic() > deadline:
            assert response.status_code == 200, response.text
            return response
        time.sleep(min(float(response.headers["retry-after"]), 0.5))


def test_a_reply_that_was_lost_with_its_server_is_told_after_all(server: ServerProcess) -> None:
    """Killed after the commit and before anybody has read the reply: the same request gets it, and applies nothing."""
    expected = say(server, LINES[0], "calm", 0)
    with contextlib.closing(send_and_forget(server, turn_body(LINES[0], "lost", 0))):
        while server.http.get("/v1/conversations/lost").json().get("version") != 1:
            pass
        server.kill()
    server.start()
    reply = send_until_settled(server, turn_body(LINES[0], "lost", 0))
    assert reply.headers["idempotent-replayed"] == "true"
    assert tuple(reply.json()["choices"][0]["token_ids"]) == expected.token_ids
    assert version(server, "lost") == 1


def test_what_died_before_its_commit_is_carried_out(server: ServerProcess) -> None:
    """Killed in the middle, the key is free again, and the request runs as if it were the first."""
    say(server, LINES[0], "broken", 0)
    body = turn_body(LINES[1], "broken", 1, max_tokens=1000, guided_regex="[a-z]{1000}", stream=True)
    server.http.headers.update(KEY)
    kill_while_streaming(server, body)
    server.start()
    reply, again = send_until_settled(server, body), send_until_settled(server, body)
    assert "idempotent-replayed" not in reply.headers
    assert again.headers["idempotent-replayed"] == "true"
    assert reply.text.endswith("[DONE]\n\n")
    assert version(server, "broken") == 2


def test_killed_at_any_moment_it_is_one_turn(server: ServerProcess) -> None:
    """Sent, killed a moment later, sent again until it is answered: every round adds exactly one version."""
    for number in range(5):
        body = turn_body(LINES[number], "rounds", number, max_tokens=8)
        with contextlib.closing(send_and_forget(server, body, f"key-{number}")):
            time.sleep(0.01 * 3**number)
            server.kill()
        server.start()
        send_until_settled(server, body, f"key-{number}")
        assert version(server, "rounds") == number + 1

"""`Idempotency-Key`: a request that is sent again is carried out once (promise P15)."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.idempotency import HEADER
from tests.redis_server import RedisServer
from tests.server.conftest import OPTIONS
from tests.server.replies import error_of, events_of
from tests.server_process import ServerProcess, redis_options

CHAT = {"messages": [{"role": "user", "content": "Hello."}], "max_tokens": 6}
COMPLETION = {"prompt": "Hello.", "max_tokens": 6}
RESPONSE = {"input": "Hello.", "max_output_tokens": 6}
ROUTES = {"/v1/chat/completions": CHAT, "/v1/completions": COMPLETION, "/v1/responses": RESPONSE}


@pytest.fixture
def key() -> dict[str, str]:
    """A key that nothing else uses."""
    return {HEADER: uuid.uuid4().hex}


@pytest.fixture
def conversation(http: httpx.Client) -> str:
    """A new conversation."""
    return str(http.post("/v1/conversations", json={}).json()["id"])


def version_of(http: httpx.Client, conversation: str) -> int:
    """Return where the conversation is."""
    return int(http.get(f"/v1/conversations/{conversation}").json()["version"])


def is_replayed(response: httpx.Response) -> bool:
    """Say whether the reply was kept from before."""
    assert response.status_code == 200, response.text
    assert response.headers.get("idempotent-replayed") in (None, "true")
    return "idempotent-replayed" in response.headers


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("is_stateful", [False, True])
def test_the_second_time_the_same_reply_comes(
    http: httpx.Client, key: dict[str, str], conversation: str, path: str, is_stateful: bool
) -> None:
    """Byte for byte, said to be a repetition; nothing is generated, and a conversation has one turn more."""
    body = ROUTES[path] | ({"conversation": conversation} if is_stateful else {})
    first, second = (http.post(path, json=body, headers=key) for _ in range(2))
    assert (is_replayed(first), is_replayed(second)) == (False, True)
    assert first.content == second.content
    assert version_of(http, conversation) == int(is_stateful)


@pytest.mark.parametrize("is_stateful", [False, True])
def test_a_response_that_is_not_stored_is_repeated_all_the_same(
    http: httpx.Client, key: dict[str, str], conversation: str, is_stateful: bool
) -> None:
    """To whoever has the key; by its id nobody finds it."""
    body = {**RESPONSE, "store": False} | ({"conversation": conversation} if is_stateful else {})
    first, second = (http.post("/v1/responses", json=body, headers=key) for _ in range(2))
    assert first.content == second.content
    assert is_replayed(second)
    assert http.get(f"/v1/responses/{first.json()['id']}").status_code == 404


@pytest.mark.parametrize("path", ROUTES)
def test_a_stream_is_repeated_as_a_stream(
    http: httpx.Client, key: dict[str, str], conversation: str, path: str
) -> None:
    """With the same identity, text and end."""
    body = {**ROUTES[path], "conversation": conversation, "stream": True}
    replies = [http.post(path, json=body, headers=key) for _ in range(2)]
    assert [is_replayed(reply) for reply in replies] == [False, True]
    assert replies[1].headers["content-type"].startswith("text/event-stream")
    first, second = (told(events_of(reply.text.splitlines())) for reply in replies)
    assert first == second
    assert version_of(http, conversation) == 1


def told(events: list[Any]) -> tuple[Any, ...]:
    """Return what the events of a stream tell: of chat and completions the text and the end, of a response all."""
    if "sequence_number" in events[0]:
        return (events[-1]["response"], events[-1]["type"])
    text = ""
    for event in events[:-1]:
        for choice in event["choices"]:
            text += choice.get("text", "") + (choice.get("delta", {}).get("content") or "")
    assert events[-1] == "[DONE]"
    return (text, events[-2]["id"], events[-2]["conversation"], events[-2]["choices"][0]["finish_reason"])


def test_another_body_is_refused(http: httpx.Client, key: dict[str, str]) -> None:
    """The key belongs to the first; how its JSON is spaced and ordered makes no other body."""
    http.post("/v1/chat/completions", json=CHAT, headers=key)
    refused = http.post("/v1/chat/completions", json={**CHAT, "seed": 1}, headers=key)
    assert refused.status_code == 422
    assert error_of(refused) | {"message": ""} == {
        "type": "invalid_request_error", "code": "idempotency_key_reused", "param": HEADER, "message": "",
    }  # fmt: skip
    turned = dict(reversed(CHAT.items()))
    assert is_replayed(http.post("/v1/chat/completions", json=turned, headers=key))


def test_a_key_counts_for_its_route_and_conversation(
    http: httpx.Client, key: dict[str, str], conversation: str
) -> None:
    """Elsewhere the same key is another one."""
    assert not is_replayed(http.post("/v1/chat/completions", json=CHAT, headers=key))
    assert not is_replayed(http.post("/v1/completions", json=COMPLETION, headers=key))
    for name in (conversation, f"{conversation}-2"):
        body = {**CHAT, "conversation_id": name}
        assert not is_replayed(http.post("/v1/chat/completions", json=body, headers=key))


@pytest.mark.parametrize("value", ["", "x" * 256])
def test_an_impossible_key_is_refused(http: httpx.Client, value: str) -> None:
    """1 to 255 characters."""
    refused = http.post("/v1/chat/completions", json=CHAT, headers={HEADER: value})
    assert refused.status_code == 400
    assert error_of(refused)["param"] == HEADER


def test_what_was_not_carried_out_leaves_the_key_free(
    http: httpx.Client, key: dict[str, str], conversation: str
) -> None:
    """A refused turn, of another body or the same, is not remembered."""
    body = {**CHAT, "conversation": conversation}
    for _ in range(2):
        refused = http.post("/v1/chat/completions", json=body, headers={**key, "if-match": "7"})
        assert refused.status_code == 412
    assert not is_replayed(http.post("/v1/chat/completions", json={**body, "seed": 1}, headers=key))
    assert version_of(http, conversation) == 1


def test_a_client_that_left_may_try_again(http: httpx.Client, key: dict[str, str], conversation: str) -> None:
    """Its turn was not applied, so the same request is carried out."""
    body = {**CHAT, "conversation": conversation, "stream": True, "max_tokens": 2000, "guided_regex": "[a-z]{2000}"}
    with http.stream("POST", "/v1/chat/completions", json=body, headers=key) as response:
        lines = response.iter_lines()
        next(lines)
        running = http.post("/v1/chat/completions", json=body, headers=key)
        assert running.status_code == 409
        assert error_of(running)["code"] == "idempotency_in_progress"
        assert float(running.headers["retry-after"]) > 0
    while (
        again := http.post("/v1/chat/completions", json={**CHAT, "conversation": conversation}, headers=key)
    ).is_error:
        assert error_of(again)["code"] in ("idempotency_in_progress", "idempotency_key_reused", "conversation_locked")
    assert not is_replayed(again)
    assert version_of(http, conversation) == 1


def test_a_reply_that_is_too_large_is_not_repeated_and_not_made_again(
    http: httpx.Client, key: dict[str, str], conversation: str
) -> None:
    """Beyond 1 MiB: the second time says so, and the conversation has one turn."""
    body = {**CHAT, "conversation": conversation, "max_tokens": 900}
    body |= {"logprobs": True, "top_logprobs": 20, "guided_regex": "[a-z]{900}"}
    first = http.post("/v1/chat/completions", json=body, headers=key)
    assert first.status_code == 200
    assert len(first.content) > 1 << 20
    for _ in range(2):
        second = http.post("/v1/chat/completions", json=body, headers=key)
        assert second.status_code == 409
        assert error_of(second)["code"] == "idempotency_reply_too_large"
        assert second.headers["x-should-retry"] == "false"
    assert version_of(http, conversation) == 1


def test_a_response_in_the_background_is_begun_once(http: httpx.Client, key: dict[str, str]) -> None:
    """Asked for again while it runs it is shown as it stands, and afterwards as it ended."""
    body = {
        **RESPONSE,
        "background": True,
        "max_output_tokens": 3100,  # a little of it may go to what only leads to the answer
        "ignore_eos": True,
        "guided_regex": "[a-z]{3000}",
    }
    first = http.post("/v1/responses", json=body, headers=key)
    again = http.post("/v1/responses", json=body, headers=key)
    assert is_replayed(again)
    assert again.json()["id"] == first.json()["id"]
    while http.get(f"/v1/responses/{first.json()['id']}").json()["status"] in ("queued", "in_progress"):
        pass
    ended = http.post("/v1/responses", json=body, headers=key)
    assert is_replayed(ended)
    assert (ended.json()["id"], ended.json()["status"]) == (first.json()["id"], "completed")


@pytest.fixture
def pair(tiny_model: Path, tmp_path: Path, redis_server: RedisServer) -> Iterator[list[httpx.Client]]:
    """Clients of two servers on one Redis."""
    options = (*OPTIONS, *redis_options(redis_server.url))
    with (
        ServerProcess(tiny_model, tmp_path / "first", *options) as first,
        ServerProcess(tiny_model, tmp_path / "second", *options) as second,
    ):
        yield [first.http, second.http]


def send_fifty(clients: list[httpx.Client], key: dict[str, str]) -> None:
    """Send one request fifty times at once: one is carried out, the others wait for its end or hear what it said."""
    body = {**CHAT, "conversation_id": f"fifty-{key[HEADER]}", "max_tokens": 40, "ignore_eos": True}

    def send(number: int) -> httpx.Response:
        return clients[number % len(clients)].post("/v1/chat/completions", json=body, headers=key)

    with ThreadPoolExecutor(50) as pool:
        replies = list(pool.map(send, range(50)))
    answered = [reply for reply in replies if reply.status_code == 200]
    assert [is_replayed(reply) for reply in answered].count(False) == 1
    assert len({reply.content for reply in answered}) == 1
    for reply in replies:
        if reply.status_code != 200:
            assert error_of(reply)["code"] == "idempotency_in_progress"
    for client in clients:
        assert version_of(client, f"fifty-{key[HEADER]}") == 1
        assert send(0).content == answered[0].content


def test_fifty_at_once_make_one_turn(server: ServerProcess, key: dict[str, str]) -> None:
    """On one server with its embedded ledger."""
    with httpx.Client(base_url=server.url, timeout=60) as client:
        send_fifty([client], key)


def test_fifty_at_two_servers_make_one_turn(pair: list[httpx.Client], key: dict[str, str]) -> None:
    """On two servers that share a Redis; either repeats what the other has said."""
    send_fifty(pair, key)

"""However a conversation came to its history, it goes on as one that simply had it: forked, gone back, edited."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server_process import ServerProcess


@pytest.fixture(scope="module", params=["warm", "cold"])
def server(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[ServerProcess]:
    """A server whose engine remembers every state, or none but those in the store."""
    directory = tmp_path_factory.mktemp("edits") / "data"
    num_states = 100 if request.param == "warm" else 1
    with ServerProcess(tiny_model, directory, "--hot-state-bytes", str(num_states * 13_824)) as process:
        yield process


def new_id() -> str:
    """An id nobody has used."""
    return uuid.uuid4().hex


def say(server: ServerProcess, conversation_id: str, text: str, **extra: Any) -> dict[str, Any]:
    """Take a turn; returns the reply."""
    body = {
        "messages": [{"role": "user", "content": text}],
        "conversation_id": conversation_id,
        "max_tokens": 12,
        "seed": len(text),
        "return_token_ids": True,
        **extra,
    }
    response = server.http.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    reply: dict[str, Any] = response.json()
    return reply


def tokens(reply: dict[str, Any]) -> list[int]:
    """What the turn answered."""
    token_ids: list[int] = reply["choices"][0]["token_ids"]
    return token_ids


def post(server: ServerProcess, path: str, **body: Any) -> dict[str, Any]:
    """Return the answer to a request that must succeed."""
    response = server.http.post(f"/v1/conversations/{path}", json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def items(server: ServerProcess, conversation_id: str) -> list[dict[str, Any]]:
    """What was said, in order."""
    data: list[dict[str, Any]] = server.http.get(
        f"/v1/conversations/{conversation_id}/items", params={"order": "asc", "limit": 100}
    ).json()["data"]
    return data


LINES = ["One line.", "And a second line.", "Then a third."]


def test_a_fork_goes_on_like_its_origin(server: ServerProcess) -> None:
    """From any version, and neither hears of the other's turns."""
    origin, straight = new_id(), new_id()
    for line in LINES:
        assert tokens(say(server, origin, line)) == tokens(say(server, straight, line))
    for version in range(4):
        fork = post(server, f"{origin}/fork", version=version)
        assert fork["version"] == version
        rest = [*LINES[version:], "Onwards."]
        fresh = new_id()
        for line in LINES[:version]:
            say(server, fresh, line)
        for line in rest:
            assert tokens(say(server, fork["id"], line)) == tokens(say(server, fresh, line))
    assert tokens(say(server, origin, "Onwards.")) == tokens(say(server, straight, "Onwards."))
    assert server.http.get(f"/v1/conversations/{origin}").json()["version"] == 4


def test_going_back_is_as_if_the_rest_was_never_said(server: ServerProcess) -> None:
    """And forth again, to a version that was left."""
    conversation_id, fresh = new_id(), new_id()
    for line in LINES:
        say(server, conversation_id, line)
    assert post(server, f"{conversation_id}/rewind", version=1)["version"] == 4
    say(server, fresh, LINES[0])
    reply = say(server, conversation_id, "Elsewhere.")
    assert tokens(reply) == tokens(say(server, fresh, "Elsewhere."))
    assert (reply["conversation"]["version"], reply["conversation"]["parent_version"]) == (5, 4)
    assert [item["content"][0]["text"] for item in items(server, conversation_id) if item["role"] == "user"] == [
        LINES[0],
        "Elsewhere.",
    ]
    post(server, f"{conversation_id}/rewind", version=3)
    straight = new_id()
    for line in LINES:
        say(server, straight, line)
    assert tokens(say(server, conversation_id, "On.")) == tokens(say(server, straight, "On."))


def test_going_back_to_the_beginning(server: ServerProcess) -> None:
    """Version 0 is the empty history."""
    conversation_id = new_id()
    say(server, conversation_id, LINES[0])
    post(server, f"{conversation_id}/rewind", version=0)
    assert items(server, conversation_id) == []
    assert tokens(say(server, conversation_id, LINES[1])) == tokens(say(server, new_id(), LINES[1]))


STOPS = ["\n\nUser:", "\nUser:", "\n\nSystem:"]


def answer_to(server: ServerProcess, history: list[str | list[int]], text: str) -> list[int]:
    """What a run without any conversation answers to a user's `text` after what users said and answers, as tokens."""
    parts = [f"User: {part}".encode() if isinstance(part, str) else b"Assistant:" + bytes(part) for part in history]
    prompt = b"\n\n".join([*parts, f"User: {text}".encode(), b"Assistant:"])
    body = {"prompt": list(prompt), "max_tokens": 12, "seed": len(text), "return_token_ids": True, "stop": STOPS}
    response = server.http.post("/v1/completions", json=body)
    token_ids: list[int] = response.json()["choices"][0]["token_ids"]
    return token_ids


@pytest.mark.parametrize("taken_back", range(6))
def test_an_item_taken_back_was_never_said(server: ServerProcess, taken_back: int) -> None:
    """The conversation goes on as one run over the other items: the answers that stay keep their tokens."""
    conversation_id = new_id()
    said: list[str | list[int]] = []
    for line in LINES:
        said += [line, tokens(say(server, conversation_id, line))]
    before = items(server, conversation_id)
    deleted = server.http.delete(f"/v1/conversations/{conversation_id}/items/{before[taken_back]['id']}")
    assert deleted.json()["object"] == "conversation"
    assert items(server, conversation_id) == before[:taken_back] + before[taken_back + 1 :]
    left = said[:taken_back] + said[taken_back + 1 :]
    answer = tokens(say(server, conversation_id, "On."))
    assert answer == answer_to(server, left, "On.")
    assert tokens(say(server, conversation_id, "And on.")) == answer_to(server, [*left, "On.", answer], "And on.")


def test_items_are_read_by_the_next_turn(server: ServerProcess) -> None:
    """Said one by one or in one request, before an answer or after, they are what messages are."""
    added, sent = new_id(), new_id()
    server.http.post("/v1/conversations", json={"id": added, "items": [{"role": "system", "content": "Be kind."}]})
    post(server, f"{added}/items", items=[{"role": "user", "content": "Hello."}])
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello."}]
    expected = say(server, sent, "Hi?", messages=[*messages, {"role": "user", "content": "Hi?"}])
    assert tokens(say(server, added, "Hi?")) == tokens(expected)
    post(server, f"{added}/items", items=[{"role": "user", "content": "Well."}])
    both = [{"role": "user", "content": "Well."}, {"role": "user", "content": "Then."}]
    assert tokens(say(server, added, "Then.", seed=3)) == tokens(say(server, sent, "", messages=both, seed=3))


def test_edits_survive_a_kill(server: ServerProcess) -> None:
    """A rewind, an edit and added items are in the log like turns."""
    conversation_id, undisturbed = new_id(), new_id()
    for name in (conversation_id, undisturbed):
        for line in LINES:
            say(server, name, line)
        post(server, f"{name}/rewind", version=2)
        server.http.delete(f"/v1/conversations/{name}/items/{items(server, name)[1]['id']}")
        post(server, f"{name}/items", items=[{"role": "user", "content": "Added."}])
    expected = tokens(say(server, undisturbed, "On."))
    server.restart()
    assert tokens(say(server, conversation_id, "On.")) == expected


def test_what_is_not_there_is_refused_by_name(server: ServerProcess) -> None:
    """Unknown versions and items, and an `If-Match` that does not match; nothing changes."""
    conversation_id = new_id()
    say(server, conversation_id, LINES[0])
    path = f"/v1/conversations/{conversation_id}"
    assert server.http.post(f"{path}/rewind", json={"version": 2}).json()["error"]["code"] == "version_not_found"
    assert server.http.post(f"{path}/fork", json={"version": 2}).json()["error"]["code"] == "version_not_found"
    assert server.http.delete(f"{path}/items/msg_none").json()["error"]["code"] == "item_not_found"
    assert server.http.get(f"{path}/items/msg_none").status_code == 404
    stale = server.http.post(f"{path}/rewind", json={"version": 0}, headers={"if-match": "7"})
    assert stale.status_code == 412
    assert server.http.get(path).json()["version"] == 1


def test_text_without_a_template_is_said_again_as_it_stood(server: ServerProcess) -> None:
    """A completion continues a conversation; after an edit before it, it still follows what came before directly."""
    conversation_id = new_id()
    first = say(server, conversation_id, LINES[0])
    raw = {"prompt": " and", "max_tokens": 5, "seed": 9, "conversation": conversation_id, "return_token_ids": True}
    continued = server.http.post("/v1/completions", json=raw).json()["choices"][0]["token_ids"]
    before = items(server, conversation_id)
    server.http.delete(f"/v1/conversations/{conversation_id}/items/{before[0]['id']}")
    history = b"Assistant:" + bytes(tokens(first)) + b" and" + bytes(continued)
    prompt = history + b"\n\nUser: On.\n\nAssistant:"
    body = {"prompt": list(prompt), "max_tokens": 12, "seed": 3, "return_token_ids": True, "stop": STOPS}
    expected = server.http.post("/v1/completions", json=body).json()["choices"][0]["token_ids"]
    assert tokens(say(server, conversation_id, "On.")) == expected

"""Chat completions with `store: true`: found, listed, changed and deleted, by their own tenant."""

from __future__ import annotations

import uuid
from typing import Any

import httpx
import openai
import pytest

from server.idempotency import HEADER
from tests.server.replies import error_of, stream_events
from tests.server_process import ServerProcess

PATH = "/v1/chat/completions"
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello."}]
CHAT = {"messages": MESSAGES, "max_tokens": 4, "store": True}


@pytest.fixture
def topic() -> dict[str, str]:
    """Metadata that nothing else has."""
    return {"topic": uuid.uuid4().hex}


def store(http: httpx.Client, **fields: Any) -> dict[str, Any]:
    """Ask for a completion that is stored; return the reply."""
    response = http.post(PATH, json={**CHAT, **fields})
    assert response.status_code == 200, response.text
    reply: dict[str, Any] = response.json()
    return reply


def listed(http: httpx.Client, topic: dict[str, str], **query: Any) -> dict[str, Any]:
    """Return a page of the completions with this metadata."""
    response = http.get(PATH, params={"metadata[topic]": topic["topic"], **query})
    assert response.status_code == 200, response.text
    page: dict[str, Any] = response.json()
    return page


@pytest.mark.parametrize("is_stateful", [False, True])
def test_a_stored_completion_is_what_was_answered(http: httpx.Client, topic: dict[str, str], is_stateful: bool) -> None:
    """By its id, with its metadata, whether it was a turn of a conversation or not."""
    fields = {"conversation_id": uuid.uuid4().hex} if is_stateful else {}
    reply = store(http, metadata=topic, **fields)
    assert http.get(f"{PATH}/{reply['id']}").json() == {**reply, "metadata": topic}


@pytest.mark.parametrize("is_stateful", [False, True])
def test_a_streamed_completion_is_stored_whole(http: httpx.Client, is_stateful: bool) -> None:
    """The text of its chunks."""
    fields = {"conversation_id": uuid.uuid4().hex} if is_stateful else {}
    events = stream_events(http, PATH, {**CHAT, **fields})
    text = "".join(choice["delta"].get("content", "") for event in events[:-1] for choice in event["choices"])
    stored = http.get(f"{PATH}/{events[0]['id']}").json()
    assert stored["choices"][0]["message"]["content"] == text


def test_what_is_not_stored_is_not_found(http: httpx.Client) -> None:
    """Nor what never was."""
    for completion_id in (store(http, store=False)["id"], "chatcmpl-nothing"):
        for response in (
            http.get(f"{PATH}/{completion_id}"),
            http.post(f"{PATH}/{completion_id}", json={"metadata": {}}),
            http.delete(f"{PATH}/{completion_id}"),
            http.get(f"{PATH}/{completion_id}/messages"),
        ):
            assert response.status_code == 404
            assert error_of(response)["code"] == "completion_not_found"


def test_a_turn_that_came_to_nothing_is_not_stored(http: httpx.Client, topic: dict[str, str]) -> None:
    """Refused where its conversation is at another version."""
    body = {**CHAT, "conversation_id": uuid.uuid4().hex, "metadata": topic}
    assert http.post(PATH, json=body, headers={"if-match": "3"}).status_code == 412
    assert http.post(PATH, json={**body, "guided_regex": "("}).status_code == 400
    assert listed(http, topic)["data"] == []


def test_the_list_is_in_order_and_in_pages(http: httpx.Client, topic: dict[str, str]) -> None:
    """Oldest first unless asked otherwise; of the metadata asked for only."""
    ids = [store(http, metadata={**topic, "number": str(number)})["id"] for number in range(3)]
    page = listed(http, topic, limit=2)
    assert [reply["id"] for reply in page["data"]] == ids[:2]
    assert (page["object"], page["first_id"], page["last_id"], page["has_more"]) == ("list", ids[0], ids[1], True)
    rest = listed(http, topic, limit=2, after=ids[1])
    assert [reply["id"] for reply in rest["data"]] == ids[2:]
    assert rest["has_more"] is False
    assert [reply["id"] for reply in listed(http, topic, order="desc")["data"]] == ids[::-1]
    assert [reply["id"] for reply in listed(http, topic, **{"metadata[number]": "1"})["data"]] == [ids[1]]
    assert [reply["id"] for reply in listed(http, topic, model="test")["data"]] == ids
    assert listed(http, topic, model="another")["data"] == []


def test_a_list_cannot_begin_behind_nothing(http: httpx.Client) -> None:
    """`after` must be there."""
    response = http.get(PATH, params={"after": "chatcmpl-nothing"})
    assert response.status_code == 400
    assert error_of(response)["param"] == "after"


def test_metadata_can_be_changed(http: httpx.Client, topic: dict[str, str]) -> None:
    """And nothing else; the place in the list stays."""
    first, second = (store(http, metadata=topic) for _ in range(2))
    changed = http.post(f"{PATH}/{first['id']}", json={"metadata": {**topic, "seen": "yes"}})
    assert changed.json() == {**first, "metadata": {**topic, "seen": "yes"}}
    assert [reply["id"] for reply in listed(http, topic)["data"]] == [first["id"], second["id"]]
    assert error_of(http.post(f"{PATH}/{first['id']}", json={}))["param"] == "metadata"


def test_a_deleted_completion_is_gone(http: httpx.Client, topic: dict[str, str]) -> None:
    """Its conversation still remembers the turn."""
    name = uuid.uuid4().hex
    reply = store(http, metadata=topic, conversation_id=name)
    deleted = http.delete(f"{PATH}/{reply['id']}").json()
    assert deleted == {"id": reply["id"], "object": "chat.completion.deleted", "deleted": True}
    assert http.get(f"{PATH}/{reply['id']}").status_code == 404
    assert listed(http, topic)["data"] == []
    assert http.get(f"/v1/conversations/{name}").json()["version"] == 1


def test_a_deleted_conversation_takes_its_completions_along(http: httpx.Client, topic: dict[str, str]) -> None:
    """Nothing it said is left (promise P20)."""
    name = uuid.uuid4().hex
    turn, other = store(http, metadata=topic, conversation_id=name), store(http, metadata=topic)
    assert http.delete(f"/v1/conversations/{name}").status_code == 200
    assert http.get(f"{PATH}/{turn['id']}").status_code == 404
    assert [reply["id"] for reply in listed(http, topic)["data"]] == [other["id"]]


@pytest.mark.parametrize("is_stateful", [False, True])
def test_the_messages_are_those_that_were_sent(http: httpx.Client, is_stateful: bool) -> None:
    """In order and in pages, each with an id."""
    fields = {"conversation_id": uuid.uuid4().hex} if is_stateful else {}
    path = f"{PATH}/{store(http, **fields)['id']}/messages"
    page = http.get(path).json()
    assert [{name: message[name] for name in ("role", "content")} for message in page["data"]] == MESSAGES
    second = http.get(path, params={"after": page["first_id"], "limit": 1}).json()
    assert second["data"] == page["data"][1:]


def test_a_keyed_completion_is_stored_once(http: httpx.Client, topic: dict[str, str]) -> None:
    """Sent again it is repeated, and the list is no longer."""
    for fields in ({}, {"conversation_id": uuid.uuid4().hex}):
        body = {**CHAT, "metadata": topic, **fields}
        first, second = (http.post(PATH, json=body, headers={HEADER: topic["topic"]}) for _ in range(2))
        assert first.content == second.content
    assert len(listed(http, topic)["data"]) == 2


def test_the_stock_client_works(server: ServerProcess, topic: dict[str, str]) -> None:
    """Strictly, but for the messages: OpenAI's own types say that only assistants speak."""
    with server.client(strict=True) as client:
        reply = client.chat.completions.create(
            model="test", messages=[{"role": "user", "content": "Hi."}], max_tokens=3, store=True, metadata=topic
        )
        assert client.chat.completions.retrieve(reply.id).choices == reply.choices
        assert [found.id for found in client.chat.completions.list(metadata=topic)] == [reply.id]
        client.chat.completions.update(reply.id, metadata={**topic, "more": "1"})
        with server.client() as loose:
            assert [message.content for message in loose.chat.completions.messages.list(reply.id)] == ["Hi."]
        assert client.chat.completions.delete(reply.id).deleted
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.retrieve(reply.id)

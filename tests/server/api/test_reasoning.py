"""Thoughts: shown, counted, and remembered or not, as the request wishes."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.conversations.ledger import Turn
from server.conversations.sqlite_ledger import SqliteLedger
from tests.server.replies import error_of
from tests.server.speaking_server import SpeakingServer

THOUGHT, SAID = "Hm, well.", "Hello!"
WRITTEN = f">{THOUGHT}</think>\n{SAID}"
NUM_THOUGHT = len(f">{THOUGHT}</think>")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the server keeps its ledger."""
    return tmp_path_factory.mktemp("reasoning") / "data"


@pytest.fixture(scope="module")
def speaking(tiny_model: Path, data_dir: Path) -> Iterator[SpeakingServer]:
    """A server whose model thinks before it says hello."""
    with SpeakingServer(tiny_model, data_dir, {"<think": WRITTEN}, template="g1") as server:
        yield server


@pytest.fixture
def http(speaking: SpeakingServer) -> Iterator[httpx.Client]:
    """Its client."""
    with speaking.http() as client:
        yield client


def chat(http: httpx.Client, text: str, **fields: Any) -> dict[str, Any]:
    """Ask; return the reply."""
    body = {"messages": [{"role": "user", "content": text}], **fields}
    response = http.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    reply: dict[str, Any] = response.json()
    return reply


def respond(http: httpx.Client, text: str, **fields: Any) -> dict[str, Any]:
    """Ask for a response; return it."""
    response = http.post("/v1/responses", json={"input": text, **fields})
    assert response.status_code == 200, response.text
    reply: dict[str, Any] = response.json()
    return reply


def items(http: httpx.Client, name: str) -> list[tuple[str, str]]:
    """What the conversation says was said: kinds and texts."""
    data = http.get(f"/v1/conversations/{name}/items", params={"order": "asc"}).json()["data"]
    return [(item["type"], item["content"][0]["text"]) for item in data]


def begun_as_if_never_thought(http: httpx.Client) -> str:
    """Return a conversation in which the user said hi and was greeted, and nobody thought."""
    said = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": SAID}]
    return str(http.post("/v1/conversations", json={"items": said}).json()["id"])


def turns_of(data_dir: Path, name: str) -> list[Turn]:
    """Return the entries of a conversation's log, as another reader of the file finds them."""

    async def read() -> list[Turn]:
        ledger = SqliteLedger(copy / "ledger.sqlite")
        await ledger.open()
        try:
            return await ledger.turns(name)
        finally:
            await ledger.close()

    copy = data_dir.with_name(uuid.uuid4().hex)  # the file itself is the server's alone
    copy.mkdir()
    for suffix in ("", "-wal"):
        source = data_dir / f"ledger.sqlite{suffix}"
        (copy / f"ledger.sqlite{suffix}").write_bytes(source.read_bytes())
    return asyncio.run(read())


@pytest.mark.parametrize("effort", [None, "high"])
def test_what_was_thought_can_be_kept_out_of_a_conversation(
    http: httpx.Client, data_dir: Path, effort: str | None
) -> None:
    """It goes on exactly like one in which it was never said: the same tokens, the same chain, the same answer."""
    name = uuid.uuid4().hex
    first = chat(http, "hi", conversation_id=name, keep_reasoning=False, reasoning_effort=effort)
    assert first["choices"][0]["message"]["reasoning_content"] == THOUGHT
    assert first["choices"][0]["message"]["content"] == SAID
    assert items(http, name) == [("message", "hi"), ("message", SAID)]
    other = begun_as_if_never_thought(http)
    replies = [chat(http, "again", conversation_id=place, return_token_ids=True) for place in (name, other)]
    assert replies[0]["choices"] == replies[1]["choices"]
    assert replies[0]["usage"]["prompt_tokens"] == replies[1]["usage"]["prompt_tokens"]
    assert replies[0]["conversation"]["resume"] == "hot"
    logs = [turns_of(data_dir, place) for place in (name, other)]
    assert logs[0][-1].chain == logs[1][-1].chain
    assert logs[0][-1].num_tokens == logs[1][-1].num_tokens
    assert bytes(logs[0][0].prompt_ids + logs[0][0].output_ids) == b"User: hi\n\nAssistant: " + SAID.encode()


def test_it_can_be_kept_out_of_a_chain_of_responses(http: httpx.Client) -> None:
    """The response shows it, its successors have not heard of it."""
    first = respond(http, "hi", keep_reasoning=False)
    assert [item["type"] for item in first["output"]] == ["reasoning", "message"]
    assert first["usage"]["output_tokens_details"]["reasoning_tokens"] == NUM_THOUGHT
    second = respond(http, "again", previous_response_id=first["id"])
    other = respond(http, "again", conversation=begun_as_if_never_thought(http))
    assert second["usage"]["input_tokens"] == other["usage"]["input_tokens"]
    assert http.get(f"/v1/responses/{first['id']}").json() == first


def test_a_response_in_a_conversation_leaves_no_thought_there(http: httpx.Client) -> None:
    """Nor an item of it."""
    name = str(http.post("/v1/conversations", json={}).json()["id"])
    respond(http, "hi", conversation=name, keep_reasoning=False, store=False)
    assert items(http, name) == [("message", "hi"), ("message", SAID)]


def test_by_default_it_is_remembered(http: httpx.Client, data_dir: Path) -> None:
    """As it was written, and as an item."""
    name = uuid.uuid4().hex
    chat(http, "hi", conversation_id=name)
    assert items(http, name) == [("message", "hi"), ("reasoning", THOUGHT), ("message", SAID)]
    turn = turns_of(data_dir, name)[0]
    assert bytes(turn.prompt_ids + turn.output_ids) == f"User: hi\n\nAssistant: <think{WRITTEN}".encode()


def test_an_answer_that_is_all_thought_is_remembered_as_nothing(http: httpx.Client, data_dir: Path) -> None:
    """Cut off by its length before it said a word: the conversation goes on after an empty answer."""
    name = uuid.uuid4().hex
    reply = chat(http, "hi", conversation_id=name, keep_reasoning=False, max_tokens=5)
    assert reply["choices"][0]["finish_reason"] == "length"
    assert reply["usage"]["completion_tokens"] == 5
    assert items(http, name) == [("message", "hi"), ("message", "")]
    assert chat(http, "again", conversation_id=name)["conversation"]["version"] == 2
    first, second = turns_of(data_dir, name)
    assert (bytes(first.prompt_ids), first.output_ids) == (b"User: hi\n\nAssistant:", [])
    assert bytes(second.prompt_ids) == b"\n\nUser: again\n\nAssistant: <think"


def test_a_turn_without_its_thought_can_be_taken_back_and_forked(http: httpx.Client) -> None:
    """It is a turn like any other."""
    name = uuid.uuid4().hex
    chat(http, "hi", conversation_id=name, keep_reasoning=False)
    fork = http.post(f"/v1/conversations/{name}/fork", json={}).json()
    assert (
        chat(http, "again", conversation_id=fork["id"])["usage"] == chat(http, "again", conversation_id=name)["usage"]
    )
    http.post(f"/v1/conversations/{name}/rewind", json={"version": 1})
    system = {"role": "system", "content": "Be kind."}
    reply = http.post(
        "/v1/responses", json={"input": "more", "conversation": name, "instructions": "Be kind.", "store": False}
    )
    assert reply.status_code == 200, reply.text
    fresh = {"items": [system, {"role": "user", "content": "hi"}, {"role": "assistant", "content": SAID}]}
    other = respond(http, "more", conversation=http.post("/v1/conversations", json=fresh).json()["id"])
    assert reply.json()["usage"]["input_tokens"] == other["usage"]["input_tokens"]


def test_only_what_is_remembered_can_be_without_its_thought(http: httpx.Client) -> None:
    """Elsewhere the switch is refused."""
    for path, body in (
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
        ("/v1/responses", {"input": "hi", "store": False}),
    ):
        response = http.post(path, json={**body, "keep_reasoning": False})
        assert response.status_code == 400
        assert error_of(response)["param"] == "keep_reasoning"


def test_thought_tokens_are_counted(speaking: SpeakingServer) -> None:
    """In whole replies and in streams, for each choice; nothing where nothing was thought."""
    with speaking.client() as client:
        reply = client.chat.completions.create(model="test", messages=[{"role": "user", "content": "hi"}], n=2)
        assert reply.usage is not None
        assert reply.usage.completion_tokens_details is not None
        assert reply.usage.completion_tokens_details.reasoning_tokens == 2 * NUM_THOUGHT
        assert reply.usage.completion_tokens == 2 * len(WRITTEN)
        assert reply.system_fingerprint is not None
        *_, last = client.chat.completions.create(
            model="test",
            messages=[{"role": "user", "content": "hi"}],
            max_tokens=5,
            stream=True,
            stream_options={"include_usage": True},
        )
        assert last.usage is not None
        assert last.usage.completion_tokens_details is not None
        assert last.usage.completion_tokens_details.reasoning_tokens == 5

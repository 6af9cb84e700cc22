"""`/v1/responses` for one server: what a response says, what it leaves behind, and how its stream can be picked up."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent

from tests.server.replies import error_of
from tests.server_process import ServerProcess

# The model speaks over bytes and has learnt nothing: it ends at the first small letter, or not at all.
ENDS = {"stop_token_ids": list(range(ord("a"), ord("z") + 1))}
ENDLESS = {"ignore_eos": True, "stop_token_ids": []}


@pytest.fixture
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    """The stock client, which validates every reply against OpenAI's types."""
    with server.client(strict=True) as client:
        yield client


def ask(http: httpx.Client, text: str = "Hello.", **extra: Any) -> dict[str, Any]:
    """Return a short response."""
    reply = http.post("/v1/responses", json={"input": text, "max_output_tokens": 4, "seed": 1, **extra})
    assert reply.status_code == 200, reply.text
    body: dict[str, Any] = reply.json()
    return body


def frames(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """Yield the events of a stream; each has its type twice."""
    name = ""
    for line in lines:
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            event = json.loads(line.removeprefix("data: "))
            assert event["type"] == name
            yield event


def resumed(http: httpx.Client, response_id: str, after: int | None = None) -> list[dict[str, Any]]:
    """Return the events of a stored response to their end."""
    params: dict[str, Any] = {"stream": True} if after is None else {"stream": True, "starting_after": after}
    with http.stream("GET", f"/v1/responses/{response_id}", params=params) as reply:
        assert reply.status_code == 200, reply.read()
        return list(frames(reply.iter_lines()))


def waited(http: httpx.Client, response_id: str) -> dict[str, Any]:
    """Return a background response once it has ended."""
    resumed(http, response_id)
    body: dict[str, Any] = http.get(f"/v1/responses/{response_id}").json()
    return body


# -- one response -----------------------------------------------------------------------------------------------------


def test_a_response_is_told_and_told_again(client: openai.OpenAI) -> None:
    """What is retrieved is what was answered, its usage adds up, and its input is listed."""
    made = client.responses.create(input="Hello.", instructions="Be kind.", extra_body=ENDS, metadata={"a": "b"})
    assert made.status == "completed"
    assert made.usage is not None
    assert made.usage.total_tokens == made.usage.input_tokens + made.usage.output_tokens
    assert (made.instructions, made.metadata, made.store) == ("Be kind.", {"a": "b"}, True)
    assert client.responses.retrieve(made.id).to_dict() == made.to_dict()
    (item,) = client.responses.input_items.list(made.id)
    assert item.to_dict()["content"] == [{"type": "input_text", "text": "Hello."}]


def test_an_answer_that_is_cut_off_is_incomplete(client: openai.OpenAI) -> None:
    """And says why, whole and streamed."""
    made = client.responses.create(input="Hello.", max_output_tokens=3, extra_body=ENDLESS)
    assert made.status == "incomplete"
    assert made.incomplete_details is not None
    assert made.incomplete_details.reason == "max_output_tokens"
    assert made.usage is not None
    assert made.usage.output_tokens == 3
    stream = client.responses.create(input="Hello.", max_output_tokens=3, extra_body=ENDLESS, stream=True)
    last = list(stream)[-1]
    assert last.type == "response.incomplete"
    assert last.response.output[0].to_dict()["status"] == "incomplete"


def test_everything_that_has_no_effect_here_may_be_said(client: openai.OpenAI) -> None:
    """Fields that cannot change the answer do not, and those that ask for nothing are taken."""
    plain: dict[str, Any] = {"input": "Hello.", "seed": 5, "max_output_tokens": 4}
    expected = client.responses.create(input="Hello.", max_output_tokens=4, extra_body={"seed": 5})
    made = client.responses.create(
        model="test",
        input=plain["input"],
        max_output_tokens=plain["max_output_tokens"],
        extra_body={"seed": plain["seed"]},
        background=False,
        context_management=[{"type": "compaction", "compact_threshold": 1000}],
        include=["file_search_call.results", "reasoning.encrypted_content"],
        parallel_tool_calls=True,
        prompt_cache_key="key",
        prompt_cache_retention="in_memory",
        reasoning={"generate_summary": "auto", "summary": "auto", "effort": None},
        safety_identifier="somebody",
        service_tier="auto",
        store=True,
        stream_options={"include_obfuscation": False},
        text={"format": {"type": "text"}, "verbosity": "low"},
        tool_choice="none",
        top_logprobs=0,
        truncation="auto",
        user="somebody",
    )
    assert made.output_text == expected.output_text
    assert made.service_tier == "default"


# -- streams ----------------------------------------------------------------------------------------------------------


def assert_whole(events: list[ResponseStreamEvent]) -> Response:
    """Check the grammar of a stream and return the response it ends with."""
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[2:4] == ["response.output_item.added", "response.content_part.added"]
    assert kinds[-4:-1] == ["response.output_text.done", "response.content_part.done", "response.output_item.done"]
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    last = events[-1]
    assert last.type in ("response.completed", "response.incomplete")
    return last.response  # type: ignore[union-attr]


def test_a_stream_has_every_event_in_order(client: openai.OpenAI) -> None:
    """Numbers without a gap, texts that add up, and ids that are those of what is retrieved afterwards."""
    stream = client.responses.create(input="Hello.", stream=True, max_output_tokens=12, extra_body={"seed": 3})
    events = list(stream)
    response = assert_whole(events)
    assert client.responses.retrieve(response.id).to_dict() == response.to_dict()
    deltas = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert deltas == response.output_text
    (item,) = response.output
    assert {event.item_id for event in events if hasattr(event, "item_id")} == {item.id}


def test_the_accumulating_stream_works(client: openai.OpenAI) -> None:
    """`responses.stream()` puts the events together to what a whole response says."""
    whole = client.responses.create(model="test", input="Hello.", extra_body={"seed": 3, **ENDS})
    with client.responses.stream(model="test", input="Hello.", extra_body={"seed": 3, **ENDS}) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert kinds[-1] == "response.completed"
    assert final.output_text == whole.output_text
    assert final.usage == whole.usage


def test_a_stored_response_is_streamed_again(http: httpx.Client) -> None:
    """From the beginning, or behind a number; consecutive either way, and with the same end."""
    made = ask(http)
    events = resumed(http, made["id"])
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert events[-1]["response"] == made
    later = resumed(http, made["id"], after=7)
    assert [event["sequence_number"] for event in later] == list(range(8, 8 + len(later)))
    assert later[-1]["response"] == made
    assert http.get(f"/v1/responses/{made['id']}", params={"starting_after": 0}).json() == made


# -- in the background ------------------------------------------------------------------------------------------------


def test_a_background_response_is_picked_up_where_its_stream_broke(client: openai.OpenAI) -> None:
    """What is read behind the break, with what was read before it, is the whole stream."""
    stream = client.responses.create(input="Hello.", background=True, stream=True, max_output_tokens=200)
    first = [next(stream) for _ in range(6)]
    stream.close()
    assert first[0].type == "response.created"
    response_id = first[0].response.id
    rest = list(client.responses.retrieve(response_id, stream=True, starting_after=first[-1].sequence_number))
    events = [*first, *rest]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[1].type == "response.queued"
    assert events[-1].type in ("response.completed", "response.incomplete")
    assert list(client.responses.retrieve(response_id, stream=True)) == events
    assert events[-1].response.to_dict() == client.responses.retrieve(response_id).to_dict()


def test_a_cancelled_response_has_an_end(client: openai.OpenAI, http: httpx.Client) -> None:
    """Whoever reads its stream, then or later, is told; it cannot be continued, and nothing of it is remembered."""
    made = client.responses.create(input="Hello.", background=True, max_output_tokens=8000, extra_body=ENDLESS)
    assert made.status == "queued"
    with http.stream("GET", f"/v1/responses/{made.id}", params={"stream": True}) as reading:
        events = frames(reading.iter_lines())
        assert next(events)["type"] == "response.created"
        assert client.responses.cancel(made.id).status == "cancelled"
        last = list(events)[-1]
    assert (last["type"], last["response"]["status"]) == ("response.failed", "cancelled")
    assert client.responses.retrieve(made.id).status == "cancelled"
    assert client.responses.cancel(made.id).status == "cancelled"
    assert resumed(http, made.id)[-1] == last
    refused = http.post("/v1/responses", json={"input": "Go on.", "previous_response_id": made.id})
    assert error_of(refused)["code"] == "previous_response_unfinished"


def test_a_failed_background_response_has_an_end(http: httpx.Client) -> None:
    """What the work refuses once it has begun is an event, a status and a stream that ends: nobody waits for it."""
    body = {"input": [{"role": "user", "content": " "}], "background": True}
    made = http.post("/v1/responses", json=body).json()
    events = resumed(http, made["id"])
    assert events[-1]["type"] == "response.failed"
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    found = http.get(f"/v1/responses/{made['id']}").json()
    assert found["status"] == "failed"
    assert found["error"] == events[-1]["response"]["error"]
    assert found["error"]["code"] == "invalid_value"
    assert resumed(http, made["id"], after=events[-2]["sequence_number"])[-1]["type"] == "response.failed"


def test_only_what_runs_in_the_background_is_cancelled(http: httpx.Client) -> None:
    """400 for any other; and what is not to be stored cannot run there."""
    refused = http.post(f"/v1/responses/{ask(http)['id']}/cancel")
    assert error_of(refused)["param"] == "response_id"
    refused = http.post("/v1/responses", json={"input": "x", "background": True, "store": False})
    assert error_of(refused)["param"] == "background"


def test_a_background_response_may_be_deleted_while_it_is_generated(client: openai.OpenAI) -> None:
    """It ends, and nobody finds it."""
    made = client.responses.create(input="Hello.", background=True, max_output_tokens=8000, extra_body=ENDLESS)
    client.responses.delete(made.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)


# -- what came before -------------------------------------------------------------------------------------------------


def test_a_chain_goes_on_from_its_state(http: httpx.Client) -> None:
    """The history counts as input; what of it cost nothing is said, and the tokens are those of a conversation."""
    first = ask(http, "Hello.", temperature=0)
    second = ask(http, "How are you?", previous_response_id=first["id"], temperature=0)
    assert second["previous_response_id"] == first["id"]
    assert second["state"]["resume"] == "hot"
    known = first["usage"]["total_tokens"]
    assert second["usage"]["input_tokens_details"]["cached_tokens"] == known
    assert second["usage"]["input_tokens"] > known
    conversation = http.post("/v1/conversations", json={}).json()["id"]
    for text, expected in (("Hello.", first), ("How are you?", second)):
        said = ask(http, text, conversation=conversation, temperature=0)
        assert said["output"][0]["content"] == expected["output"][0]["content"]
        assert said["usage"]["total_tokens"] == expected["usage"]["total_tokens"]


def test_a_response_may_be_continued_twice(http: httpx.Client) -> None:
    """Each branch knows its own past: equal questions with equal seeds get equal answers, others do not disturb."""
    root = ask(http)
    left = ask(http, "Left?", previous_response_id=root["id"])
    right = ask(http, "Right?", previous_response_id=root["id"])
    again = ask(http, "Left?", previous_response_id=root["id"])
    assert again["output"][0]["content"] == left["output"][0]["content"]
    assert left["usage"]["input_tokens_details"]["cached_tokens"] == root["usage"]["total_tokens"]
    assert right["usage"]["input_tokens_details"]["cached_tokens"] == root["usage"]["total_tokens"]
    deeper = ask(http, "And?", previous_response_id=right["id"])
    assert deeper["usage"]["input_tokens_details"]["cached_tokens"] == right["usage"]["total_tokens"]


def test_instructions_are_not_inherited(http: httpx.Client) -> None:
    """Without them, a response goes on as if they had never been said; with others, as if those had been."""
    told = ask(http, instructions="Answer in rhymes, whatever the question may be.")
    count = {"input": "And?", "previous_response_id": told["id"]}
    without = http.post("/v1/responses/input_tokens", json=count).json()["input_tokens"]
    plain = ask(http)
    plain_count = {"input": "And?", "previous_response_id": plain["id"]}
    num_answer = told["usage"]["output_tokens"] - plain["usage"]["output_tokens"]
    assert without == http.post("/v1/responses/input_tokens", json=plain_count).json()["input_tokens"] + num_answer
    kept = ask(http, "And?", previous_response_id=told["id"], instructions=told["instructions"])
    assert kept["usage"]["input_tokens_details"]["cached_tokens"] == told["usage"]["total_tokens"]
    dropped = ask(http, "And?", previous_response_id=told["id"])
    assert dropped["usage"]["input_tokens"] == without
    assert dropped["instructions"] is None
    assert dropped["usage"]["input_tokens"] < kept["usage"]["input_tokens"]


def test_what_is_counted_is_what_is_read(http: httpx.Client) -> None:
    """`input_tokens` and the response agree, after a history too; nothing asked is the history alone."""
    first = ask(http, instructions="Be kind.")
    counted = http.post("/v1/responses/input_tokens", json={"input": "Hello.", "instructions": "Be kind."}).json()
    assert counted == {"object": "response.input_tokens", "input_tokens": first["usage"]["input_tokens"]}
    body = {"previous_response_id": first["id"], "instructions": "Be kind."}
    counted = http.post("/v1/responses/input_tokens", json=body).json()
    assert counted["input_tokens"] == first["usage"]["total_tokens"]
    assert http.post("/v1/responses/input_tokens", json={}).json()["input_tokens"] == 0


def test_a_response_in_a_conversation_is_part_of_it(client: openai.OpenAI) -> None:
    """Its input and its output, by the ids they have in the response; deleting it takes nothing back."""
    conversation = client.conversations.create(items=[{"type": "message", "role": "user", "content": "Good morning."}])
    made = client.responses.create(input="Hello.", conversation=conversation.id, max_output_tokens=4)
    assert made.conversation is not None
    assert made.conversation.id == conversation.id
    items = [item.id for item in client.conversations.items.list(conversation.id, order="asc")]
    inputs = [item.id for item in client.responses.input_items.list(made.id)]
    assert items[-2:] == [*inputs, made.output[0].id]
    client.responses.delete(made.id)
    assert [item.id for item in client.conversations.items.list(conversation.id, order="asc")] == items


def test_lists_come_in_pages(client: openai.OpenAI) -> None:
    """The client's iterators find every item once, in either order, whatever the size of a page."""
    texts = [str(number) for number in range(7)]
    conversation = client.conversations.create()
    client.conversations.items.create(
        conversation.id, items=[{"type": "message", "role": "user", "content": text} for text in texts]
    )
    for limit in (1, 3, 100):
        found = list(client.conversations.items.list(conversation.id, limit=limit, order="asc"))
        assert [item.to_dict()["content"][0]["text"] for item in found] == texts  # type: ignore[index]
        assert list(client.conversations.items.list(conversation.id, limit=limit)) == found[::-1]
    made = client.responses.create(
        input=[{"role": "user", "content": text} for text in texts], max_output_tokens=1, store=True
    )
    inputs = list(client.responses.input_items.list(made.id, limit=2, order="asc"))
    assert [item.to_dict()["content"][0]["text"] for item in inputs] == texts  # type: ignore[index]


def test_what_is_not_stored_leaves_nothing(http: httpx.Client) -> None:
    """It cannot be found or continued; after a stored one it reads that one's history and leaves it as it is."""
    made = ask(http, store=False)
    assert (made["store"], made["state"]) == (False, None)
    assert http.get(f"/v1/responses/{made['id']}").status_code == 404
    refused = http.post("/v1/responses", json={"input": "x", "previous_response_id": made["id"]})
    assert error_of(refused)["code"] == "previous_response_not_found"
    root = ask(http)
    aside = ask(http, "And?", previous_response_id=root["id"], store=False)
    assert aside["usage"]["input_tokens"] > root["usage"]["total_tokens"]
    assert http.get(f"/v1/responses/{aside['id']}").status_code == 404
    after = ask(http, "And?", previous_response_id=root["id"])
    assert after["output"][0]["content"] == aside["output"][0]["content"]
    assert after["usage"]["input_tokens"] == aside["usage"]["input_tokens"]


# -- what cannot be ---------------------------------------------------------------------------------------------------


def test_unknown_responses_are_not_found(http: httpx.Client) -> None:
    """By every route, with one code; a previous one has a code of its own."""
    for response_id in (f"resp_{uuid.uuid4().hex}", "resp_", "x", "%00"):
        for method, rest in (("GET", ""), ("GET", "?stream=true"), ("DELETE", ""), ("POST", "/cancel")):
            missing = http.request(method, f"/v1/responses/{response_id}{rest}")
            assert missing.status_code == 404
            assert error_of(missing)["code"] == "response_not_found"
        assert http.get(f"/v1/responses/{response_id}/input_items").status_code == 404
    body = {"input": "x", "previous_response_id": f"resp_{uuid.uuid4().hex}"}
    for path in ("/v1/responses", "/v1/responses/input_tokens"):
        missing = http.post(path, json=body)
        assert (missing.status_code, error_of(missing)["code"]) == (404, "previous_response_not_found")
        assert error_of(missing)["param"] == "previous_response_id"


def test_a_deleted_response_is_gone_for_everybody(http: httpx.Client) -> None:
    """It is not found again and not continued; those that continue it already are not touched."""
    first = ask(http)
    second = ask(http, "And?", previous_response_id=first["id"])
    assert http.delete(f"/v1/responses/{first['id']}").json()["deleted"] is True
    assert http.get(f"/v1/responses/{first['id']}").status_code == 404
    refused = http.post("/v1/responses", json={"input": "x", "previous_response_id": first["id"]})
    assert refused.status_code == 404
    third = ask(http, "And?", previous_response_id=second["id"])
    assert third["usage"]["input_tokens_details"]["cached_tokens"] == second["usage"]["total_tokens"]


def test_a_response_that_is_deleted_while_it_streams_stays_deleted(http: httpx.Client) -> None:
    """Its stream ends with an error, which is not noted under an id that is gone."""
    body = {"input": "Hello.", "stream": True, "max_output_tokens": 8000}
    with http.stream("POST", "/v1/responses", json=body | ENDLESS) as reading:
        events = frames(reading.iter_lines())
        made = next(events)["response"]["id"]
        while next(events)["type"] != "response.output_text.delta":
            pass
        assert http.delete(f"/v1/responses/{made}").status_code == 200
        assert list(events)[-1]["type"] == "response.failed"
    assert http.get(f"/v1/responses/{made}").status_code == 404


def test_a_response_may_be_deleted_while_the_next_is_generated(http: httpx.Client) -> None:
    """The next has it as its history and ends as any other; when that is deleted, too, nothing is left."""
    first = ask(http)
    body = {"input": "And?", "previous_response_id": first["id"], "background": True, "max_output_tokens": 3000}
    second = http.post("/v1/responses", json=body | ENDLESS).json()["id"]
    while (found := http.get(f"/v1/responses/{second}").json())["status"] == "queued":
        pass
    assert http.delete(f"/v1/responses/{first['id']}").status_code == 200
    assert http.get(f"/v1/responses/{second}").json()["status"] == "in_progress"
    found = waited(http, second)
    assert found["status"] == "incomplete", found["error"]
    assert found["usage"]["input_tokens"] > first["usage"]["total_tokens"]
    assert http.delete(f"/v1/responses/{second}").status_code == 200
    refused = http.post("/v1/responses", json={"input": "x", "previous_response_id": second})
    assert error_of(refused)["code"] == "previous_response_not_found"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"role": "assistant", "content": "Hello."}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": " "}]}, "input[0].content"),
        ({"input": "x", "conversation": "a", "previous_response_id": "resp_1"}, "previous_response_id"),
        ({"input": "x", "previous_response_id": "msg_1"}, "previous_response_id"),
        ({"input": "x", "reasoning": {"effort": "high"}}, "reasoning.effort"),
        ({"input": "x", "max_output_tokens": 0}, "max_output_tokens"),
        ({"input": "x", "include": ["everything"]}, "include"),
        ({"input": "x", "tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input[0]"),
        ({"input": "x", "prompt": {"id": "x"}}, "prompt"),
        ({"input": "x", "color": "blue"}, "color"),
    ],
    ids=str,
)
def test_what_cannot_be_answered_is_refused_by_name(http: httpx.Client, body: dict[str, Any], param: str) -> None:
    """400, by the name the field has here."""
    refused = http.post("/v1/responses", json=body)
    assert refused.status_code == 400, refused.text
    found = error_of(refused)["param"]
    assert found is not None
    assert found.startswith(param)


def test_a_conversation_that_is_deleted_takes_its_responses_along(http: httpx.Client) -> None:
    """Also one that came to nothing."""
    talk = http.post("/v1/conversations", json={}).json()["id"]
    answered = ask(http, conversation=talk)["id"]
    body = {"input": "Secret.", "conversation": talk, "background": True, "max_output_tokens": 8000}
    cancelled = http.post("/v1/responses", json=body | ENDLESS).json()["id"]
    while http.get(f"/v1/responses/{cancelled}").json()["status"] == "queued":
        pass
    http.post(f"/v1/responses/{cancelled}/cancel")
    http.delete(f"/v1/conversations/{talk}")
    for response_id in (answered, cancelled):
        for path in ("", "/input_items"):
            assert http.get(f"/v1/responses/{response_id}{path}").status_code == 404


def test_a_conversation_that_is_deleted_takes_no_response(http: httpx.Client) -> None:
    """404 for one that never was, 410 for one that was."""
    missing = http.post("/v1/responses", json={"input": "x", "conversation": "nobody"})
    assert (missing.status_code, error_of(missing)["code"]) == (404, "conversation_not_found")
    gone = http.post("/v1/conversations", json={}).json()["id"]
    http.delete(f"/v1/conversations/{gone}")
    expired = http.post("/v1/responses", json={"input": "x", "conversation": gone})
    assert (expired.status_code, error_of(expired)["code"]) == (410, "conversation_expired")


def test_what_is_noted_beside_a_conversation_repeats_none_of_its_words(http: httpx.Client) -> None:
    """They are in its log alone, and go with it: a response that was cut off has neither instructions nor inputs."""
    talk = http.post("/v1/conversations", json={}).json()["id"]
    asked = {"instructions": "Hush.", "input": "Secret.", "conversation": talk}
    made = http.post("/v1/responses", json={**asked, **ENDLESS, "background": True, "max_output_tokens": 8000}).json()
    cancelled = http.post(f"/v1/responses/{made['id']}/cancel").json()
    assert (cancelled["status"], cancelled["instructions"]) == ("cancelled", None)
    assert http.get(f"/v1/responses/{made['id']}/input_items").json()["data"] == []
    done = ask(http, **{key: value for key, value in asked.items() if key != "input"}, temperature=0)
    found = http.get(f"/v1/responses/{done['id']}").json()
    assert found["instructions"] == "Hush."

"""Structured output over HTTP: every way to ask for it, what it may say, and how it is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import httpx
import jsonschema
import pydantic
import pytest

from tests.conftest import ROOT
from tests.server.replies import error_of, stream_events
from tests.server_process import ServerProcess

CHAT = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 200, "seed": 3}
COMPLETION = {"prompt": "hello", "max_tokens": 200, "seed": 3}
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "level": {"enum": ["low", "high", 'a "quoted" ☃']},
        "points": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 3},
    },
    "required": ["name", "level", "points"],
    "additionalProperties": False,
}


def text_of(client: httpx.Client, route: str, **body: Any) -> tuple[str, str]:
    """Return what a request that must succeed says, and why it ended."""
    response = client.post(route, json=body)
    assert response.status_code == 200, response.text
    (choice,) = response.json()["choices"]
    return choice["text"] if route == "/v1/completions" else choice["message"]["content"], choice["finish_reason"]


@pytest.mark.parametrize("seed", range(4))
def test_a_chat_answers_with_json_of_a_schema(http: httpx.Client, world: httpx.Client, seed: int) -> None:
    """With the byte vocabulary and with World's: the content is the JSON, without the space of the opening."""
    response_format = {"type": "json_schema", "json_schema": {"name": "s", "strict": True, "schema": SCHEMA}}
    for client in (http, world):
        content, reason = text_of(
            client, "/v1/chat/completions", **{**CHAT, "seed": seed, "response_format": response_format}
        )
        assert reason == "stop"
        assert content[0] == "{"
        jsonschema.validate(json.loads(content), SCHEMA)


@pytest.mark.parametrize(
    ("fields", "accepted"),
    [
        ({"guided_regex": r"\d{3}-[a-c]"}, r"\d{3}-[a-c]"),
        ({"structured_outputs": {"regex": r"x{2,4}"}}, "x{2,4}"),
        ({"guided_grammar": 'start: "a" | "b" "c"'}, "a|bc"),
        ({"structured_outputs": {"grammar": 'start: "(" /[a-z]/ ")"'}}, r"\([a-z]\)"),
        ({"structured_outputs": {"choice": ["yes", "no", 'a/"b"\\']}}, r'yes|no|a/"b"\\'),
        ({"structured_outputs": {"json": {"type": "boolean"}, "regex": None}}, "true|false"),
        ({"structured_outputs": {"json": '{"type": "null"}'}}, "null"),
    ],
)
def test_other_forms(http: httpx.Client, world: httpx.Client, fields: dict[str, Any], accepted: str) -> None:
    """On both routes, with both vocabularies."""
    for client in (http, world):
        for route, body in (("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)):
            text, reason = text_of(client, route, **{**body, **fields})
            assert reason == "stop"
            jsonschema.validate(text, {"pattern": f"^({accepted})$"})


def test_a_json_object_is_one_as_far_as_it_goes(http: httpx.Client) -> None:
    """Nothing bounds it but `max_tokens`: then `length` says that it is not whole."""
    for seed in range(3):
        body = {**CHAT, "seed": seed, "response_format": {"type": "json_object"}}
        content, reason = text_of(http, "/v1/chat/completions", **body)
        assert content[0] == "{"
        assert reason == "length" or isinstance(json.loads(content), dict)


def test_a_schema_may_be_left_out(http: httpx.Client) -> None:
    """Then any object will do."""
    response_format = {"type": "json_schema", "json_schema": {"name": "any", "schema": None}}
    content, _ = text_of(http, "/v1/chat/completions", **{**CHAT, "response_format": response_format})
    assert content[0] == "{"


def test_choices_and_streams_are_each_of_the_form(http: httpx.Client) -> None:
    """Every choice has its own place in the grammar, and a stream says what the whole reply says."""
    body = {**CHAT, "n": 3, "guided_regex": "[a-c]{2,5}!"}
    whole = [choice["message"]["content"] for choice in http.post("/v1/chat/completions", json=body).json()["choices"]]
    streamed = ["", "", ""]
    for event in stream_events(http, "/v1/chat/completions", body)[:-1]:
        for choice in event["choices"]:
            streamed[choice["index"]] += choice["delta"].get("content") or ""
    assert streamed == whole
    for text in whole:
        jsonschema.validate(text, {"pattern": "^[a-c]{2,5}!$"})


def test_a_conversation_remembers_what_a_grammar_let_through(http: httpx.Client) -> None:
    """Its next turn goes on after exactly that."""
    first = {**COMPLETION, "guided_regex": "[a-f]{5}!", "conversation_id": "formed", "return_token_ids": True}
    reply = http.post("/v1/completions", json=first).json()
    said = reply["choices"][0]["token_ids"]
    assert bytes(said).decode() == reply["choices"][0]["text"]
    second = {**COMPLETION, "max_tokens": 8, "prompt": "on", "return_token_ids": True}
    turn = http.post("/v1/completions", json={**second, "conversation_id": "formed"}).json()["choices"][0]
    whole = http.post("/v1/completions", json={**second, "prompt": [*b"hello", *said, *b"on"]}).json()["choices"][0]
    assert turn["token_ids"] == whole["token_ids"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"guided_regex": "(pr1vate"}, "guided_regex"),
        ({"guided_grammar": "pr1vate"}, "guided_grammar"),
        ({"structured_outputs": {"grammar": "start: pr1vate"}}, "structured_outputs.grammar"),
        ({"structured_outputs": {"json": '{"pr1vate'}}, "structured_outputs.json"),
        ({"structured_outputs": {"json": {"not": {"const": "pr1vate"}}}}, "structured_outputs.json"),
        ({"structured_outputs": {"json": {"enum": ["x" * 65_536]}}}, "structured_outputs.json"),
    ],
)
def test_what_is_no_grammar_is_refused_by_name(
    http: httpx.Client, fields: dict[str, Any], param: str, stream: bool
) -> None:
    """400 before the first event of a stream, and nothing of the grammar in the answer."""
    for route, body in (("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)):
        response = http.post(route, json={**body, **fields, "stream": stream})
        assert response.status_code == 400
        assert error_of(response)["param"] == param
        assert "pr1vate" not in response.text


def test_an_unsupported_schema_is_refused_by_its_keyword(http: httpx.Client) -> None:
    """The client learns what to leave out."""
    response_format = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"uniqueItems": True}}}
    response = http.post("/v1/chat/completions", json={**CHAT, "response_format": response_format})
    assert response.status_code == 400
    assert error_of(response)["param"] == "response_format"
    assert "uniqueItems" in error_of(response)["message"]


def test_a_refused_grammar_leaves_its_conversation_as_it_was(http: httpx.Client) -> None:
    """The lease ends with the request, and no turn is applied."""
    body = {**COMPLETION, "conversation_id": "refused", "max_tokens": 2}
    assert http.post("/v1/completions", json={**body, "guided_regex": "("}).status_code == 400
    assert http.post("/v1/completions", json=body).json()["conversation"]["version"] == 1


# -- the bundled model ------------------------------------------------------------------------------------------------


class Mood(pydantic.BaseModel):
    """What a client wants to know."""

    happy: bool
    color: Literal["red", "green", "blue"]
    numbers: list[Literal[1, 2, 3]] = pydantic.Field(max_length=3)


@pytest.fixture(scope="module")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server with the bundled model, if the checkout has it."""
    path: Path = ROOT / "models" / "default"
    if not (path / "model.safetensors").is_file():
        pytest.skip("the bundled model is not in this checkout")
    with ServerProcess(path, tmp_path_factory.mktemp("bundled") / "data") as process:
        yield process


@pytest.mark.parametrize("strict", [False, True])
def test_the_stock_client_parses_an_object(bundled: ServerProcess, strict: bool) -> None:
    """`chat.completions.parse()` sends pydantic's schema and gets an instance back."""
    with bundled.client(strict=strict) as client:
        for seed in range(3):
            completion = client.chat.completions.parse(
                model="test",
                messages=[{"role": "user", "content": "How are you?"}],
                response_format=Mood,
                seed=seed,
                max_completion_tokens=200,
            )
            assert isinstance(completion.choices[0].message.parsed, Mood)
            assert completion.choices[0].finish_reason == "stop"


# -- a minimum length, priority, the best of several ------------------------------------------------------------------


def test_no_end_comes_before_the_minimum(http: httpx.Client) -> None:
    """Neither stop tokens nor stop texts; afterwards they count as ever."""
    stops = {"stop_token_ids": list(range(128, 256)), "stop": [chr(n) for n in range(97, 113)]}
    for seed in range(3):
        reply = http.post(
            "/v1/completions", json={**COMPLETION, "seed": seed, **stops, "min_tokens": 20, "return_token_ids": True}
        ).json()
        token_ids = reply["choices"][0]["token_ids"]
        assert len(token_ids) >= 20
        assert not any(token_id >= 128 for token_id in token_ids)
        assert reply["choices"][0]["finish_reason"] == "stop"


def test_a_priority_changes_nothing_about_what_is_said(http: httpx.Client) -> None:
    """It is about who comes first, on both routes and in conversations."""
    for route, body in (("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)):
        plain = text_of(http, route, **{**body, "max_tokens": 8})
        assert text_of(http, route, **{**body, "max_tokens": 8, "priority": -5}) == plain
        assert text_of(http, route, **{**body, "max_tokens": 8, "priority": 5, "conversation_id": route[4:8]}) == plain


def test_the_best_of_several_are_told_best_first(http: httpx.Client) -> None:
    """The ranking is by mean log-probability, the tokens of all of them are counted, log-probabilities stay unasked."""
    body = {**COMPLETION, "max_tokens": 12, "prompt": ["one", "two"]}
    every = http.post("/v1/completions", json={**body, "n": 5, "logprobs": 0}).json()
    told = http.post("/v1/completions", json={**body, "n": 2, "best_of": 5}).json()

    def mean(choice: dict[str, Any]) -> float:
        logprobs: list[float] = choice["logprobs"]["token_logprobs"]
        return sum(logprobs) / len(logprobs)

    expected = []
    for start in (0, 5):
        expected += [c["text"] for c in sorted(every["choices"][start : start + 5], key=mean, reverse=True)[:2]]
    assert [choice["text"] for choice in told["choices"]] == expected
    assert [choice["index"] for choice in told["choices"]] == [0, 1, 2, 3]
    assert [choice["logprobs"] for choice in told["choices"]] == [None] * 4
    assert told["usage"]["completion_tokens"] == every["usage"]["completion_tokens"]
    assert told["usage"]["prompt_tokens"] == every["usage"]["prompt_tokens"]


@pytest.mark.parametrize(
    "fields", [{"n": 3, "best_of": 2}, {"best_of": 2, "stream": True}, {"best_of": 2, "conversation_id": "best"}]
)
def test_what_best_of_cannot_do_is_refused(http: httpx.Client, fields: dict[str, Any]) -> None:
    """Fewer than are told, streams, conversations."""
    response = http.post("/v1/completions", json={**COMPLETION, **fields})
    assert response.status_code == 400
    assert error_of(response)["param"] == "best_of"

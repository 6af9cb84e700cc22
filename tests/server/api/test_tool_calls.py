"""Tools in `/v1/chat/completions`, with the unmodified, strict `openai` client and a model that speaks a script."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionMessageParam, ChatCompletionToolParam
from pydantic import BaseModel

from tests.server.replies import error_of
from tests.server.speaking_server import SpeakingServer
from tests.server_process import ServerProcess

PARIS = '{"city": "Paris", "days": 2}'
CALL = '```json\n{"name":"get_weather","arguments":' + PARIS + "}\n```"
LINES = {
    "User: Weather in Paris?\n\nAssistant:": " " + CALL,
    "User: Weather in Paris?\n\nAssistant: ```json\n": CALL.removeprefix("```json\n"),
    "User: Look it up.\n\nAssistant:": " One moment.\n" + CALL,
    "User: Function output:\n19 degrees\n\nAssistant:": " It is 19 degrees.",
    "User: Who are you?\n\nAssistant:": " A pedal.",
    "User: Be vague.\n\nAssistant:": ' ```json\n{"name":"get_wether","arguments":{}}\n```',
}

WEATHER: ChatCompletionToolParam = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "What it is like outside.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
    },
}


class GetWeather(BaseModel):
    """What it is like outside."""

    city: str
    days: int


QUESTION: ChatCompletionMessageParam = {"role": "user", "content": "Weather in Paris?"}


@pytest.fixture(scope="module")
def speaking(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SpeakingServer]:
    """A server whose model knows its lines."""
    with SpeakingServer(tiny_model, tmp_path_factory.mktemp("speaking") / "data", LINES) as server:
        yield server


@pytest.fixture
def client(speaking: SpeakingServer) -> Iterator[openai.OpenAI]:
    """The strict client."""
    with speaking.client() as client:
        yield client


@pytest.fixture
def http(speaking: SpeakingServer) -> Iterator[httpx.Client]:
    """A plain client."""
    with speaking.http() as client:
        yield client


def ask(client: openai.OpenAI, text: str, **options: Any) -> ChatCompletion:
    """Return the answer to one question, for which there is a tool."""
    options = {"tools": [WEATHER], "messages": [{"role": "user", "content": text}]} | options
    reply: ChatCompletion = client.chat.completions.create(model="test", **options)
    return reply


def calls_of(reply: ChatCompletion) -> list[tuple[str, str]]:
    """Return the names and arguments of the calls in the reply."""
    calls = reply.choices[0].message.tool_calls or []
    return [(call.function.name, call.function.arguments) for call in calls if call.type == "function"]


NAMED = {"type": "function", "function": {"name": "get_weather"}}


@pytest.mark.parametrize("choice", ["auto", "required", NAMED], ids=["auto", "required", "named"])
def test_a_call_is_a_call(client: openai.OpenAI, choice: Any) -> None:
    """Whether the model chose it or had to: no content, one call, its arguments as they were written."""
    reply = ask(client, "Weather in Paris?", tool_choice=choice)
    assert calls_of(reply) == [("get_weather", PARIS)]
    assert reply.choices[0].message.content is None
    assert reply.choices[0].finish_reason == "tool_calls"


@pytest.mark.parametrize(
    ("text", "choice", "content"),
    [
        ("Who are you?", "auto", "A pedal."),
        ("Be vague.", "auto", '```json\n{"name":"get_wether","arguments":{}}\n```'),
        ("Weather in Paris?", "none", CALL),
    ],
)
def test_what_is_no_call_is_said(client: openai.OpenAI, text: str, choice: Any, content: str) -> None:
    """Plain words, a tool that is not there, a call nobody asked for: nothing is lost."""
    reply = ask(client, text, tool_choice=choice)
    assert (calls_of(reply), reply.choices[0].message.content) == ([], content)
    assert reply.choices[0].finish_reason == "stop"


def test_words_and_a_call(client: openai.OpenAI) -> None:
    """Both are told."""
    reply = ask(client, "Look it up.")
    assert (calls_of(reply), reply.choices[0].message.content) == ([("get_weather", PARIS)], "One moment.\n")


def test_a_call_that_is_cut_off_says_so(client: openai.OpenAI) -> None:
    """Its arguments are as far as they came."""
    reply = ask(client, "Weather in Paris?", tool_choice="required", max_tokens=45)
    [(name, arguments)] = calls_of(reply)
    assert name == "get_weather"
    assert PARIS.startswith(arguments)
    assert reply.choices[0].finish_reason == "length"


def test_a_call_streams(client: openai.OpenAI) -> None:
    """Identity and name come first and once, then the arguments as they are written, then the reason."""
    chunks = list(client.chat.completions.create(model="test", messages=[QUESTION], tools=[WEATHER], stream=True))
    deltas = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    functions = [delta.function for delta in deltas if delta.function is not None]
    assert len(functions) == len(deltas) > 0
    assert deltas[0].id is not None
    assert deltas[0].id.startswith("call_")
    assert (deltas[0].type, functions[0].name) == ("function", "get_weather")
    assert all((delta.index, delta.id, delta.type) == (0, None, None) for delta in deltas[1:])
    assert all(function.name is None for function in functions[1:])
    assert "".join(function.arguments or "" for function in functions) == PARIS
    assert not any(chunk.choices[0].delta.content for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_the_accumulating_stream_works(client: openai.OpenAI, choice: Any) -> None:
    """OpenAI's helper, which wants strict tools, parses what it has put together."""
    tool = openai.pydantic_function_tool(GetWeather, name="get_weather")
    with client.chat.completions.stream(model="test", messages=[QUESTION], tools=[tool], tool_choice=choice) as stream:
        message = stream.get_final_completion().choices[0].message
    assert message.tool_calls is not None
    assert message.tool_calls[0].function.parsed_arguments == GetWeather(city="Paris", days=2)


def test_a_result_is_answered(client: openai.OpenAI) -> None:
    """The client sends the call back as it got it, and what came of it."""
    messages: list[Any] = [QUESTION]
    message = ask(client, "Weather in Paris?").choices[0].message
    assert message.tool_calls is not None
    messages += [message, {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "19 degrees"}]
    reply = ask(client, "", messages=messages, extra_body={"return_token_ids": True})
    assert reply.choices[0].message.content == "It is 19 degrees."
    assert reply.model_extra is not None
    assert bytes(reply.model_extra["prompt_token_ids"]).decode() == (
        "System: Tools:\n- get_weather(city?: string, days?: integer): What it is like outside.\n"
        "To use a tool, return only a JSON function call.\n\n"
        f"User: Weather in Paris?\n\nAssistant: {CALL}\n\nUser: Function output:\n19 degrees\n\nAssistant:"
    )


def test_tools_work_in_a_conversation(client: openai.OpenAI) -> None:
    """The next turn sends the tools and the result alone: the conversation remembers what it answers."""
    conversation: dict[str, Any] = {"conversation_id": "tools", "return_token_ids": True}
    message = ask(client, "Weather in Paris?", extra_body=conversation).choices[0].message
    assert message.tool_calls is not None
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "19 degrees"}
    reply = ask(client, "", messages=[result], extra_body=conversation)
    assert reply.choices[0].message.content == "It is 19 degrees."
    assert reply.model_extra is not None
    assert reply.model_extra["conversation"]["version"] == 2
    told = bytes(reply.model_extra["prompt_token_ids"]).decode()
    assert told == "\n\nUser: Function output:\n19 degrees\n\nAssistant:"


SEAT = {
    "type": "object",
    "properties": {"row": {"enum": ["front", "back"]}, "window": {"type": "boolean"}},
    "required": ["row", "window"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "seat"}}], ids=["any", "named"]
)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_model_that_knows_nothing_calls_correctly_if_it_must(
    server: ServerProcess, choice: Any, stream: bool
) -> None:
    """Random weights, real grammar: the call is one of the tools, its arguments satisfy the schema."""
    seat = {"type": "function", "function": {"name": "seat", "parameters": SEAT}}
    leave = {"type": "function", "function": {"name": "leave"}}
    options: dict[str, Any] = {"messages": [QUESTION], "tools": [seat, leave], "tool_choice": choice, "max_tokens": 400}
    with server.client(strict=True) as client:
        for seed in range(4):
            options["seed"] = seed
            if stream:
                with client.chat.completions.stream(model="test", **options) as events:
                    reply: ChatCompletion = events.get_final_completion()
            else:
                reply = client.chat.completions.create(model="test", **options)
            [(name, arguments)] = calls_of(reply)
            assert reply.choices[0].finish_reason == "tool_calls"
            assert name == "seat" if choice != "required" else name in ("seat", "leave")
            jsonschema.validate(json.loads(arguments), SEAT if name == "seat" else {"maxProperties": 0})


CALLED = {
    "role": "assistant",
    "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
}
FUNCTION = {"name": "f"}


def tool(**function: Any) -> dict[str, Any]:
    """Return a tool with this function."""
    return {"type": "function", "function": FUNCTION | function}


@pytest.mark.parametrize(
    ("extra", "field"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [tool(name="no spaces")]}, "tools[0].function.name"),
        ({"tools": [tool(name="x" * 65)]}, "tools[0].function.name"),
        ({"tools": [tool(mood="good")]}, "tools[0].function.mood"),
        ({"tools": [tool(), tool()]}, "tools"),
        ({"tools": [tool(name=f"f{i}") for i in range(129)]}, "tools"),
        ({"tools": [tool(parameters={"type": "string"})]}, "tools[0].function.parameters"),
        ({"tools": [tool(parameters={"properties": []})]}, "tools[0].function.parameters"),
        ({"tools": [tool(parameters={"properties": {"a": 1}})]}, "tools[0].function.parameters"),
        ({"tools": [tool(parameters={"required": ["a"]})]}, "tools[0].function.parameters"),
        ({"tools": [tool(parameters={"required": "a"})]}, "tools[0].function.parameters"),
        ({"tools": [tool(parameters={"description": "x" * 65_536})]}, "tools[0].function.parameters"),
        ({"tools": [tool(description="x" * 4097)]}, "tools[0].function.description"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [tool()], "tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": [tool()], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
        ({"tools": [tool()], "tool_choice": {"type": "custom", "custom": {"name": "f"}}}, "tool_choice"),
        ({"tools": [tool()], "tool_choice": "required", "reasoning_effort": "high"}, "reasoning_effort"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "c"}]}, "messages[0].tool_call_id"),
        (
            {"messages": [QUESTION, CALLED, {"role": "tool", "content": "x", "tool_call_id": "d"}]},
            "messages[2].tool_call_id",
        ),
        ({"messages": [{"role": "user", "content": "x", "tool_call_id": "c"}]}, "messages[0].tool_call_id"),
        ({"messages": [CALLED | {"role": "user", "content": "x"}]}, "messages[0].tool_calls"),
        ({"messages": [CALLED | {"tool_calls": CALLED["tool_calls"] * 2}]}, "messages[0].tool_calls"),
        ({"messages": [CALLED | {"tool_calls": [{"id": "c", "type": "custom"}]}]}, "messages[0].tool_calls[0].type"),
        ({"messages": [{"role": "assistant"}]}, "messages[0].content"),
        (
            {
                "messages": [
                    {"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": "1"}}]},
                    QUESTION,
                ]
            },
            "messages[0].tool_calls[0].function.arguments",
        ),
    ],
)
def test_mistakes_are_refused_by_name(http: httpx.Client, extra: dict[str, Any], field: str) -> None:
    """Nothing about tools is guessed or ignored."""
    response = http.post("/v1/chat/completions", json={"messages": [QUESTION], **extra})
    assert response.status_code == 400
    assert (error_of(response)["param"] or "").startswith(field)


def test_templates_without_tools_refuse_them(tiny_model: Path, tmp_path: Path) -> None:
    """By the field's name."""
    with SpeakingServer(tiny_model, tmp_path / "data", LINES, template="raw") as server, server.http() as http:
        response = http.post("/v1/chat/completions", json={"messages": [QUESTION], "tools": [WEATHER]})
    assert response.status_code == 400
    assert error_of(response)["param"] == "tools"


def test_arguments_are_json_in_every_form_of_a_reply(http: httpx.Client) -> None:
    """What the client parses is what the model wrote."""
    reply = http.post("/v1/chat/completions", json={"messages": [QUESTION], "tools": [WEATHER], "n": 2}).json()
    for choice in reply["choices"]:
        [call] = choice["message"]["tool_calls"]
        assert json.loads(call["function"]["arguments"]) == {"city": "Paris", "days": 2}
    assert len({choice["message"]["tool_calls"][0]["id"] for choice in reply["choices"]}) == 2

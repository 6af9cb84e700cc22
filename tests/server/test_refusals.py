"""What is refused, and that it is refused by name: nothing that would change the meaning is ever ignored."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.server.replies import error_of

COMPLETION = {"prompt": "hello", "max_tokens": 1}
CHAT = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 1}
SECRET = "pr1vate"

# Field, value, and the name under which it is refused if that is not the field.
IMPOSSIBLE_EVERYWHERE: list[tuple[str, Any, str]] = [
    ("temperature", -0.1, ""),
    ("temperature", 2.1, ""),
    ("temperature", "1", ""),
    ("temperature", True, ""),
    ("temperature", 1e400, ""),
    ("top_p", 0, ""),
    ("top_p", 1.1, ""),
    ("top_k", -2, ""),
    ("top_k", 1.5, ""),
    ("top_k", 2**63, ""),
    ("min_p", 1.5, ""),
    ("typical_p", 0, ""),
    ("typical_p", 1.5, ""),
    ("top_n_sigma", -0.5, ""),
    ("top_n_sigma", 101, ""),
    ("min_tokens", -1, ""),
    ("min_tokens", 2, ""),
    ("priority", 2**31, ""),
    ("priority", "high", ""),
    ("guided_regex", 7, ""),
    ("structured_outputs", {}, ""),
    ("structured_outputs", {"regex": "a", "choice": ["a"]}, ""),
    ("structured_outputs", {"choice": []}, "structured_outputs.choice"),
    ("structured_outputs", {"choice": [1]}, "structured_outputs.choice[0]"),
    ("structured_outputs", {"choice": ["x" * 100] * 200}, "structured_outputs.choice"),
    ("structured_outputs", {"regex": "x" * 16_385}, "structured_outputs.regex"),
    ("guided_grammar", "x" * 16_385, ""),
    ("structured_outputs", {"structural_tag": "{}"}, "structured_outputs.structural_tag"),
    ("presence_penalty", 2.5, ""),
    ("frequency_penalty", -2.5, ""),
    ("repetition_penalty", 0, ""),
    ("repetition_penalty", 1e-266, ""),  # makes scores infinite
    ("penalty_decay", 0, ""),
    ("penalty_decay", 1.5, ""),
    ("seed", 2**64, ""),
    ("seed", 10**30, ""),
    ("seed", 1.5, ""),
    ("n", 0, ""),
    ("n", 17, ""),
    ("n", True, ""),
    ("n", "1", ""),
    ("n", 1e30, ""),
    ("max_tokens", -1, ""),
    ("max_tokens", 2**63, ""),
    ("max_tokens", 1_000_000, ""),
    ("max_tokens", "3", ""),
    ("max_tokens", True, ""),
    ("stop", "", "stop[0]"),
    ("stop", [""], "stop[0]"),
    ("stop", ["x"] * 17, ""),
    ("stop", ["x"] * 10_000, ""),
    ("stop", "x" * 257, "stop[0]"),
    ("stop", [1], "stop[0]"),
    ("stop_token_ids", [-1], ""),
    ("stop_token_ids", [256], ""),
    ("stop_token_ids", [True], "stop_token_ids[0]"),
    ("logit_bias", {"x": 1}, ""),
    ("logit_bias", {"256": 1}, ""),
    ("logit_bias", {"-1": 1}, ""),
    ("logit_bias", {"9" * 5000: 1}, ""),
    ("logit_bias", {"1": 101}, "logit_bias.1"),
    ("logit_bias", {str(n): 1 for n in range(1025)}, ""),
    ("logit_bias", [1], ""),
    ("ignore_eos", 1, ""),
    ("stream", "yes", ""),
    ("stream_options", {"include_usage": True}, ""),
    ("return_token_ids", "true", ""),
    ("conversation", "", "conversation.id"),
    ("conversation", "a b", "conversation.id"),
    ("conversation", {"id": "x" * 129}, "conversation.id"),
    ("conversation", {"name": "x"}, "conversation.id"),
    ("conversation_id", "a/b", ""),
    ("conversation_id", 7, ""),
    ("queue_ms", 100, ""),
    ("no_such_field", 1, ""),
    ("service_tier", "priority", ""),
    ("on_disconnect", "finish", ""),
    ("on_disconnect", "stop", ""),
    ("model", 1, ""),
]
IMPOSSIBLE_COMPLETIONS: list[tuple[str, Any, str]] = [
    ("store", True, ""),
    ("suffix", "the end", ""),
    ("best_of", 0, ""),
    ("best_of", 17, ""),
    ("logprobs", 21, ""),
    ("logprobs", True, ""),
    ("logprobs", -1, ""),
    ("echo", 1, ""),
    ("prompt", 7, ""),
    ("prompt", [1, "a"], ""),
    ("prompt", [[1], "a"], ""),
    ("prompt", [[True]], ""),
    ("prompt", [1.0], ""),
    ("prompt", [256], ""),
    ("prompt", [-1], ""),
    ("prompt", [[1], [256]], ""),
    ("prompt", [2**70], ""),
    ("prompt", {"text": "a"}, ""),
    ("prompt", "x" * 1_000_001, ""),
    ("prompt", ["x"] * 129, ""),
    ("prompt", "", ""),
    ("prompt", [], ""),
    ("messages", [], ""),
    ("tools", [], ""),
]
IMPOSSIBLE_CHATS: list[tuple[str, Any, str]] = [
    ("tools", [{"type": "custom", "custom": {"name": "f"}}], "tools[0].type"),
    ("tool_choice", "required", ""),
    ("functions", [{"name": "f"}], ""),
    ("function_call", {"name": "f"}, ""),
    ("response_format", {"type": "grammar"}, "response_format.type"),
    ("response_format", {"type": "json_schema"}, "response_format.json_schema"),
    ("response_format", {"type": "json_object", "json_schema": {"name": "a"}}, "response_format.json_schema"),
    ("response_format", {"type": "json_schema", "json_schema": {"name": "a b"}}, "response_format.json_schema.name"),
    ("modalities", ["text", "audio"], ""),
    ("audio", {"voice": "ash", "format": "wav"}, ""),
    ("prediction", {"type": "content", "content": "x"}, ""),
    ("web_search_options", {}, ""),
    ("top_logprobs", 2, ""),
    ("logprobs", 1, ""),
    ("max_completion_tokens", 2, "max_tokens"),
    ("max_completion_tokens", 1_000_000, "max_tokens"),
    ("reasoning_effort", "enormous", ""),
    ("messages", [], ""),
    ("messages", "hello", ""),
    ("messages", [{"role": "robot", "content": "x"}], "messages[0].role"),
    ("messages", [{"role": "user"}], "messages[0].content"),
    ("messages", [{"role": "user", "content": None}], "messages[0].content"),
    ("messages", [{"role": "user", "content": 7}], "messages[0].content"),
    ("messages", [{"role": "user", "content": ""}], "messages[0].content"),
    ("messages", [{"role": "user", "content": "x", "mood": "good"}], "messages[0].mood"),
    ("messages", [{"role": "user", "content": "x", "reasoning_content": "y"}], "messages[0].reasoning_content"),
    ("messages", [{"role": "tool", "content": "x", "tool_call_id": "y"}], "messages[0].tool_call_id"),
    ("messages", [{"role": "assistant", "content": "x", "tool_calls": [{}]}], "messages[0].tool_calls[0].id"),
    (
        "messages",
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}],
        "messages[0].content[0].type",
    ),
    ("messages", [{"role": "user", "content": [{"type": "input_audio"}]}], "messages[0].content[0].type"),
    ("messages", [{"role": "user", "content": "x" * 1_000_001}], ""),
    ("prompt", "hello", ""),
    ("echo", True, ""),
    ("store", 1, ""),
    ("metadata", {"a": 1}, "metadata.a"),
]


def _label(value: Any) -> str:
    return json.dumps(value)[:30]


@pytest.mark.parametrize(("field", "value", "param"), IMPOSSIBLE_EVERYWHERE, ids=_label)
@pytest.mark.parametrize(("path", "body"), [("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)])
def test_impossible_values_are_refused_by_name(
    http: httpx.Client, path: str, body: dict[str, Any], field: str, value: Any, param: str
) -> None:
    """400 with the field's name, on both generating endpoints."""
    response = http.post(path, content=json.dumps({**body, field: value}))
    assert response.status_code == 400
    expected = None if value == 1e400 else param or field
    assert error_of(response)["param"] == expected


@pytest.mark.parametrize(("field", "value", "param"), IMPOSSIBLE_COMPLETIONS, ids=_label)
def test_impossible_completions_are_refused_by_name(http: httpx.Client, field: str, value: Any, param: str) -> None:
    """400 with the field's name."""
    response = http.post("/v1/completions", content=json.dumps({**COMPLETION, field: value}))
    assert response.status_code == 400
    assert error_of(response)["param"] == (param or field)


@pytest.mark.parametrize(("field", "value", "param"), IMPOSSIBLE_CHATS, ids=_label)
def test_impossible_chats_are_refused_by_name(http: httpx.Client, field: str, value: Any, param: str) -> None:
    """400 with the field's name."""
    response = http.post("/v1/chat/completions", content=json.dumps({**CHAT, field: value}))
    assert response.status_code == 400
    error = error_of(response)
    assert error["param"] == (param or field) or error["param"].endswith(field)


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"conversation": "a", "conversation_id": "b"}, "conversation"),
        ({"conversation_id": "b", "n": 2}, "n"),
        ({"conversation_id": "b", "queue_ms": 60_001}, "queue_ms"),
        ({"guided_regex": "a", "guided_grammar": "b"}, "guided_regex"),
        ({"guided_regex": "a", "structured_outputs": {"choice": ["a"]}}, "structured_outputs.choice"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(http: httpx.Client, extra: dict[str, Any], param: str) -> None:
    """400, and the message says which."""
    for path, body in (("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)):
        response = http.post(path, json={**body, **extra})
        assert response.status_code == 400
        assert error_of(response)["param"] == param


@pytest.mark.parametrize(
    "extra",
    [
        {"user": "ada", "metadata": {"a": "b"}, "safety_identifier": "x", "prompt_cache_key": "y"},
        {"store": False, "service_tier": "auto"},
        {name: None for name in ("temperature", "stop", "n", "seed", "stream", "stream_options", "logit_bias", "user")},
        {"temperature": 1, "top_k": -1, "logit_bias": {}, "stop": [], "stop_token_ids": []},
        {"seed": -(2**63)},
        {"seed": 2**64 - 1},
    ],
    ids=_label,
)
def test_what_asks_for_nothing_is_accepted(http: httpx.Client, extra: dict[str, Any]) -> None:
    """Cosmetic fields, null, and values under which a field changes nothing."""
    for path, body in (("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)):
        response = http.post(path, json={**body, **extra})
        assert response.status_code == 200, response.text


def test_what_asks_for_nothing_is_accepted_in_a_chat(http: httpx.Client) -> None:
    """The defaults that clients and frameworks like to send along."""
    neutral = {
        "tools": [],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "functions": [],
        "function_call": "none",
        "response_format": {"type": "text"},
        "modalities": ["text"],
        "verbosity": "high",
        "audio": None,
        "reasoning_effort": None,
    }
    history = [
        {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]},
        {"role": "user", "content": "hello"},
        {
            "role": "assistant",
            "content": "hi",
            "reasoning_content": "Say hi.",
            "refusal": None,
            "tool_calls": None,
            "annotations": [],
        },
        {"role": "user", "content": "again"},
    ]
    response = http.post("/v1/chat/completions", json={**CHAT, "messages": history, **neutral})
    assert response.status_code == 200, response.text


def test_a_neutral_value_must_have_the_right_type(http: httpx.Client) -> None:
    """`best_of: true` is not `best_of: 1`, nor is `store: 0` the same as `store: false`."""
    for extra in ({"best_of": True}, {"store": 0}):
        response = http.post("/v1/completions", json={**COMPLETION, **extra})
        assert response.status_code == 400
    assert http.post("/v1/completions", json={**COMPLETION, "best_of": 1, "store": False}).status_code == 200


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/v1/conversations"])
def test_refusals_never_repeat_what_was_sent(http: httpx.Client, path: str) -> None:
    """Neither a wrong value nor a long made-up name comes back."""
    for body in (
        {"prompt": [SECRET, 1], "messages": [{"role": SECRET, "content": SECRET}]},
        {"prompt": "x", "temperature": SECRET, "messages": SECRET, "metadata": SECRET},
        {
            "prompt": "x",
            "stop": [SECRET * 100],
            "messages": [{"role": "user", "content": [SECRET]}],
            "id": SECRET * 100,
        },
        {"x" * 100_000: 1},
    ):
        response = http.post(path, json=body)
        assert response.status_code == 400
        assert SECRET not in response.text
        assert len(response.content) < 1000


def test_another_model_is_not_found(http: httpx.Client) -> None:
    """404 `model_not_found`, as OpenAI says it."""
    for path, body in (("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT), ("/tokenize", {"prompt": "x"})):
        response = http.post(path, json={**body, "model": "gpt-17"})
        assert response.status_code == 404
        error = error_of(response)
        assert (error["code"], error["param"]) == ("model_not_found", "model")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/v2", 404),
        ("GET", "/docs", 404),
        ("GET", "/health/", 404),
        ("GET", "/openapi.yaml", 404),
        ("PUT", "/health", 405),
        ("GET", "/v1/completions", 405),
    ],
)
def test_unknown_addresses_are_told_in_the_same_form(http: httpx.Client, method: str, path: str, status: int) -> None:
    """404 and 405 have OpenAI's form too."""
    response = http.request(method, path)
    assert response.status_code == status
    error_of(response)


def test_a_version_is_expected_of_conversations_only(http: httpx.Client) -> None:
    """If-Match without a conversation, or without a number, is a mistake."""
    assert http.post("/v1/completions", json=COMPLETION, headers={"if-match": "1"}).status_code == 400
    body = {**COMPLETION, "conversation_id": "matched"}
    assert http.post("/v1/completions", json=body, headers={"if-match": "soon"}).status_code == 400


@pytest.mark.parametrize(
    ("query", "param"), [("limit=0", "limit"), ("limit=101", "limit"), ("limit=x", "limit"), ("order=up", "order")]
)
def test_what_stands_in_the_address_is_refused_in_the_same_form(http: httpx.Client, query: str, param: str) -> None:
    """Parameters of a list are refused by name too, whether or not the list is there."""
    refused = http.get(f"/v1/conversations/nobody/items?{query}")
    assert refused.status_code == 400
    assert error_of(refused)["param"] == param

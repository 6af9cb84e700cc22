"""`/v1/chat/completions`: messages rendered, answers read, turns counted."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.server.replies import error_of, stream_events

HELLO = [{"role": "user", "content": "Hello."}]


def chat(client: httpx.Client, **body: Any) -> dict[str, Any]:
    """Return the reply to a chat request."""
    response = client.post("/v1/chat/completions", json={"messages": HELLO, "max_tokens": 4, "seed": 3, **body})
    assert response.status_code == 200, response.text
    reply: dict[str, Any] = response.json()
    return reply


def test_messages_are_rendered_by_the_template(http: httpx.Client) -> None:
    """The prompt is what the model was trained on, up to where the answer begins."""
    ids = chat(http, return_token_ids=True)["prompt_token_ids"]
    assert bytes(ids).decode() == "User: Hello.\n\nAssistant:"


def test_a_later_turn_begins_with_the_border(http: httpx.Client) -> None:
    """Only the new message is rendered, in one piece with the border that closes the answer before it."""
    chat(http, conversation_id="bordered")
    ids = chat(http, conversation_id="bordered", return_token_ids=True)["prompt_token_ids"]
    assert bytes(ids).decode() == "\n\nUser: Hello.\n\nAssistant:"


def test_a_conversation_equals_its_history_in_one_prompt(http: httpx.Client) -> None:
    """The state after a turn is exactly its rendered prompt and the tokens that were delivered."""
    tokens: list[int] = []
    for seed in range(3):
        reply = chat(http, conversation_id="twin", seed=seed, max_tokens=12, stop=["e"], return_token_ids=True)
        tokens += reply["prompt_token_ids"] + reply["choices"][0]["token_ids"]
        assert reply["usage"]["total_tokens"] == len(tokens)
    last = len(reply["choices"][0]["token_ids"])
    prompt = tokens[: len(tokens) - last]
    body = {"prompt": prompt, "seed": 2, "max_tokens": 12, "stop": ["e", "\n\nUser:", "\nUser:", "\n\nSystem:"]}
    fresh = http.post("/v1/completions", json={**body, "return_token_ids": True}).json()
    assert fresh["choices"][0]["token_ids"] == reply["choices"][0]["token_ids"]


def test_several_answers(http: httpx.Client) -> None:
    """Each is what its seed alone would give."""
    choices = chat(http, n=2, max_tokens=12)["choices"]
    assert [choice["index"] for choice in choices] == [0, 1]
    assert choices[1]["message"] == chat(http, seed=4, max_tokens=12)["choices"][0]["message"]


def test_an_answer_without_a_limit_is_limited_by_the_server(http: httpx.Client) -> None:
    """Nothing asked for means up to the operator's limit, and a stop ends it earlier."""
    reply = chat(http, max_tokens=None, stop_token_ids=list(range(128)))
    assert reply["choices"][0]["finish_reason"] == "stop"


def test_a_stream_says_what_the_whole_reply_says(http: httpx.Client) -> None:
    """Content, token ids, log-probabilities and conversation, put together from the chunks."""
    body = {"messages": HELLO, "max_tokens": 8, "seed": 3, "logprobs": True, "top_logprobs": 1}
    body |= {"return_token_ids": True}
    whole = chat(http, **body)
    events = stream_events(http, "/v1/chat/completions", {**body, "conversation_id": "streamed"})
    chunks = [event for event in events if event != "[DONE]"]
    parts = [chunk["choices"][0] for chunk in chunks]
    expected = whole["choices"][0]
    assert parts[0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(part["delta"].get("content", "") for part in parts) == expected["message"]["content"]
    assert [i for part in parts for i in part.get("token_ids", [])] == expected["token_ids"]
    assert [v for p in parts if p["logprobs"] for v in p["logprobs"]["content"]] == expected["logprobs"]["content"]
    assert chunks[-1]["conversation"]["version"] == 1
    assert chunks[-1]["prompt_token_ids"] == whole["prompt_token_ids"]
    assert all("conversation" not in chunk for chunk in chunks[:-1])


def test_an_unknown_effort_is_refused_by_name(http: httpx.Client) -> None:
    """The World template has no way to think."""
    response = http.post("/v1/chat/completions", json={"messages": HELLO, "reasoning_effort": "high"})
    assert response.status_code == 400
    assert error_of(response)["param"] == "reasoning_effort"


@pytest.mark.parametrize("stream", [False, True])
def test_refusals_of_the_template_come_before_the_first_byte(http: httpx.Client, stream: bool) -> None:
    """A chat that ends with an answer has nothing to answer: 400, also when it should stream."""
    messages = [*HELLO, {"role": "assistant", "content": "Hi."}]
    response = http.post("/v1/chat/completions", json={"messages": messages, "stream": stream})
    assert response.status_code == 400
    assert error_of(response)["param"] == "messages[1].role"


def test_completions_and_chat_share_conversations(http: httpx.Client) -> None:
    """What was begun as a text may go on as a chat."""
    begun = http.post("/v1/completions", json={"prompt": "Once", "max_tokens": 2, "conversation_id": "shared"})
    assert begun.json()["conversation"]["version"] == 1
    assert chat(http, conversation={"id": "shared"})["conversation"]["version"] == 2

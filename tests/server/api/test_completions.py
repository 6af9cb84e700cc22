"""`/v1/completions`: prompts in all shapes, echo, log-probabilities, choices, conversations."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.server.replies import error_of, stream_events


def complete(client: httpx.Client, **body: Any) -> dict[str, Any]:
    """Return the reply to a completion request."""
    response = client.post("/v1/completions", json={"max_tokens": 4, "seed": 3, **body})
    assert response.status_code == 200, response.text
    reply: dict[str, Any] = response.json()
    return reply


def test_the_four_shapes_of_a_prompt_mean_the_same(http: httpx.Client) -> None:
    """A text, its tokens, and lists of either give the same choice."""
    shapes = ["abc", ["abc"], [97, 98, 99], [[97, 98, 99]]]
    texts = [complete(http, prompt=shape)["choices"][0]["text"] for shape in shapes]
    assert texts == [texts[0]] * 4


def test_a_batch_of_prompts_equals_each_alone(http: httpx.Client) -> None:
    """Choices come in the order of their prompts and do not depend on their neighbours."""
    batch = complete(http, prompt=["one", "two", "three"])
    alone = [complete(http, prompt=prompt) for prompt in ("one", "two", "three")]
    assert [choice["text"] for choice in batch["choices"]] == [reply["choices"][0]["text"] for reply in alone]
    assert batch["usage"]["prompt_tokens"] == 3 + 3 + 5
    assert batch["usage"]["completion_tokens"] == sum(reply["usage"]["completion_tokens"] for reply in alone)


def test_choices_differ_and_the_first_is_the_one_asked_for(http: httpx.Client) -> None:
    """With a seed, the first of `n` choices is the only one of `n = 1`, the others follow the next seeds."""
    several = complete(http, prompt="x", n=3, max_tokens=12)["choices"]
    for offset, choice in enumerate(several):
        assert choice["text"] == complete(http, prompt="x", seed=3 + offset, max_tokens=12)["choices"][0]["text"]
    assert len({choice["text"] for choice in several}) == 3


def test_equal_seeds_give_equal_text_and_no_seed_does_not(http: httpx.Client) -> None:
    """Sampling has no hidden state; without a seed one is drawn."""
    assert complete(http, prompt="x", max_tokens=16)["choices"] == complete(http, prompt="x", max_tokens=16)["choices"]
    drawn = {complete(http, prompt="x", seed=None, max_tokens=16)["choices"][0]["text"] for _ in range(3)}
    assert len(drawn) > 1


def test_the_default_is_sixteen_tokens(http: httpx.Client) -> None:
    """OpenAI's default for completions."""
    reply = complete(http, prompt="x", max_tokens=None)
    assert reply["usage"]["completion_tokens"] == 16
    assert reply["choices"][0]["finish_reason"] == "length"


def test_no_token_may_be_asked_for(http: httpx.Client) -> None:
    """`max_tokens: 0` consumes the prompt and says so."""
    reply = complete(http, prompt="abc", max_tokens=0)
    assert reply["choices"][0]["text"] == ""
    assert reply["choices"][0]["finish_reason"] == "length"
    assert reply["usage"] | {"prompt_tokens_details": None} == {
        "prompt_tokens": 3,
        "completion_tokens": 0,
        "total_tokens": 3,
        "prompt_tokens_details": None,
    }


def test_token_ids_come_when_asked_for(http: httpx.Client) -> None:
    """Both the prompt's and the output's."""
    choice = complete(http, prompt="abc", return_token_ids=True)["choices"][0]
    assert choice["prompt_token_ids"] == [97, 98, 99]
    assert bytes(choice["token_ids"]).decode("utf-8", "replace") == choice["text"]
    assert "token_ids" not in complete(http, prompt="abc")["choices"][0]


def test_a_stop_token_ends_the_text_and_is_not_in_it(http: httpx.Client) -> None:
    """The text ends before the first stop token."""
    ids = complete(http, prompt="abc", return_token_ids=True, max_tokens=12)["choices"][0]["token_ids"]
    choice = complete(http, prompt="abc", return_token_ids=True, max_tokens=12, stop_token_ids=[ids[5]])["choices"][0]
    assert choice["token_ids"] == ids[: ids.index(ids[5])]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", ids[5])


def test_a_stop_text_ends_the_text_and_is_not_in_it(http: httpx.Client) -> None:
    """The text ends before the stop text, streamed or not."""
    # Printable ASCII only, so that text and tokens correspond one to one.
    ascii_only = {str(token_id): -100 for token_id in range(256) if not 32 <= token_id < 127}
    options = {"prompt": "abc", "max_tokens": 24, "logit_bias": ascii_only}
    text = complete(http, **options)["choices"][0]["text"]
    stop = text[10:13]
    choice = complete(http, **options, stop=stop)["choices"][0]
    assert choice["text"] == text[: text.index(stop)]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)
    events = stream_events(http, "/v1/completions", {**options, "seed": 3, "stop": [stop]})
    assert "".join(event["choices"][0]["text"] for event in events[:-1]) == choice["text"]


def test_echo_and_logprobs_give_an_entry_for_every_token(http: httpx.Client) -> None:
    """N entries for the prompt, the first null, and one for each generated token; offsets point into the text."""
    choice = complete(http, prompt="abc", echo=True, logprobs=2, temperature=0, max_tokens=1)["choices"][0]
    logprobs = choice["logprobs"]
    assert choice["text"].startswith("abc")
    assert [len(logprobs[name]) for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")] == [4] * 4
    assert logprobs["tokens"][:3] == ["a", "b", "c"]
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    assert logprobs["text_offset"] == [0, 1, 2, 3]
    assert logprobs["token_logprobs"][3] == max(logprobs["top_logprobs"][3].values())
    for token, value, top in zip(*(logprobs[n][1:] for n in ("tokens", "token_logprobs", "top_logprobs")), strict=True):
        assert top[token] == value
        assert 2 <= len(top) <= 3


def test_echo_without_logprobs_gives_the_text_only(http: httpx.Client) -> None:
    """The prompt, then the continuation."""
    plain = complete(http, prompt="abc")["choices"][0]["text"]
    choice = complete(http, prompt="abc", echo=True)["choices"][0]
    assert choice["text"] == "abc" + plain
    assert choice["logprobs"] is None


def test_echo_without_a_continuation_scores_the_prompt(http: httpx.Client) -> None:
    """`max_tokens: 0` with echo and logprobs is a pure evaluation."""
    logprobs = complete(http, prompt="abc", echo=True, logprobs=0, max_tokens=0)["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["a", "b", "c"]
    assert [list(top) for top in logprobs["top_logprobs"][1:]] == [["b"], ["c"]]


def test_a_prompt_scores_the_same_whole_and_as_a_continuation(http: httpx.Client) -> None:
    """The log-probability of a prompt token is that of the same token when it is generated."""
    generated = complete(http, prompt="abc", logprobs=0, temperature=0, return_token_ids=True)["choices"][0]
    prompt_ids = [97, 98, 99, *generated["token_ids"]]
    echoed = complete(http, prompt=prompt_ids, echo=True, logprobs=0, max_tokens=0)["choices"][0]
    assert echoed["logprobs"]["token_logprobs"][3:] == pytest.approx(generated["logprobs"]["token_logprobs"], abs=1e-5)


def test_a_stream_says_what_the_whole_reply_says(http: httpx.Client) -> None:
    """Text, log-probabilities, token ids and usage, put together from the chunks of several choices."""
    body = {
        "prompt": ["one", "two"],
        "n": 2,
        "max_tokens": 6,
        "seed": 3,
        "echo": True,
        "logprobs": 2,
        "return_token_ids": True,
    }
    whole = complete(http, **body)
    events = stream_events(http, "/v1/completions", {**body, "stream_options": {"include_usage": True}})
    assert events[-1] == "[DONE]"
    assert events[-2]["usage"] == whole["usage"]
    for expected in whole["choices"]:
        parts = [part for event in events[:-2] for part in event["choices"] if part["index"] == expected["index"]]
        assert "".join(part["text"] for part in parts) == expected["text"]
        assert [i for part in parts for i in part.get("token_ids", [])] == expected["token_ids"]
        for name, values in expected["logprobs"].items():
            assert [v for part in parts if part["logprobs"] for v in part["logprobs"][name]] == values
        assert [part["finish_reason"] for part in parts if part["finish_reason"]] == [expected["finish_reason"]]


def test_an_empty_prompt_begins_with_end_of_text(world: httpx.Client) -> None:
    """Where the vocabulary has one, it is what a text begins with; id 0 is legal in prompts."""
    empty = complete(world, prompt="", temperature=0, return_token_ids=True)["choices"][0]
    assert empty["prompt_token_ids"] == [0]
    assert empty["text"] == complete(world, prompt=[0], temperature=0)["choices"][0]["text"]


def test_an_empty_prompt_is_refused_where_nothing_can_begin_it(http: httpx.Client) -> None:
    """The byte vocabulary has no end of text."""
    response = http.post("/v1/completions", json={"prompt": ""})
    assert response.status_code == 400
    assert error_of(response)["param"] == "prompt"


def test_a_conversation_is_continued_as_it_stands(http: httpx.Client) -> None:
    """Two turns give what one prompt with everything in it gives; the history counts as cached."""
    first = complete(http, prompt="abc", conversation_id="tape", temperature=0, return_token_ids=True)
    second = complete(http, prompt="def", conversation="tape", temperature=0, return_token_ids=True)
    history = [97, 98, 99, *first["choices"][0]["token_ids"], 100, 101, 102]
    fresh = complete(http, prompt=history, temperature=0, return_token_ids=True)
    assert second["choices"][0]["token_ids"] == fresh["choices"][0]["token_ids"]
    assert second["conversation"]["version"] == 2
    assert second["usage"]["prompt_tokens"] == len(history)
    expected = 0 if second["conversation"]["resume"] == "replayed" else 7
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == expected


def test_a_stale_version_is_refused_with_the_current_one(http: httpx.Client) -> None:
    """If-Match protects against a turn one has not seen; nothing is applied."""
    body = {"prompt": "abc", "max_tokens": 2, "conversation_id": "watched"}
    assert http.post("/v1/completions", json=body, headers={"if-match": "0"}).status_code == 200
    stale = http.post("/v1/completions", json=body, headers={"if-match": '"0"'})
    assert stale.status_code == 412
    assert error_of(stale)["code"] == "version_mismatch"
    assert stale.headers["etag"] == '"1"'
    assert http.get("/v1/conversations/watched").json()["version"] == 1
    assert http.post("/v1/completions", json=body, headers={"if-match": '"1"'}).status_code == 200


def test_an_empty_prompt_cannot_continue_a_conversation(world: httpx.Client) -> None:
    """It would put an end of text into the middle."""
    body = {"prompt": "", "max_tokens": 1, "conversation_id": "begun"}
    assert world.post("/v1/completions", json=body).status_code == 200
    response = world.post("/v1/completions", json=body)
    assert response.status_code == 400
    assert error_of(response)["param"] == "prompt"
    assert world.get("/v1/conversations/begun").json()["version"] == 1

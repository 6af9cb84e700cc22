"""What lm-evaluation-harness (0.4.13, `local-completions` and `local-chat-completions`) sends, and reads from replies.

The payloads and headers are as they were recorded from it; `scored` reads a reply as it does.
"""

from __future__ import annotations

import http.client
import json
from typing import Any

import httpx
import pytest

from tests.server_process import ServerProcess

HEADERS = {"Content-Type": "application/json"}
SCORING = {"model": "test", "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
GENERATING = {"model": "test", "max_tokens": 12, "temperature": 0.0, "seed": 1234}


def post(client: httpx.Client, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """Return the reply; anything but 200 would be retried and then end the evaluation."""
    response = client.post(path, content=json.dumps(body), headers=HEADERS)
    assert response.status_code == 200, response.text
    reply: dict[str, Any] = response.json()
    return reply


def tokens(client: httpx.Client, text: str) -> list[int]:
    """Return the tokens of a text, asked for as the harness asks."""
    reply = post(client, "/tokenize", {"prompt": text, "add_special_tokens": False})
    assert reply["count"] == len(reply["tokens"])
    assert "max_model_len" in reply
    token_ids: list[int] = reply["tokens"]
    return token_ids


def scored(choice: dict[str, Any], num_context: int) -> tuple[float, bool]:
    """Return the likelihood of what follows the context, and whether it is greedy: the last entry is dropped."""
    own = choice["logprobs"]["token_logprobs"][num_context:-1]
    best = choice["logprobs"]["top_logprobs"][num_context:-1]
    return sum(own), all(value == max(top.values()) for value, top in zip(own, best, strict=True))


def generated(client: httpx.Client, prompt: list[int], num_tokens: int) -> list[int]:
    """Return a greedy continuation in which end of text may stand like any token."""
    body = {"prompt": prompt, "max_tokens": num_tokens, "temperature": 0, "return_token_ids": True, "ignore_eos": True}
    token_ids: list[int] = post(client, "/v1/completions", body)["choices"][0]["token_ids"]
    return token_ids


def test_the_tokenizer_is_found_at_the_root(world: httpx.Client) -> None:
    """Its information is a dictionary with the end-of-text string, and that string is the one id."""
    response = world.get("/tokenizer_info", headers=HEADERS)
    assert response.status_code == 200
    info = response.json()
    assert {"eos_token", "bos_token", "pad_token", "chat_template"} <= info.keys()
    assert isinstance(info["eos_token"], str)
    assert tokens(world, info["eos_token"]) == [0]
    text = "The cat sat on the mat; 猫"
    assert post(world, "/detokenize", {"tokens": tokens(world, text)})["prompt"] == text


def test_an_empty_key_is_no_key(world: httpx.Client) -> None:
    """Without a key in its environment the harness sends `Bearer `, as it is, which httpx would refuse to send."""
    connection = http.client.HTTPConnection(world.base_url.host, world.base_url.port, timeout=60)
    body = json.dumps({**SCORING, "prompt": [[0, 1]]})
    connection.request("POST", "/v1/completions", body, {**HEADERS, "Authorization": "Bearer "})
    assert connection.getresponse().status == 200
    connection.close()


def test_targets_are_scored_in_a_batch_of_token_lists(world: httpx.Client) -> None:
    """Each prompt token has an entry, the generated one has the last; what is greedy is so by equality of floats."""
    context = [0, *tokens(world, "The cat sat on the")]
    greedy = generated(world, context, 3)
    other = tokens(world, " mat, and slept")
    prompts = [context + greedy, context + other, [0, *other]]
    choices = post(world, "/v1/completions", {**SCORING, "prompt": prompts})["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2]
    for choice, prompt in zip(choices, prompts, strict=True):
        assert {len(entries) for entries in choice["logprobs"].values()} == {len(prompt) + 1}
        assert choice["logprobs"]["token_logprobs"][0] is None
        for value, top in zip(*(choice["logprobs"][n][1:] for n in ("token_logprobs", "top_logprobs")), strict=True):
            assert value in top.values()
            assert -9999 <= value <= max(top.values()) <= 0
    assert scored(choices[0], len(context))[1]
    assert not scored(choices[1], len(context))[1]
    # The last target token counts: its share is in the sum.
    shorter = post(world, "/v1/completions", {**SCORING, "prompt": [prompts[1][:-1]]})["choices"][0]
    last = choices[1]["logprobs"]["token_logprobs"][len(prompts[1]) - 1]
    whole = scored(choices[1], len(context))[0]
    assert whole == pytest.approx(scored(shorter, len(context))[0] + last, abs=1e-5)


@pytest.mark.parametrize("prompt", ["The cat sat on the mat", ["The cat sat on the mat"]], ids=["string", "strings"])
def test_texts_are_scored_as_their_tokens(world: httpx.Client, prompt: str | list[str]) -> None:
    """With `tokenized_requests=False` prompts are texts."""
    by_text = post(world, "/v1/completions", {**SCORING, "prompt": prompt})["choices"][0]
    token_ids = tokens(world, "The cat sat on the mat")
    by_ids = post(world, "/v1/completions", {**SCORING, "prompt": [token_ids]})["choices"][0]
    assert by_text["logprobs"] == by_ids["logprobs"]


def test_the_last_entry_is_there_when_the_text_ends(world: httpx.Client) -> None:
    """End of text is no output, but dropping the last entry must not drop a target token."""
    prompt = [0, *tokens(world, "The end")]
    choice = post(world, "/v1/completions", {**SCORING, "prompt": [prompt], "logit_bias": {"0": 100}})["choices"][0]
    assert (choice["finish_reason"], choice["text"]) == ("stop", "The end")
    assert {len(entries) for entries in choice["logprobs"].values()} == {len(prompt) + 1}
    assert choice["logprobs"]["tokens"][-1] == "<|endoftext|>"
    plain = post(world, "/v1/completions", {**SCORING, "prompt": [prompt]})["choices"][0]
    for name in ("token_logprobs", "top_logprobs"):
        assert choice["logprobs"][name][:-1] == plain["logprobs"][name][:-1]


def test_rolling_windows_begin_with_end_of_text(world: httpx.Client) -> None:
    """Id 0 is legal in prompts, also as the only token before the scored ones."""
    window = [0, *tokens(world, "Once upon a time")]
    choice = post(world, "/v1/completions", {**SCORING, "prompt": [window]})["choices"][0]
    assert choice["logprobs"]["tokens"][0] == "<|endoftext|>"
    assert len(choice["logprobs"]["token_logprobs"][1:-1]) == len(window) - 1


def test_tokens_that_are_not_text_have_names_of_their_own(server: ServerProcess) -> None:
    """Of 256 bytes, half are not UTF-8 by themselves: no two share a key, and no value is lost."""
    body = {**SCORING, "prompt": [list(range(0x70, 0x100))], "logprobs": 20}
    logprobs = post(server.http, "/v1/completions", body)["choices"][0]["logprobs"]
    assert len(set(logprobs["tokens"][:-1])) == 0x90
    assert all(20 <= len(top) <= 21 for top in logprobs["top_logprobs"][1:])


def test_texts_are_generated_until_a_stop(world: httpx.Client) -> None:
    """One string, greedy, with stop strings; the model's own end of text ends it, too."""
    body = {**GENERATING, "prompt": "The cat sat on the", "stop": ["\n\n", "<|endoftext|>"]}
    choice = post(world, "/v1/completions", body)["choices"][0]
    assert isinstance(choice["text"], str)
    assert choice["index"] == 0
    ended = post(world, "/v1/completions", {**body, "logit_bias": {"0": 100}})["choices"][0]
    assert (ended["text"], ended["finish_reason"]) == ("", "stop")


def test_chats_are_answered(world: httpx.Client) -> None:
    """`local-chat-completions` reads the message's content."""
    message = {"role": "user", "content": "Where did the cat sit?"}
    body = {**GENERATING, "messages": [message], "stop": ["\n\n", "User:", "Q:", "###"]}
    choice = post(world, "/v1/chat/completions", body)["choices"][0]
    assert isinstance(choice["message"]["content"], str)


def test_the_same_request_gives_the_same_bytes(world: httpx.Client) -> None:
    """A retried or repeated evaluation has the same numbers."""
    body = {**SCORING, "prompt": [[0, *tokens(world, "The cat sat on the mat")]] * 3}
    first, second, third = post(world, "/v1/completions", body)["choices"]
    assert first["logprobs"] == second["logprobs"] == third["logprobs"]

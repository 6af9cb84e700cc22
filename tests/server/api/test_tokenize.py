"""`/tokenize`, `/detokenize`, `/tokenizer_info`, and the payloads of lm-evaluation-harness that rest on them."""

from __future__ import annotations

import httpx
import pytest

from tests.server.replies import error_of


def test_text_and_tokens_are_each_others_inverse(world: httpx.Client) -> None:
    """What is tokenized and detokenized again is the same text."""
    text = "Hello, wörld! 你好 🎵\n"
    reply = world.post("/tokenize", json={"prompt": text, "add_special_tokens": False}).json()
    assert reply["count"] == len(reply["tokens"]) < len(text.encode())
    assert world.post("/detokenize", json={"tokens": reply["tokens"]}).json() == {"prompt": text}


def test_end_of_text_has_a_name(world: httpx.Client) -> None:
    """The harness asks for the string, then for its id."""
    info = world.get("/tokenizer_info").json()
    assert info["eos_token"] == "<|endoftext|>"
    assert world.post("/tokenize", json={"prompt": info["eos_token"]}).json()["tokens"] == [0]


def test_token_names_come_when_asked_for(http: httpx.Client) -> None:
    """As log-probabilities name them."""
    reply = http.post("/tokenize", json={"prompt": "aé", "return_token_strs": True}).json()
    assert reply["token_strs"] == ["a", "bytes:\\xc3", "bytes:\\xa9"]


@pytest.mark.parametrize("tokens", [[256], [-1], [2**40]])
def test_ids_that_are_no_tokens_are_refused(http: httpx.Client, tokens: list[int]) -> None:
    """400, by name."""
    response = http.post("/detokenize", json={"tokens": tokens})
    assert response.status_code == 400
    assert error_of(response)["param"] == "tokens"


def test_a_loglikelihood_request_of_the_harness(world: httpx.Client) -> None:
    """lm-eval slices [context:-1]: it needs an entry for every prompt token and one generated one."""
    context = world.post("/tokenize", json={"prompt": "The cat sat on the"}).json()["tokens"]
    target = world.post("/tokenize", json={"prompt": " mat"}).json()["tokens"]
    body = {
        "model": "tiny",
        "prompt": [[0, *context, *target], [0, *target]],
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
    }
    choices = world.post("/v1/completions", json=body).json()["choices"]
    for choice, prompt in zip(choices, body["prompt"], strict=True):
        values = choice["logprobs"]["token_logprobs"]
        tops = choice["logprobs"]["top_logprobs"]
        assert len(values) == len(tops) == len(prompt) + 1
        for value, top in zip(values[1:-1], tops[1:-1], strict=True):
            # is_greedy compares floats: the token's own value must be one of the dictionary's.
            assert value in top.values()
            assert -9999 <= value <= max(top.values()) <= 0


def test_a_rolling_window_may_begin_with_end_of_text(world: httpx.Client) -> None:
    """Id 0 is legal in prompts, also as the only token before the scored ones."""
    body = {"prompt": [[0]], "temperature": 0, "max_tokens": 1, "logprobs": 1, "echo": True}
    choice = world.post("/v1/completions", json=body).json()["choices"][0]
    assert choice["logprobs"]["tokens"][0] == "<|endoftext|>"
    assert len(choice["logprobs"]["tokens"]) in (1, 2)  # end of text may be what is generated, and is no output

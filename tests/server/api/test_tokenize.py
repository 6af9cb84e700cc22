"""`/tokenize`, `/detokenize`, `/tokenizer_info`."""

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

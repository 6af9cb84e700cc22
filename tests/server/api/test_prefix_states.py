"""Stateless clients: what was sent before costs nothing, and usage and metrics say so."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.settings import DEFAULT_MODEL
from tests.redis_server import RedisServer
from tests.server.conftest import OPTIONS
from tests.server_process import ServerProcess

SYSTEM = {"role": "system", "content": "You answer in one short line, and you never raise your voice. " * 6}


@pytest.fixture(scope="module")
def own(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A client of a server that nobody else uses, so that its counters can be read."""
    with ServerProcess(tiny_model, tmp_path_factory.mktemp("prefixes") / "data", *OPTIONS) as process:
        yield process.http


def post(http: httpx.Client, route: str, **body: Any) -> dict[str, Any]:
    """Return the answer to a request that must succeed."""
    response = http.post(route, json={"seed": 3, **body})
    assert response.status_code == 200, response.text
    reply: dict[str, Any] = response.json()
    return reply


def chat(http: httpx.Client, *messages: dict[str, str], **body: Any) -> dict[str, Any]:
    """Return the answer to messages."""
    return post(http, "/v1/chat/completions", messages=list(messages), **{"max_tokens": 8, **body})


def complete(http: httpx.Client, prompt: str, **body: Any) -> dict[str, Any]:
    """Return the continuation of a prompt."""
    return post(http, "/v1/completions", prompt=prompt, **{"max_tokens": 8, **body})


def user(content: str) -> dict[str, str]:
    """Return a user's message."""
    return {"role": "user", "content": content}


def details(reply: dict[str, Any]) -> tuple[int, int, int]:
    """Return prompt tokens: all, cached, written."""
    usage = reply["usage"]
    of_prompt = usage["prompt_tokens_details"]
    return usage["prompt_tokens"], of_prompt["cached_tokens"], of_prompt["cache_write_tokens"]


def metric(http: httpx.Client, name: str) -> float:
    """Return a sample of /metrics, zero if there is none yet."""
    found = re.search(rf"^{re.escape(name)} (\S+)$", http.get("/metrics").text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def test_a_system_prompt_is_paid_once(own: httpx.Client) -> None:
    """A second chat that begins with it prefills only its question."""
    first = chat(own, SYSTEM, user("Who are you?"))
    prefilled = metric(own, "rwkv_prefill_tokens_total")
    reused = metric(own, "rwkv_prefix_tokens_reused_total")
    second = chat(own, SYSTEM, user("What is this?"))
    num_prompt, num_cached, num_written = details(second)
    assert details(first)[1] == 0
    assert details(first)[2] == details(first)[0]
    assert num_cached == len(f"System: {SYSTEM['content'].strip()}\n\n")
    assert num_written == num_prompt - num_cached
    assert metric(own, "rwkv_prefill_tokens_total") - prefilled == num_prompt - num_cached
    assert metric(own, "rwkv_prefix_tokens_reused_total") - reused == num_cached
    assert metric(own, 'rwkv_prefix_lookups_total{outcome="hit_memory"}') >= 1
    assert metric(own, 'rwkv_prefix_misses_total{reason="new"}') >= 1


def test_an_equal_prompt_is_answered_alike_for_one_token(own: httpx.Client) -> None:
    """With penalties, which look at the prompt, and for text completions too."""
    options = {"repetition_penalty": 1.5, "presence_penalty": 0.5, "logprobs": 5}
    prompt = "Tell me again what I have told you."
    first, second = (complete(own, prompt, **options) for _ in range(2))
    assert second["choices"] == first["choices"]
    assert details(first) == (len(prompt), 0, len(prompt) - 1)
    assert details(second) == (len(prompt), len(prompt) - 1, 0)


def test_choices_of_one_prompt_are_prefilled_once(own: httpx.Client) -> None:
    """They say what each would say alone; the prompt is counted once, as computed."""
    prompt = "Four answers to one question, please."
    prefilled = metric(own, "rwkv_prefill_tokens_total")
    reply = complete(own, prompt, n=4, seed=11)
    assert metric(own, "rwkv_prefill_tokens_total") - prefilled == len(prompt) + 3
    assert details(reply) == (len(prompt), 0, len(prompt) - 1)
    alone = [complete(own, prompt, seed=11 + idx)["choices"][0]["text"] for idx in range(4)]
    assert [choice["text"] for choice in reply["choices"]] == alone


def test_a_chat_that_resends_its_history_costs_its_new_tokens(tmp_path: Path) -> None:
    """Twenty turns with the bundled model: all that was said before is cached, to the last token of the last answer.

    And they are the turns of a conversation that keeps its state.
    """
    with ServerProcess(DEFAULT_MODEL, tmp_path / "data") as process:
        messages, known = [SYSTEM], 0
        for number in range(20):
            messages.append(user(f"What is {number} plus {number}?"))
            reply = chat(process.http, *messages, temperature=0, max_tokens=30)
            num_prompt, num_cached, num_written = details(reply)
            assert (num_cached, num_written) == (known, num_prompt - known)
            new = messages[-1:] if number else messages
            turn = chat(process.http, *new, temperature=0, max_tokens=30, conversation_id="same")
            assert turn["choices"][0]["message"] == reply["choices"][0]["message"]
            messages.append({"role": "assistant", "content": reply["choices"][0]["message"]["content"]})
            known = num_prompt + reply["usage"]["completion_tokens"]


def test_a_conversation_begins_at_its_system_prompt(own: httpx.Client) -> None:
    """It is new, yet costs only its question; what it says is kept under its own name only."""
    system = {"role": "system", "content": "Whoever reads this has read it before. " * 4}
    first = chat(own, system, user("Hello"), conversation_id="one")
    second = chat(own, system, user("Hello"), conversation_id="two")
    assert second["conversation"]["resume"] == "new"
    assert details(first)[1] == 0
    assert details(second)[1] == len(f"System: {system['content'].strip()}\n\n")


def test_equal_requests_at_once_share_one_prefill(own: httpx.Client) -> None:
    """However many clients ask the same, a leaver included."""
    prompt = "The very same words from everybody. " * 20
    prefilled = metric(own, "rwkv_prefill_tokens_total")
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda _: complete(own, prompt), range(8)))
    assert len({reply["choices"][0]["text"] for reply in replies}) == 1
    assert metric(own, "rwkv_prefill_tokens_total") - prefilled == len(prompt) + 7


def test_states_can_be_switched_off(tiny_model: Path, tmp_path: Path) -> None:
    """Then every prompt is computed and nothing is counted."""
    with ServerProcess(tiny_model, tmp_path / "data", *OPTIONS, "--no-prefix-states") as process:
        replies = [chat(process.http, SYSTEM, user("Hello")) for _ in range(2)]
        assert [details(reply)[1:] for reply in replies] == [(0, 0), (0, 0)]
        assert metric(process.http, 'rwkv_prefix_lookups_total{outcome="miss"}') == 0


def test_replicas_share_a_system_prompt_through_redis(tiny_model: Path, tmp_path: Path) -> None:
    """One computes it, the other loads it; both answer alike."""
    with RedisServer(tmp_path) as redis:
        options = (*OPTIONS, "--ledger-url", redis.url, "--state-url", redis.url)
        with ServerProcess(tiny_model, tmp_path / "a", *options) as one:
            first = chat(one.http, SYSTEM, user("Where was I?"))
            one.stop()
        with ServerProcess(tiny_model, tmp_path / "b", *options) as other:
            second = chat(other.http, SYSTEM, user("Where was I?"))
            assert metric(other.http, 'rwkv_prefix_lookups_total{outcome="hit_store"}') == 1
    assert details(first)[1] == 0
    assert details(second)[1] == len(f"System: {SYSTEM['content'].strip()}\n\n")
    assert second["choices"] == first["choices"]

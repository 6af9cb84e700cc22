"""A conversation is its tokens: turn after turn it says what one run over the whole history would say."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server_process import ServerProcess


@pytest.fixture(scope="module")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server whose engine's memory holds three states, so that conversations are restored as well as hot."""
    directory = tmp_path_factory.mktemp("conversations") / "data"
    with ServerProcess(tiny_model, directory, "--hot-state-bytes", str(3 * 13_824)) as process:
        yield process


def post(server: ServerProcess, route: str, **body: Any) -> dict[str, Any]:
    """Return the answer to a request that must succeed."""
    response = server.http.post(route, json={"model": "test", "return_token_ids": True, **body})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def continue_ids(server: ServerProcess, prompt_ids: list[int], **sampling: Any) -> list[int]:
    """Return what a run without any conversation generates after `prompt_ids`."""
    token_ids: list[int] = post(server, "/v1/completions", prompt=prompt_ids, **sampling)["choices"][0]["token_ids"]
    return token_ids


# Single bytes make stop texts that match often; a long one begins to match often and seldom completes.
STOPS = {"none": [], "often": ["e", " "], "begins": ["ab\x01\x02", "\x03"], "template": ["\n\nUser:"]}


@pytest.mark.parametrize("stop", STOPS.values(), ids=STOPS.keys())
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_turns_equal_one_run_over_the_whole_history(
    server: ServerProcess, stop: list[str], temperature: float, request: pytest.FixtureRequest
) -> None:
    """Prompt, delivered tokens, next prompt: nothing is fed twice, left out, or fed and not delivered."""
    history: list[int] = []
    for number in range(5):
        sampling = {"seed": number, "temperature": temperature, "stop": stop, "max_tokens": 40}
        turn = post(
            server,
            "/v1/chat/completions",
            messages=[{"role": "user", "content": f"Line {number}."}],
            conversation_id=f"{request.node.callspec.id.replace('[', '-')}",
            **sampling,
        )
        prompt_ids, token_ids = turn["prompt_token_ids"], turn["choices"][0]["token_ids"]
        template_stops = ["\n\nUser:", "\nUser:", "\n\nSystem:"]
        expected = continue_ids(server, history + prompt_ids, **{**sampling, "stop": stop + template_stops})
        assert token_ids == expected
        assert turn["conversation"]["version"] == number + 1
        history += prompt_ids + token_ids


def test_interleaved_conversations_do_not_touch_each_other(server: ServerProcess) -> None:
    """Several conversations that take turns say what each would say alone, however their states come and go."""
    histories: dict[str, list[int]] = {f"crowd-{name}": [] for name in range(6)}
    resumes = set()
    for number in range(4):
        for name, history in histories.items():
            sampling = {"seed": len(name) + number, "temperature": 1.0, "max_tokens": 20}
            turn = post(server, "/v1/completions", prompt=f"{name} says {number}", conversation_id=name, **sampling)
            token_ids = turn["choices"][0]["token_ids"]
            prompt_ids = list(f"{name} says {number}".encode())
            assert token_ids == continue_ids(server, history + prompt_ids, **sampling)
            history += prompt_ids + token_ids
            resumes.add(turn["conversation"]["resume"])
    assert "restored" in resumes or "replayed" in resumes


def test_a_prompt_can_be_taken_in_without_an_answer(server: ServerProcess) -> None:
    """`max_tokens: 0` appends to the conversation and generates nothing; the next turn has read it."""
    first = post(server, "/v1/completions", prompt="Remember this.", max_tokens=0, conversation_id="silent")
    assert first["choices"][0]["text"] == ""
    assert first["conversation"]["version"] == 1
    sampling = {"seed": 5, "max_tokens": 16}
    turn = post(server, "/v1/completions", prompt=" And?", conversation_id="silent", **sampling)
    whole = list(b"Remember this. And?")
    assert turn["choices"][0]["token_ids"] == continue_ids(server, whole, **sampling)

"""A conversation that forgets thoughts goes on as one run over what it remembers, to the token."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load

from server.conversations.portable import read
from tests.parity.test_edits import say, tokens
from tests.server_process import ServerProcess

OPENING = "Assistant: <think"


@pytest.fixture(scope="module", params=["warm", "cold"])
def server(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[ServerProcess]:
    """A server whose engine remembers every state, or none but those in the store."""
    directory = tmp_path_factory.mktemp("thoughts") / "data"
    num_states = 100 if request.param == "warm" else 1
    options = ("--template", "g1", "--hot-state-bytes", str(num_states * 13_824))
    with ServerProcess(tiny_model, directory, *options) as process:
        yield process


def answer_to(server: ServerProcess, prompt: str, seed: int) -> list[int]:
    """What a run without any conversation writes after `prompt`."""
    body = {"prompt": list(prompt.encode()), "max_tokens": 12, "seed": seed, "return_token_ids": True}
    body |= {"stop": ["\n\nUser:", "\nUser:", "\n\nSystem:"]}
    token_ids: list[int] = server.http.post("/v1/completions", json=body).json()["choices"][0]["token_ids"]
    return token_ids


def test_what_is_forgotten_leaves_no_trace_in_the_state(server: ServerProcess) -> None:
    """A model of random weights never ends its thought, so each of its answers is remembered as nothing.

    Held turn by turn, with a kill in between, every answer is that of a run over the remembered text; a turn that is
    to be remembered whole is.
    """
    name, told = uuid.uuid4().hex, ""
    for seed, line in enumerate(["One line.", "Another.", "A third."]):
        told += ("\n\n" if told else "") + f"User: {line}\n\n"
        reply = say(server, name, line, seed=seed, keep_reasoning=False)
        assert tokens(reply) == answer_to(server, told + OPENING, seed)
        assert reply["usage"]["completion_tokens"] == len(tokens(reply)) > 0
        told += "Assistant:"
        if seed == 1:
            server.restart()
    kept = say(server, name, "Keep it.", seed=7)
    told += "\n\nUser: Keep it.\n\n" + OPENING
    assert tokens(kept) == answer_to(server, told, 7)
    body = list(told.encode()) + tokens(kept) + list(f"\n\nUser: On.\n\n{OPENING}".encode())
    last = server.http.post(
        "/v1/completions",
        json={"prompt": body, "max_tokens": 12, "seed": 8, "return_token_ids": True, "stop": ["\nUser:"]},
    ).json()
    assert tokens(say(server, name, "On.", seed=8)) == last["choices"][0]["token_ids"]


def test_the_state_is_that_of_a_conversation_in_which_nothing_was_thought(server: ServerProcess) -> None:
    """To the byte, as two exported files have it: one turn thought and forgot, the other never had a thought."""
    thoughtful, plain = uuid.uuid4().hex, uuid.uuid4().hex
    say(server, thoughtful, "One line.", seed=1, keep_reasoning=False)
    body = {"prompt": "User: One line.\n\nAssistant:", "max_tokens": 0, "conversation_id": plain}
    assert server.http.post("/v1/completions", json=body).status_code == 200
    files = [
        read(server.http.post(f"/v1/conversations/{name}/export", json={"include_state": True}).content)
        for name in (thoughtful, plain)
    ]
    first, second = (load(bytes(state)) for file in files if (state := file.state()) is not None)
    assert files[0].log.chain == files[1].log.chain
    assert first.keys() == second.keys()
    assert all(first[name].numpy().tobytes() == second[name].numpy().tobytes() for name in first)

"""Penalties are a function of the conversation: interrupted or restarted, it is penalised as if it never had been."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.config import EngineConfig
from engine.messages import SamplingParams
from engine.runner.model_runner import TorchModelRunner, load_runner
from engine.runner.plan import Chunk, StepPlan
from tests.server_process import ServerProcess

NUM_TURNS = 4
PENALTIES = {"presence_penalty": 0.6, "frequency_penalty": 0.9, "penalty_decay": 0.98}


@pytest.fixture(scope="module")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server over bytes."""
    with ServerProcess(tiny_model, tmp_path_factory.mktemp("penalties") / "data", "--dtype", "float32") as process:
        yield process


def say(server: ServerProcess, prompt: list[int], turn: int, **fields: Any) -> list[int]:
    """Return the tokens that one turn generates."""
    body = {"model": "test", "prompt": prompt, "seed": turn, "max_tokens": 30, "return_token_ids": True, **fields}
    response = server.http.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    token_ids: list[int] = response.json()["choices"][0]["token_ids"]
    return token_ids


def uninterrupted(runner: TorchModelRunner, prompts: list[list[int]], **penalties: float) -> list[list[int]]:
    """Return what each turn generates in one slot that nobody else has in between: its counters are never reset."""
    runner.start(0)
    outputs: list[list[int]] = []
    pending: list[int] = []
    position = 0
    for turn, prompt in enumerate(prompts):
        pending = pending + prompt
        position += len(prompt)
        sampling = SamplingParams(seed=turn, **penalties)  # type: ignore[arg-type]
        output: list[int] = []
        for _ in range(30):
            (row,) = runner.step(StepPlan([Chunk(0, pending, sampling=sampling, position=position)])).chunks
            assert row.token_id is not None
            output.append(row.token_id)
            pending = [row.token_id]
            position += 1
        outputs.append(output)
    return outputs


def test_a_conversation_counts_as_one_run_does(server: ServerProcess, tiny_model: Path) -> None:
    """Presence, frequency and decay go on where the last turn left them, also in a server that was killed meanwhile."""
    prompts = [list(f"Line {turn}: ".encode()) for turn in range(NUM_TURNS)]
    turns = []
    for turn, prompt in enumerate(prompts):
        if turn == 2:
            server.restart()
        turns.append(say(server, prompt, turn, conversation_id="counted", **PENALTIES))
    config = EngineConfig(model_path=str(tiny_model), dtype="float32", num_threads=1)
    assert turns == uninterrupted(load_runner(config, lambda model: ()), prompts, **PENALTIES)

    history = [token_id for turn in (0, 1) for token_id in (*prompts[turn], *turns[turn])]
    assert say(server, history + prompts[2], 2, **PENALTIES) != turns[2], "nothing was counted"


def test_repetition_counts_the_same_after_a_restart(server: ServerProcess) -> None:
    """What the conversation generated before weighs on each turn, whoever serves it."""
    prompts = [list(f"Line {turn}: ".encode()) for turn in range(NUM_TURNS)]
    never = [
        say(server, prompt, turn, conversation_id="never", repetition_penalty=3.0)
        for turn, prompt in enumerate(prompts)
    ]
    killed = []
    for turn, prompt in enumerate(prompts):
        server.restart()
        killed.append(say(server, prompt, turn, conversation_id="killed", repetition_penalty=3.0))
    assert killed == never
    plain = say(server, [*prompts[0], *never[0], *prompts[1]], 1)
    assert never[1] != plain, "nothing was penalised"

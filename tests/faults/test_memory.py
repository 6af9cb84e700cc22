"""The model that ships with the server remembers what it was told, and a killed server makes no difference."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from server.settings import DEFAULT_MODEL
from tests.server_process import ServerProcess

TOLD = ("Hello!", "My name is Ada.", "I have a cat called Pixel.", "My favourite colour is teal.", "How are you today?")
ASKED = {"What is my name?": "Ada", "What is my cat called?": "Pixel", "What is my favourite colour?": "teal"}


def say(server: ServerProcess, line: str, conversation_id: str) -> tuple[str, str]:
    """Run one greedy turn; returns the answer and how the state before it was obtained."""
    body = {"messages": [{"role": "user", "content": line}], "temperature": 0, "max_tokens": 60}
    response = server.http.post("/v1/chat/completions", json={**body, "conversation_id": conversation_id})
    assert response.status_code == 200, response.text
    reply = response.json()
    return reply["choices"][0]["message"]["content"], reply["conversation"]["resume"]


@pytest.mark.skipif(not (DEFAULT_MODEL / "model.safetensors").is_file(), reason="the default model is not here")
def test_what_was_told_before_a_kill_is_recalled_after_it(store_options: Sequence[str], tmp_path: Path) -> None:
    """Name, pet and colour are recalled at temperature 0 by another process, word for word as without the kill."""
    with ServerProcess(DEFAULT_MODEL, tmp_path / "data", *store_options) as server:
        lines = [*TOLD, *ASKED]
        expected = [say(server, line, "calm")[0] for line in lines]
        answers = [say(server, line, "killed")[0] for line in TOLD]
        server.restart()
        resumed = [say(server, line, "killed") for line in ASKED]
        answers += [answer for answer, _ in resumed]
    assert resumed[0][1] in ("restored", "replayed")
    assert answers == expected
    for (answer, _), fact in zip(resumed, ASKED.values(), strict=True):
        assert fact in answer

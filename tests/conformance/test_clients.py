"""Frameworks that people put before an OpenAI server, unmodified: what they rely on is there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conformance.environment import PIP_SECONDS, Environment, Unavailable
from tests.conformance.openai_suite import VERSION
from tests.server_process import ServerProcess

CLIENTS = Path(__file__).parent / "clients"
REQUIREMENTS = (f"openai=={VERSION}", "openai-agents==0.24.0", "langchain-openai==1.7.4")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(PIP_SECONDS + 120)]


@pytest.fixture(scope="module")
def environment() -> Environment:
    """Where the frameworks are installed; skips the test where they cannot be."""
    try:
        return Environment("clients", REQUIREMENTS)
    except Unavailable as error:
        pytest.skip(f"the frameworks cannot be fetched: {error}")


@pytest.fixture(scope="module")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A server with the byte vocabulary."""
    with ServerProcess(tiny_model, tmp_path_factory.mktemp("clients") / "data", "--dtype", "float32") as process:
        yield process


def told_by(environment: Environment, server: ServerProcess, script: str) -> dict[str, Any]:
    """Run one of the clients against the server and return what it has seen."""
    said = environment.run(script, f"{server.url}/v1", cwd=CLIENTS, timeout_seconds=100)
    last = said.strip().splitlines()[-1]
    assert last.startswith("{"), said
    told: dict[str, Any] = json.loads(last)
    return told


def test_agents_keep_their_sessions_here(environment: Environment, server: ServerProcess) -> None:
    """Sessions keep items; a chain and a conversation go on from the state of their first turn, to equal answers."""
    told = told_by(environment, server, "agents_client.py")
    assert told["chain"] == told["conversation"]
    assert told["session"][0] == told["chain"][0]  # afterwards a session sends its history as text
    assert told["session_roles"] == ["user", "assistant", "user", "assistant"]
    assert told["session_roles_after_pop"] == ["user", "assistant", "user"]
    assert told["chain_cached"] == told["chain_known"]
    assert told["conversation_cached"] == told["conversation_known"]
    assert "raw_response_event" in told["events"]


def test_langchain_goes_on_from_a_response(environment: Environment, server: ServerProcess) -> None:
    """By its id or by the package's own switch the history costs nothing; a stream says the same as the whole."""
    told = told_by(environment, server, "langchain_client.py")
    for way in ("by_hand", "by_switch"):
        first, second = told[way]
        assert second["cached"] == first["total"]
    assert told["answers"] == told["switched_answers"]
    assert told["streamed"] == told["answers"][0]

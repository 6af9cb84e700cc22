"""Load on the real server with a real model: conversations are kept, and every promise with them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loadtest.generator import LoadGenerator
from loadtest.options import Options, Span
from loadtest.statistics import Summary, summarize
from tests.server_process import ServerProcess


@pytest.fixture(scope="module")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A running server."""
    with ServerProcess(tiny_model, tmp_path_factory.mktemp("load") / "data") as process:
        yield process


async def load(server: ServerProcess, **changes: Any) -> Summary:
    """Return the summary of a short load test."""
    lengths = {"conversation_turns": Span(3, 3), "prompt_words": Span(2, 6), "max_tokens": Span(2, 12)}
    limits = {"users": 4, "max_turns": 24, "duration_seconds": 60.0}
    return summarize(await LoadGenerator(Options(url=server.url, **(lengths | limits | changes))).run())


async def test_conversations_go_on_where_they_stopped(server: ServerProcess) -> None:
    """Under load from several users every turn succeeds, continues its own conversation, and keeps every promise."""
    summary = await load(server)
    assert (summary.errors, summary.violations) == ({}, {})
    assert summary.turns == 24
    assert summary.resumes["new"] == summary.conversations
    assert sum(summary.resumes.values()) == 24


async def test_an_open_loop_of_conversations(server: ServerProcess) -> None:
    """Conversations that arrive at random, and are deleted when they are over, keep every promise too."""
    summary = await load(server, rate=20.0, max_turns=18, delete=True)
    assert (summary.errors, summary.violations) == ({}, {})
    assert summary.turns == 18


async def test_a_kept_conversation_sends_only_what_is_new(server: ServerProcess) -> None:
    """The bytes of a turn do not grow with the conversation when the server keeps it; resending history they do."""
    kept = (await load(server, users=1, max_turns=6, conversation_turns=Span(6, 6))).by_turn
    resent = (await load(server, users=1, max_turns=6, conversation_turns=Span(6, 6), history="client")).by_turn
    assert resent[-1].mean_request_bytes > resent[0].mean_request_bytes * 1.5
    assert kept[-1].mean_request_bytes < kept[0].mean_request_bytes * 1.5
    assert resent[-1].mean_prompt_tokens > kept[-1].mean_prompt_tokens

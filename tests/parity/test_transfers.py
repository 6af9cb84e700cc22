"""A conversation that was exported and imported elsewhere goes on as if it had never moved."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.talk import LINES, say
from tests.redis_server import RedisServer
from tests.server_process import ServerProcess, redis_options


def export(server: ServerProcess, conversation_id: str, **body: Any) -> bytes:
    """Return a conversation as a file."""
    response = server.http.post(f"/v1/conversations/{conversation_id}/export", json=body)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/vnd.sostenuto.conversation"
    return response.content


def import_file(server: ServerProcess, file: bytes, **params: Any) -> dict[str, Any]:
    """Take a file in; returns the conversation."""
    response = server.http.post("/v1/conversations/import", content=file, params=params)
    assert response.status_code == 200, response.text
    conversation: dict[str, Any] = response.json()
    return conversation


def items(server: ServerProcess, conversation_id: str) -> list[dict[str, Any]]:
    """What was said, in order."""
    data: list[dict[str, Any]] = server.http.get(
        f"/v1/conversations/{conversation_id}/items", params={"order": "asc", "limit": 100}
    ).json()["data"]
    return data


@pytest.fixture(scope="module")
def on_files(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server with the embedded stores."""
    with ServerProcess(tiny_model, tmp_path_factory.mktemp("files") / "data") as server:
        yield server


@pytest.fixture(scope="module")
def on_redis(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server with ledger and states in Redis."""
    directory = tmp_path_factory.mktemp("redis")
    with (
        RedisServer(directory / "redis") as redis,
        ServerProcess(tiny_model, directory / "data", *redis_options(redis.url)) as server,
    ):
        yield server


@pytest.mark.parametrize("include_state", [True, False])
@pytest.mark.parametrize("back", [False, True], ids=["files to redis", "redis to files"])
def test_moved_to_another_server_it_says_the_same(
    on_files: ServerProcess, on_redis: ServerProcess, include_state: bool, back: bool
) -> None:
    """Tokens, items and versions; restored from the state that came along, replayed without."""
    origin, other = (on_redis, on_files) if back else (on_files, on_redis)
    name = f"moved-{include_state}-{back}"  # said first: another test must not leave its states to this one
    for seed, line in enumerate((name, *LINES[:2])):
        say(origin, line, name, seed)
    file = export(origin, name, include_state=include_state)
    conversation = import_file(other, file)
    there = conversation["id"]
    assert conversation["version"] == 3
    assert items(other, there) == items(origin, name)
    for seed, line in enumerate(LINES[2:4], start=3):
        here, moved = say(origin, line, name, seed), say(other, line, there, seed)
        assert moved.token_ids == here.token_ids
        assert moved.version == here.version
        if seed == 3:
            assert moved.resume == ("restored" if include_state else "replayed")


def test_an_export_after_edits_goes_on_like_the_original(on_files: ServerProcess, on_redis: ServerProcess) -> None:
    """Gone back, an item taken back, one added; and an earlier version exports what led to it."""
    name = "edited"
    for seed, line in enumerate(("Edits.", *LINES[:3])):
        say(on_files, line, name, seed)
    on_files.http.post(f"/v1/conversations/{name}/rewind", json={"version": 3})
    on_files.http.delete(f"/v1/conversations/{name}/items/{items(on_files, name)[2]['id']}")
    on_files.http.post(f"/v1/conversations/{name}/items", json={"items": [{"role": "user", "content": "Added."}]})
    there = import_file(on_redis, export(on_files, name, include_state=True))["id"]
    assert items(on_redis, there) == items(on_files, name)
    earlier = import_file(on_redis, export(on_files, name, include_state=True, version=2))
    assert earlier["version"] == 2
    assert [item["role"] for item in items(on_redis, earlier["id"])] == ["user", "assistant"] * 2
    assert say(on_files, "On.", name, 9).token_ids == say(on_redis, "On.", there, 9).token_ids


def test_a_state_that_is_nowhere_is_computed_for_an_export(
    tiny_model: Path, tmp_path: Path, on_redis: ServerProcess
) -> None:
    """After a restart without any checkpoint: the file has it all the same, and so has the next."""
    with ServerProcess(tiny_model, tmp_path / "data") as server:
        for seed, line in enumerate(("Lost.", *LINES[:2])):
            say(server, line, "lost", seed)
        server.stop()
        shutil.rmtree(tmp_path / "data" / "states")
        server.start()
        there = import_file(on_redis, export(server, "lost", include_state=True))["id"]
        moved, here = say(on_redis, "On.", there, 9), say(server, "On.", "lost", 9)
        assert moved.token_ids == here.token_ids
        assert moved.resume == "restored"

"""Exports and imports over HTTP: what is refused, whose a conversation becomes, that a refusal leaves nothing."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.weights.synthetic import save_synthetic
from tests.server.conftest import OPTIONS
from tests.server.replies import error_of
from tests.server.test_tenants import client_with
from tests.server_process import ServerProcess

KEYS = '[ada]\nkey = "ada"\n[bob]\nkey = "bob"\n'


def turn(client: httpx.Client, conversation_id: str, text: str) -> dict[str, Any]:
    """Run a short turn."""
    body = {"prompt": text, "max_tokens": 6, "conversation_id": conversation_id, "seed": 3, "return_token_ids": True}
    reply: dict[str, Any] = client.post("/v1/completions", json=body).raise_for_status().json()
    return reply


def export(client: httpx.Client, conversation_id: str, **body: Any) -> bytes:
    """Return a conversation as a file."""
    return client.post(f"/v1/conversations/{conversation_id}/export", json=body).raise_for_status().content


def import_file(client: httpx.Client, file: bytes, **params: Any) -> httpx.Response:
    """Take a file in."""
    return client.post("/v1/conversations/import", content=file, params=params)


@pytest.fixture(scope="module")
def file(server: ServerProcess) -> bytes:
    """A conversation of two turns, with its state."""
    name = f"exported-{uuid.uuid4().hex}"
    server.http.post("/v1/conversations", json={"id": name, "metadata": {"a": "b"}})
    for text in ("Hello.", " And on."):
        turn(server.http, name, text)
    return export(server.http, name, include_state=True)


def is_free(client: httpx.Client, name: str) -> bool:
    """Say whether nothing was created."""
    return client.get(f"/v1/conversations/{name}").status_code == 404


def test_a_file_is_a_download(http: httpx.Client) -> None:
    """With a name and a type of its own."""
    turn(http, "to.download", "x")
    response = http.post("/v1/conversations/to.download/export", json={})
    assert response.headers["content-type"] == "application/vnd.sostenuto.conversation"
    assert response.headers["content-disposition"] == 'attachment; filename="to.download.sostenuto"'


def test_an_import_is_described_like_any_conversation(http: httpx.Client, file: bytes) -> None:
    """Under the id that was asked for, once."""
    made = import_file(http, file, id="imported")
    assert made.status_code == 200
    assert (made.json()["id"], made.json()["version"], made.json()["metadata"]) == ("imported", 2, {"a": "b"})
    assert made.headers["etag"] == '"2"'
    assert http.get("/v1/conversations/imported").json() == made.json()
    again = import_file(http, file, id="imported")
    assert again.status_code == 409
    assert error_of(again)["code"] == "conversation_exists"


def test_an_empty_conversation_travels_too(http: httpx.Client) -> None:
    """It has no state, asked for or not."""
    http.post("/v1/conversations", json={"id": "empty", "items": [{"role": "user", "content": "Well."}]})
    made = import_file(http, export(http, "empty", include_state=True)).json()
    assert (made["version"], made["num_tokens"]) == (1, 0)
    listed = http.get(f"/v1/conversations/{made['id']}/items").json()["data"]
    assert [item["content"][0]["text"] for item in listed] == ["Well."]


@settings(max_examples=40, suppress_health_check=list(HealthCheck), database=None)
@given(data=st.data())
def test_whatever_is_altered_nothing_is_created(server: ServerProcess, file: bytes, data: st.DataObject) -> None:
    """One byte anywhere, or the rest of the file."""
    place = data.draw(st.integers(0, len(file) - 1), "place")
    if data.draw(st.booleans(), "cut"):
        altered = file[:place]
    else:
        altered = file[:place] + bytes([file[place] ^ data.draw(st.integers(1, 255))]) + file[place + 1 :]
    response = import_file(server.http, altered, id="altered")
    assert response.status_code == 400
    assert error_of(response)["code"] == "invalid_export"
    assert is_free(server.http, "altered")


def sealed(file: bytes, change: Callable[[dict[str, Any], bytearray], object]) -> bytes:
    """The file with another log or state, under digests that fit."""
    size = int.from_bytes(file[12:20], "little")
    log, state = json.loads(file[20 : 20 + size]), bytearray(file[20 + size + 32 :])
    change(log, state)
    log["state"] = {"num_bytes": len(state), "sha256": hashlib.sha256(state).hexdigest()}
    text = json.dumps(log).encode()
    begin = file[:12] + len(text).to_bytes(8, "little") + text
    return begin + hashlib.sha256(begin).digest() + state


def flip(state: bytearray, place: int) -> None:
    """Alter one byte."""
    state[place] ^= 1


@pytest.mark.parametrize(
    "change",
    [
        lambda log, state: flip(state, -1),
        lambda log, state: flip(state, 0),
        lambda log, state: flip(state, 40),
        lambda log, state: state.pop(),
        lambda log, state: state.clear() or state.extend(b"no state"),
        lambda log, state: log["turns"].pop(),
    ],
    ids=["payload", "length", "header", "shorter", "another file", "of a longer log"],
)
def test_a_state_that_is_not_the_logs_is_refused(
    http: httpx.Client, file: bytes, change: Callable[[dict[str, Any], bytearray], object]
) -> None:
    """However well sealed; the log alone is taken when that is asked for, and replayed."""
    wrong = sealed(file, change)
    response = import_file(http, wrong, id="wrong-state")
    assert response.status_code == 400
    assert error_of(response)["code"] == "invalid_state"
    assert is_free(http, "wrong-state")
    name = import_file(http, wrong, without_state=True).json()["id"]
    assert turn(http, name, "On.")["conversation"]["resume"] in ("replayed", "hot")


def test_a_sealed_file_is_taken(http: httpx.Client, file: bytes) -> None:
    """It is not the sealing itself that is refused above."""
    assert import_file(http, sealed(file, lambda log, state: None)).status_code == 200


def test_a_state_cut_off_matters_only_to_who_wants_it(http: httpx.Client, file: bytes) -> None:
    """The log is under a digest of its own."""
    assert import_file(http, file[:-1], id="cut-off").status_code == 400
    assert import_file(http, file[:-1], id="cut-off", without_state=True).status_code == 200


def test_a_log_of_another_model_is_refused(server: ServerProcess, file: bytes, tmp_path: Path) -> None:
    """By the weights, not by the name."""
    other = save_synthetic(tmp_path / "other.safetensors", seed=77, dtype=torch.float32)
    with ServerProcess(other, tmp_path / "data", *OPTIONS, "--state-url", "memory:") as process:
        response = import_file(process.http, file, id="foreign")
        assert response.status_code == 409
        assert error_of(response)["code"] == "model_mismatch"
        assert is_free(process.http, "foreign")
        # States in the engine's memory are nobody else's; a log is.
        turn(process.http, "own", "x")
        refused = process.http.post("/v1/conversations/own/export", json={"include_state": True})
        assert (refused.status_code, error_of(refused)["code"]) == (400, "state_not_portable")
        assert import_file(process.http, export(process.http, "own")).status_code == 200


def test_what_is_not_there_cannot_be_exported(http: httpx.Client) -> None:
    """No conversation, no version, no field."""
    turn(http, "short", "x")
    assert http.post("/v1/conversations/nobody/export", json={}).status_code == 404
    assert http.post("/v1/conversations/short/export", json={"version": 2}).status_code == 404
    assert http.post("/v1/conversations/short/export", json={"with_state": True}).status_code == 400


@pytest.mark.parametrize("name", ["white space", "a/b", "x" * 129, "\n", "name\n", ""])
def test_an_import_needs_a_name_that_can_be_one(http: httpx.Client, file: bytes, name: str) -> None:
    """400, by name."""
    response = import_file(http, file, id=name)
    assert response.status_code == 400
    assert error_of(response)["param"] == "id"


@pytest.fixture(scope="module")
def shared(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server of two tenants that takes small bodies, and files that are not much larger."""
    directory = tmp_path_factory.mktemp("shared")
    (directory / "keys.toml").write_text(KEYS)
    options = ("--api-keys-file", str(directory / "keys.toml"), "--max-body-bytes", "2000")
    with ServerProcess(tiny_model, directory / "data", *OPTIONS, *options, "--max-import-bytes", "30000") as process:
        yield process


def test_a_conversation_can_be_handed_to_another_tenant(shared: ServerProcess) -> None:
    """It goes on with its state, among the new owner's; and a file may be larger than a body."""
    with client_with(shared, "ada") as ada, client_with(shared, "bob") as bob:
        turn(ada, "gift", "Hello.")
        file = export(ada, "gift", include_state=True)
        assert len(file) > 2000
        assert import_file(bob, file, id="received").status_code == 200
        assert ada.get("/v1/conversations/received").status_code == 404
        received, given = turn(bob, "received", "On."), turn(ada, "gift", "On.")
        assert received["choices"][0]["token_ids"] == given["choices"][0]["token_ids"]
        assert received["conversation"]["resume"] == "restored"
        assert import_file(ada, export(bob, "received", include_state=True), id="back").status_code == 200


def test_files_have_a_limit_of_their_own(shared: ServerProcess) -> None:
    """Told before they are read, and other bodies keep theirs."""
    with client_with(shared, "ada") as ada:
        assert import_file(ada, b"x" * 30_001).status_code == 413
        assert ada.post("/v1/completions", json={"prompt": "x" * 2000}).status_code == 413

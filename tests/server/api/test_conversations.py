"""`/v1/conversations`: begun, looked at, deleted; and what turns do to each other."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.server.replies import error_of


def turn(client: httpx.Client, conversation_id: str, **extra: Any) -> httpx.Response:
    """Run a short turn."""
    body = {"prompt": "x", "max_tokens": 2, "conversation": conversation_id, **extra}
    return client.post("/v1/completions", json=body)


def test_a_conversation_begins_without_turns(http: httpx.Client) -> None:
    """Version 0, an id of ours, the metadata it was given."""
    made = http.post("/v1/conversations", json={"metadata": {"a": "b"}}).json()
    assert made["id"].startswith("conv_")
    assert (made["object"], made["version"], made["metadata"]) == ("conversation", 0, {"a": "b"})
    assert http.get(f"/v1/conversations/{made['id']}").json() == made
    assert turn(http, made["id"]).json()["conversation"]["version"] == 1
    assert http.get(f"/v1/conversations/{made['id']}").json()["num_tokens"] == 3


def test_an_id_may_be_chosen_once(http: httpx.Client) -> None:
    """The second to choose it is told."""
    assert http.post("/v1/conversations", json={"id": "chosen"}).json()["id"] == "chosen"
    again = http.post("/v1/conversations", json={"id": "chosen"})
    assert again.status_code == 409
    assert error_of(again)["code"] == "conversation_exists"


@pytest.mark.parametrize(
    "body",
    [
        {"metadata": {str(n): "x" for n in range(17)}},
        {"metadata": {"k" * 65: "x"}},
        {"metadata": {"k": "x" * 513}},
        {"metadata": {"k": 1}},
        {"items": [{"role": "nobody", "content": "x"}]},
        {"id": "white space"},
        {"color": "blue"},
    ],
    ids=str,
)
def test_what_a_conversation_cannot_have_is_refused(http: httpx.Client, body: dict[str, Any]) -> None:
    """400, by name."""
    response = http.post("/v1/conversations", json=body)
    assert response.status_code == 400
    param = error_of(response)["param"]
    assert param is not None
    assert param.startswith(next(iter(body)))


def test_unknown_is_404_and_deleted_is_410(http: httpx.Client) -> None:
    """Nothing is silently begun anew, not even by the field that creates."""
    for response in (
        http.get("/v1/conversations/nobody"),
        http.delete("/v1/conversations/nobody"),
        turn(http, "nobody"),
    ):
        assert response.status_code == 404
        assert error_of(response)["code"] == "conversation_not_found"
    http.post("/v1/conversations", json={"id": "gone"})
    assert http.delete("/v1/conversations/gone").json() == {
        "id": "gone",
        "object": "conversation.deleted",
        "deleted": True,
    }
    by_name = http.post("/v1/completions", json={"prompt": "x", "max_tokens": 1, "conversation_id": "gone"})
    for response in (
        http.get("/v1/conversations/gone"),
        http.delete("/v1/conversations/gone"),
        turn(http, "gone"),
        by_name,
    ):
        assert response.status_code == 410
        assert error_of(response)["code"] == "conversation_expired"


def test_of_two_turns_at_once_one_is_told_to_wait(http: httpx.Client) -> None:
    """409 with Retry-After; the one that runs is not disturbed."""
    http.post("/v1/conversations", json={"id": "contested"})
    body = {"prompt": "x", "max_tokens": 6000, "conversation": "contested", "ignore_eos": True, "stream": True}
    with http.stream("POST", "/v1/completions", json=body) as running:
        lines = running.iter_lines()
        next(lines)
        refused = turn(http, "contested")
        assert refused.status_code == 409
        assert error_of(refused)["code"] == "conversation_locked"
        assert int(refused.headers["retry-after"]) >= 1
        assert list(lines)[-2:] == ["data: [DONE]", ""]
    assert http.get("/v1/conversations/contested").json()["version"] == 1


def test_turns_may_wait_for_each_other(http: httpx.Client) -> None:
    """With queue_ms, turns that come at once all run, one after another."""
    http.post("/v1/conversations", json={"id": "patient"})
    with ThreadPoolExecutor(4) as pool:
        replies = list(pool.map(lambda _: turn(http, "patient", queue_ms=30_000), range(4)))
    assert [reply.status_code for reply in replies] == [200] * 4
    assert sorted(reply.json()["conversation"]["version"] for reply in replies) == [1, 2, 3, 4]


@pytest.mark.parametrize("name", ["a%20b", "%00", "%ff", "x" * 129, "{}", "%F0%9F%98%80"])
def test_what_cannot_be_a_name_does_not_exist(http: httpx.Client, name: str) -> None:
    """404, without asking the ledger."""
    for method in ("GET", "DELETE"):
        assert http.request(method, f"/v1/conversations/{name}").status_code == 404

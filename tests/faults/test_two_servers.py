"""Two servers on one Redis: a conversation is at home on both, and never in two places at once."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.faults.talk import LINES, kill_while_streaming, say, streaming_turn, talk, turn_body, version
from tests.redis_server import RedisServer
from tests.server_process import ServerProcess, redis_options


@pytest.fixture
def pair(tiny_model: Path, tmp_path: Path, redis_server: RedisServer) -> Iterator[tuple[ServerProcess, ServerProcess]]:
    """Two running servers that share a Redis and nothing else."""
    options = redis_options(redis_server.url)
    with (
        ServerProcess(tiny_model, tmp_path / "first", *options) as first,
        ServerProcess(tiny_model, tmp_path / "second", *options) as second,
    ):
        yield first, second


def test_a_conversation_moves_freely(pair: tuple[ServerProcess, ServerProcess]) -> None:
    """Taking turns on two servers gives the tokens of one server, and each move is restored or replayed, never new."""
    replies = [say(pair[seed % 2], line, "moving", seed) for seed, line in enumerate(LINES)]
    expected = talk(pair[0], "at-home")  # afterwards: equal histories share a state, which would be hot
    assert [reply.token_ids for reply in replies] == [reply.token_ids for reply in expected]
    assert {reply.resume for reply in replies[1:]} <= {"restored", "replayed"}


def test_concurrent_turns_make_exactly_one_version_each(pair: tuple[ServerProcess, ServerProcess]) -> None:
    """Of turns that race for one conversation each version is won once; the others hear 409 with Retry-After."""

    def attempt(number: int) -> httpx.Response:
        body = turn_body(LINES[number % len(LINES)], "contested", number)
        return pair[number % 2].http.post("/v1/chat/completions", json=body)

    say(pair[0], LINES[0], "contested", 99)
    with ThreadPoolExecutor(8) as pool:
        responses = list(pool.map(attempt, range(16)))
    statuses = Counter(response.status_code for response in responses)
    assert set(statuses) <= {200, 409}
    won = sorted(r.json()["conversation"]["version"] for r in responses if r.status_code == 200)
    assert won == list(range(2, 2 + statuses[200]))
    for response in responses:
        if response.status_code == 409:
            assert float(response.headers["retry-after"]) > 0
            assert response.json()["error"]["code"] == "conversation_locked"
    assert version(pair[0], "contested") == version(pair[1], "contested") == 1 + statuses[200]


def test_a_killed_servers_conversation_is_taken_over(pair: tuple[ServerProcess, ServerProcess]) -> None:
    """While the dead server's lease lasts the conversation is busy; then the other server goes on with it."""
    first, second = pair
    expected = talk(second, "calm")
    say(first, LINES[0], "orphaned", 0)
    kill_while_streaming(first, turn_body(LINES[1], "orphaned", 1, max_tokens=8000, ignore_eos=True))
    body = turn_body(LINES[1], "orphaned", 1)
    busy = second.http.post("/v1/chat/completions", json=body)
    assert busy.status_code == 409
    assert 0 < float(busy.headers["retry-after"]) <= 15
    assert say(second, LINES[1], "orphaned", 1).token_ids == expected[1].token_ids
    assert version(second, "orphaned") == 2


def test_a_server_that_slept_through_its_lease_cannot_commit(pair: tuple[ServerProcess, ServerProcess]) -> None:
    """A frozen server whose conversation was taken over meanwhile ends its stream with an error and applies nothing."""
    first, second = pair
    say(first, LINES[0], "frozen", 0)
    body = turn_body(LINES[1], "frozen", 1, max_tokens=200, stop=[], ignore_eos=True)
    with streaming_turn(first, body) as events:
        next(events)
        first.pause()
        try:
            taken_over = say(second, LINES[2], "frozen", 2)
        finally:
            first.resume()
        rest = list(events)
    assert "error" in rest[-1], rest[-1]
    assert rest[-1]["error"]["code"] == "ownership_lost"
    assert taken_over.version == version(first, "frozen") == 2


def test_an_outage_of_redis_is_told_and_survived(
    pair: tuple[ServerProcess, ServerProcess], redis_server: RedisServer
) -> None:
    """With Redis gone stateful turns get 503 and stateless ones work; when it is back, the conversation continues."""
    expected = talk(pair[0], "steady", LINES[:2])
    say(pair[0], LINES[0], "outage", 0)
    time.sleep(1.1)  # the append-only file is synced once a second
    redis_server.kill()
    body = turn_body(LINES[1], "outage", 1)
    refused = pair[0].http.post("/v1/chat/completions", json=body)
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "store_unavailable"
    assert float(refused.headers["retry-after"]) > 0
    del body["conversation_id"]
    assert pair[0].http.post("/v1/chat/completions", json=body).status_code == 200
    redis_server.start()
    assert say(pair[0], LINES[1], "outage", 1).token_ids == expected[1].token_ids

"""Load over real sockets: what is sent, when, and what is made of what comes back."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from loadtest.client import ServerUnusable
from loadtest.generator import LoadGenerator, LoadRun
from loadtest.options import Options, Span
from tests.loadtest.stub_server import StubServer
from tests.redis_server import free_port


async def run(stub: StubServer, **changes: Any) -> LoadRun:
    """Run a small load test against `stub`."""
    settings: dict[str, Any] = {
        "users": 2,
        "max_turns": 6,
        "conversation_turns": Span(3, 3),
        "max_tokens": Span(4, 4),
        "duration_seconds": 30.0,
    }
    return await LoadGenerator(Options(url=stub.url, **(settings | changes))).run()


async def test_the_server_keeps_the_history(stub: StubServer) -> None:
    """With server history each turn sends its conversation's id and the new message only, and versions count up."""
    result = await run(stub, users=1)
    assert [record.error for record in result.records] == [None] * 6
    assert all(record.violations == [] for record in result.records)
    assert [record.version for record in result.records] == [1, 2, 3, 1, 2, 3]
    assert all(len(request["messages"]) == 1 for request in stub.requests)
    assert list(Counter(request["conversation_id"] for request in stub.requests).values()) == [3, 3]


async def test_the_client_keeps_the_history(stub: StubServer) -> None:
    """With client history each turn resends everything said, replies included, and names no conversation."""
    result = await run(stub, history="client", users=1, max_turns=3)
    assert [len(request["messages"]) for request in stub.requests] == [1, 3, 5]
    assert stub.requests[2]["messages"][1] == {"role": "assistant", "content": "one two three four "}
    assert all("conversation_id" not in request for request in stub.requests)
    sizes = [record.request_bytes for record in result.records]
    assert sizes[0] < sizes[1] < sizes[2]
    assert all(record.violations == [] for record in result.records)


async def test_what_is_asked_is_what_was_planned(stub: StubServer) -> None:
    """A request streams, asks for usage, and carries the plan's limit, the key and the first model listed."""
    await run(stub, users=1, max_turns=1, api_key="k", temperature=0.5, ignore_eos=True)
    (request,) = stub.requests
    assert request["model"] == "stub-model"
    assert request["stream"] is True
    assert request["stream_options"] == {"include_usage": True}
    assert (request["max_tokens"], request["temperature"], request["ignore_eos"]) == (4, 0.5, True)
    assert stub.headers[0]["authorization"] == "Bearer k"


async def test_the_same_seed_sends_the_same_words(stub: StubServer) -> None:
    """Two runs with one seed ask for the same, in conversations of their own."""
    await run(stub, users=1, max_turns=3)
    await run(stub, users=1, max_turns=3)
    first, second = stub.requests[:3], stub.requests[3:]
    assert [request["messages"] for request in first] == [request["messages"] for request in second]
    assert first[0]["conversation_id"] != second[0]["conversation_id"]


async def test_known_delays_are_measured(stub: StubServer) -> None:
    """Latencies are at least the server's delays, and there is a gap between each two tokens."""
    stub.behaviour.first_token_seconds = 0.05
    stub.behaviour.token_seconds = 0.02
    result = await run(stub, users=1, max_turns=1)
    (record,) = result.records
    assert record.ttft_seconds is not None
    assert record.ttft_seconds >= 0.05
    assert len(record.token_gaps) == 3
    assert sum(record.token_gaps) >= 0.02
    assert record.turn_seconds >= 0.05 + 4 * 0.02


async def test_an_open_loop_counts_the_wait_for_a_connection(stub: StubServer) -> None:
    """Turns that arrive faster than the server answers wait, and their waiting is part of their latency."""
    stub.behaviour.first_token_seconds = 0.1
    one_turn = Span(1, 1)
    result = await run(stub, rate=1000.0, max_turns=5, conversation_turns=one_turn, max_in_flight=1)
    waits = sorted(record.ttft_seconds or 0.0 for record in result.records)
    last_arrival = max(record.intended_start for record in result.records)
    assert stub.most_at_once == 1
    assert waits[-1] >= 5 * 0.1 - last_arrival
    assert max(record.start_delay_seconds or 0.0 for record in result.records) >= 4 * 0.1 - last_arrival


async def test_an_open_loop_does_not_wait_for_the_server(stub: StubServer) -> None:
    """All conversations that arrive within the first reply's delay are on the wire together."""
    stub.behaviour.first_token_seconds = 1.0
    await run(stub, rate=1000.0, max_turns=8, conversation_turns=Span(1, 1))
    assert stub.most_at_once == 8


async def test_a_closed_loop_has_a_turn_a_user_at_most(stub: StubServer) -> None:
    """N users never have more than N turns on the wire."""
    stub.behaviour.first_token_seconds = 0.02
    await run(stub, users=3, max_turns=12)
    assert len(stub.requests) == 12
    assert stub.most_at_once <= 3


async def test_a_refused_turn_ends_its_conversation(stub: StubServer) -> None:
    """A refusal is counted by status and code, and the user goes on with another conversation."""
    stub.behaviour.refuse = lambda number: (503, "queue_full") if number == 2 else None
    result = await run(stub, users=1, max_turns=4)
    assert [record.error for record in result.records] == [None, "http_503:queue_full", None, None]
    assert [record.conversation for record in result.records] == [0, 0, 1, 1]


async def test_a_connection_that_breaks_is_not_a_broken_promise(stub: StubServer) -> None:
    """A reply cut off by the network is an error; one that ends in order but too soon breaks a promise."""
    stub.behaviour.break_after = 3
    result = await run(stub, users=1, max_turns=1)
    assert [(record.error, record.violations) for record in result.records] == [("broken_stream", [])]
    stub.behaviour.break_after = None
    stub.behaviour.done = False
    result = await run(stub, users=1, max_turns=1)
    assert [(record.error, record.violations) for record in result.records] == [(None, ["no_done"])]


async def test_a_slow_turn_times_out(stub: StubServer) -> None:
    """A turn longer than --timeout has failed."""
    stub.behaviour.first_token_seconds = 5.0
    result = await run(stub, users=1, max_turns=1, timeout_seconds=0.1)
    assert [record.error for record in result.records] == ["timeout"]


async def test_the_end_cuts_off_what_still_runs(stub: StubServer) -> None:
    """After duration and grace a running turn is cut off and said to be unfinished."""
    stub.behaviour.first_token_seconds = 20.0
    result = await run(stub, users=2, max_turns=None, duration_seconds=0.1, grace_seconds=0.1)
    assert [record.error for record in result.records] == ["unfinished", "unfinished"]
    assert result.elapsed_seconds < 15.0


async def test_no_turn_begins_after_the_duration(stub: StubServer) -> None:
    """The run is bounded by its duration: every turn was meant to start before it."""
    result = await run(stub, users=2, max_turns=None, duration_seconds=0.3, think_seconds=0.05)
    assert result.records
    assert all(record.intended_start <= 0.3 for record in result.records)
    assert all(record.error is None for record in result.records)


async def test_an_interrupt_ends_in_order(stub: StubServer) -> None:
    """stop() lets the running turns finish and begins no more."""
    options = Options(url=stub.url, users=2, duration_seconds=60.0)
    generator = LoadGenerator(options, on_turn=lambda run, record: generator.stop())
    result = await generator.run()
    assert [record.error for record in result.records] == [None] * len(result.records)
    assert 1 <= len(result.records) <= 2


async def test_conversations_are_deleted_on_request(stub: StubServer) -> None:
    """With --delete every conversation is deleted after its last turn."""
    await run(stub, users=1, max_turns=6, delete=True)
    assert stub.deleted == list(dict.fromkeys(request["conversation_id"] for request in stub.requests))
    assert len(stub.deleted) == 2


async def test_a_server_that_is_not_there_is_said_at_once() -> None:
    """Without a server the run ends before its first turn, with the address in the message."""
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(ServerUnusable, match=url):
        await LoadGenerator(Options(url=url)).run()


async def test_a_server_that_goes_away_is_an_error_of_each_turn() -> None:
    """Turns that cannot connect fail one by one; the run goes on to its end."""
    url = f"http://127.0.0.1:{free_port()}"
    options = Options(url=url, model="m", users=1, max_turns=2, conversation_turns=Span(1, 1))
    result = await LoadGenerator(options).run()
    assert [record.error for record in result.records] == ["connect", "connect"]

"""What a streamed reply tells: its times, its tokens, and every promise it breaks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest

from loadtest.reply import StreamedReply, TurnRecord

CONVERSATION = {"id": "c", "version": 3, "parent_version": 2, "resume": "hot"}


def chunk(**parts: Any) -> dict[str, Any]:
    """Return one event of a reply."""
    return {"id": "chatcmpl-1", "choices": [], **parts}


def text(content: str) -> dict[str, Any]:
    """Return an event that delivers text."""
    return chunk(choices=[{"index": 0, "delta": {"content": content}, "finish_reason": None}])


def finish(reason: str = "stop") -> dict[str, Any]:
    """Return the event that ends the choice."""
    return chunk(choices=[{"index": 0, "delta": {}, "finish_reason": reason}])


def usage(output: int = 2, total: int = 7) -> dict[str, Any]:
    """Return the usage event, with the conversation's."""
    counts = {"prompt_tokens": 5, "completion_tokens": output, "total_tokens": total}
    return chunk(usage=counts | {"prompt_tokens_details": {"cached_tokens": 3}}, conversation=CONVERSATION)


WHOLE = (text("a"), text("b"), finish(), usage(), "[DONE]")


def read(events: Sequence[object], *, max_tokens: int = 8, previous_version: int | None = 2) -> TurnRecord:
    """Return the record of a reply made of `events`, one a second from second 10 on."""
    record = TurnRecord(conversation=0, turn=1, intended_start=8.0)
    reply = StreamedReply(record, max_tokens=max_tokens, previous_version=previous_version)
    for idx, event in enumerate(events):
        data = event if isinstance(event, str) else json.dumps(event)
        reply.feed(f"data: {data}\n\n".encode(), 10.0 + idx)
    reply.finish()
    record.end = 10.0 + len(events)
    return record


def test_times_count_from_the_intended_start() -> None:
    """Time to first token, gaps, and the whole turn come from the times at which bytes arrived."""
    record = read(WHOLE)
    assert record.ttft_seconds == 2.0
    assert record.token_gaps == [1.0]
    assert record.seconds_per_token == 1.0
    assert record.turn_seconds == 7.0


def test_a_whole_reply_breaks_no_promise() -> None:
    """Tokens, version, resume and finish reason are read off a reply with nothing to complain about."""
    record = read(WHOLE)
    assert (record.violations, record.error) == ([], None)
    assert (record.prompt_tokens, record.cached_tokens, record.output_tokens) == (5, 3, 2)
    assert (record.version, record.resume, record.finish_reason) == (3, "hot", "stop")


def test_a_role_alone_is_no_token() -> None:
    """The first event, which has a role and empty text, does not count as the first token."""
    role = chunk(choices=[{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}])
    assert read((role, *WHOLE)).ttft_seconds == 3.0


@pytest.mark.parametrize(
    ("events", "promise"),
    [
        (WHOLE[:-1], "no_done"),
        ((*WHOLE, finish()), "event_after_done"),
        ((text("a"), usage(), "[DONE]"), "no_finish_reason"),
        ((finish(), *WHOLE), "second_finish_reason"),
        ((finish(), text("a"), usage(), "[DONE]"), "text_after_finish"),
        ((text("a"), finish(), chunk(conversation=CONVERSATION), "[DONE]"), "no_usage"),
        ((text("a"), finish(), usage(total=9), "[DONE]"), "usage_does_not_add_up"),
        ((text("a"), finish(), usage(9, 14), "[DONE]"), "output_exceeds_max_tokens"),
        ((text("a") | {"id": "chatcmpl-2"}, *WHOLE), "id_changes"),
        (("{", *WHOLE), "event_is_not_json"),
        (("7", *WHOLE), "event_is_not_json"),
    ],
)
def test_a_broken_promise_is_named(events: Sequence[object], promise: str) -> None:
    """Each thing a reply must do is missed when it does not."""
    assert promise in read(events).violations


@pytest.mark.parametrize(
    ("conversation", "promises"),
    [
        (None, ["no_conversation"]),
        ({"version": 4}, ["version_not_consecutive"]),
        ({"version": 2}, ["version_not_consecutive"]),
        ({"parent_version": 1}, ["wrong_parent_version"]),
        ({"resume": "new"}, ["wrong_resume"]),
    ],
)
def test_a_conversation_must_go_on_from_where_it_was(conversation: dict[str, Any] | None, promises: list[str]) -> None:
    """Versions are consecutive, point to their parent, and only the first turn begins anew."""
    last = usage() | {"conversation": conversation and CONVERSATION | conversation}
    assert read((text("a"), finish(), last, "[DONE]")).violations == promises


def test_a_first_turn_must_begin_anew() -> None:
    """Version 1 has no parent and resumes from nothing."""
    first = usage() | {"conversation": {"version": 1, "parent_version": None, "resume": "new"}}
    assert read((text("a"), finish(), first, "[DONE]"), previous_version=0).violations == []
    odd = usage() | {"conversation": {"version": 1, "parent_version": 0, "resume": "hot"}}
    assert read((text("a"), finish(), odd, "[DONE]"), previous_version=0).violations == ["wrong_resume"]


def test_without_server_history_no_conversation_is_expected() -> None:
    """A client that resends history asks for no conversation and misses none."""
    bare = usage() | {"conversation": None}
    assert read((text("a"), finish(), bare, "[DONE]"), previous_version=None).violations == []


def test_an_error_in_the_stream_is_an_error_and_nothing_else() -> None:
    """A turn that failed in the middle is counted by its code, and not also for what is missing after it."""
    record = read(
        (text("a"), {"error": {"message": "m", "type": "server_error", "param": None, "code": "engine_error"}})
    )
    assert record.error == "stream:engine_error"
    assert record.violations == []

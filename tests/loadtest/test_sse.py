"""Server-sent events out of bytes, however these are cut."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from loadtest.sse import EventParser


def parse(*pieces: bytes) -> list[bytes]:
    """Return the events of one stream cut into `pieces`."""
    parser = EventParser()
    return [event for piece in pieces for event in parser.feed(piece)]


def test_events_end_at_an_empty_line() -> None:
    """Only what an empty line closes is an event; comments and other fields are not data."""
    stream = b': ping\n\nevent: message\nid: 1\ndata: {"a": 1}\n\ndata:[DONE]\n\ndata: cut off\n'
    assert parse(stream) == [b'{"a": 1}', b"[DONE]"]


def test_data_lines_of_one_event_are_joined() -> None:
    """Several data lines are one event with line ends between; only one space after the colon is dropped."""
    assert parse(b"data: a\ndata:  b\ndata\n\n") == [b"a\n b\n"]


def test_a_line_end_cut_in_two_is_one_line_end() -> None:
    r"""A `\r` at the end of one read and the `\n` at the start of the next do not make an empty line."""
    assert parse(b"data: a\r", b"\ndata: b\r", b"\n\r", b"\n") == [b"a\nb"]


@settings(deadline=None)
@given(
    events=st.lists(st.text(st.characters(exclude_characters="\r\n", codec="utf-8")), max_size=6),
    line_end=st.sampled_from([b"\n", b"\r\n", b"\r"]),
    cuts=st.lists(st.integers(0, 400), max_size=30),
)
def test_cutting_changes_nothing(events: list[str], line_end: bytes, cuts: list[int]) -> None:
    """Any way to cut a stream gives the events of the whole, inside a UTF-8 character too."""
    data = [event.encode() for event in events]
    stream = b"".join(b"data: " + event + line_end * 2 for event in data) + b": end" + line_end * 2
    bounds = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    pieces = [stream[start:end] for start, end in itertools.pairwise(bounds)]
    assert parse(*pieces) == data

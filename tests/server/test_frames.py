"""Frames: what a template fills in is what rendering anew would have said, whatever the text."""

from __future__ import annotations

import json

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from server.frames import FrameTemplate, frame


class Chunk(msgspec.Struct):
    """A chunk that says its text between other things."""

    before: str
    text: str
    after: dict[str, int]


def render(text: str) -> bytes:
    """Render a chunk anew."""
    return frame(Chunk('"text":"', text, {"text": 1}))


TEMPLATE = FrameTemplate(render)


@given(st.text(st.characters(exclude_categories=["Cs"])))
@example('quotes " and \\ and / and \\" again')
@example("".join(map(chr, range(0xA0))))
@example("line\nends\r\n\x0b\x0c\x85\u2028\u2029 and event: x\n\ndata: y\n\n")
@example("😀👩‍👩‍👧‍👦🏳️‍🌈 \U0010ffff \ufffd \ufeff")
@example("%b %s %(x)s {} {0}")
def test_a_filled_template_is_a_frame(text: str) -> None:
    """The same bytes, one event, and any parser reads the text back."""
    filled = TEMPLATE.fill(text)
    assert filled == render(text)
    assert filled.count(b"\n") == 2
    assert filled.endswith(b"\n\n")
    assert json.loads(filled.removeprefix(b"data: "))["text"] == text


def test_a_frame_may_have_a_name() -> None:
    """On a line of its own, before the data."""
    assert frame(Chunk("a", "b", {}), "response.failed") == (
        b'event: response.failed\ndata: {"before":"a","text":"b","after":{}}\n\n'
    )


@pytest.mark.parametrize("text", ["a\u0085b", "\u2028", "one\u2029two\u2028", "plain", "é\u2028"])
def test_a_frame_is_one_line_for_every_reader(text: str) -> None:
    """Those that split text, not bytes, know more ends of lines; JSON says the same either way."""

    class Said(msgspec.Struct):
        text: str

    whole = frame(Said(text))
    filled = FrameTemplate(lambda filling: frame(Said(filling))).fill(text)
    assert whole == filled
    (line,) = whole.decode().strip("\n").splitlines()
    assert json.loads(line.removeprefix("data: ")) == {"text": text}

"""Answers as their readers see them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.templates import BUILTIN, AnswerReader
from server.templates.template import Opening

WORLD = BUILTIN["world"].opening
THINK = BUILTIN["g1"].opening
NO_THINK = BUILTIN["g1"].efforts["none"]
RAW = BUILTIN["raw"].opening
LONG = Opening("<|", thinking=True, completion="<think>>", skips_space=True)  # of which `<` may also end the thought


def read(opening: Opening, pieces: list[str]) -> tuple[str, str]:
    """Return the reasoning and the content of an answer that arrives in `pieces`."""
    reader = AnswerReader(opening)
    texts = [*map(reader.push, pieces), reader.flush()]
    return "".join(text.reasoning for text in texts), "".join(text.content for text in texts)


@pytest.mark.parametrize(
    ("opening", "text", "reasoning", "content"),
    [
        (WORLD, " Hi there ", "", "Hi there "),
        (WORLD, "  Hi", "", " Hi"),
        (WORLD, "Hi", "", "Hi"),
        (WORLD, " ", "", ""),
        (WORLD, " <think>x</think>y", "", "<think>x</think>y"),
        (RAW, " Hi\n", "", " Hi\n"),
        (NO_THINK, ">\n\nHi > you", "", "Hi > you"),
        (NO_THINK, "> quoted", "", "quoted"),
        (THINK, ">\nLet me see.</think>\n\n> Hi", "Let me see.", "> Hi"),
        (THINK, ">a < b </thing> c</think>Hi</think>", "a < b </thing> c", "Hi</think>"),
        (THINK, "></think>\nHi", "", "Hi"),
        (THINK, ">\n\n</think>\n", "", ""),
        (THINK, ">never finished </thi", "never finished </thi", ""),
        (THINK, ">\n", "", ""),
        (THINK, "", "", ""),
        (LONG, "<think>> a</think>b", "a", "b"),
        (LONG, "<think> a</think>b", "<think> a", "b"),
        (LONG, "<thi</think>\n b", "<thi", "b"),
        (LONG, "<thin", "<thin", ""),
    ],
)
def test_answer(opening: Opening, text: str, reasoning: str, content: str) -> None:
    """The thought is apart, and what completes the opening is not shown, all at once or character by character."""
    assert read(opening, [text]) == (reasoning, content)
    assert read(opening, list(text)) == (reasoning, content)


@pytest.mark.parametrize("opening", [WORLD, THINK, NO_THINK, RAW, LONG])
@given(pieces=st.lists(st.sampled_from([">", " ", "\n", "</think>", "<think>>", "</th", "ink>", "<", "/", "a", "好"])))
def test_any_cut_gives_the_same(opening: Opening, pieces: list[str]) -> None:
    """How the text was cut does not show in what is read."""
    assert read(opening, pieces) == read(opening, ["".join(pieces)])


def test_nothing_is_held_longer_than_needed() -> None:
    """Text that cannot be the end of the thought is passed on at once."""
    reader = AnswerReader(THINK)
    assert [reader.push(piece).reasoning for piece in (">", "a", "<", "b", "</", "thinks")] == [
        "",
        "a",
        "",
        "<b",
        "",
        "</thinks",
    ]
    assert reader.push("</think>").content == ""
    assert [reader.push(piece).content for piece in ("\n", "c", "<", "/")] == ["", "c", "<", "/"]

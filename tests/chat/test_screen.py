"""What is written to a terminal, and what to anything else."""

from __future__ import annotations

import io

import pytest

from chat.screen import DIM, PLAIN, Screen, printable


class FakeTerminal(io.StringIO):
    """Text that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def show_an_answer(out: io.StringIO) -> str:
    """A thought, what is said after it in two pieces, and a remark."""
    screen = Screen(out)
    screen.stream("Hm.", is_thought=True)
    screen.stream("Well")
    screen.stream(", yes.")
    screen.remark("(done)")
    return out.getvalue()


def test_a_thought_is_dim_and_apart() -> None:
    """On a terminal."""
    shown = show_an_answer(FakeTerminal())
    assert shown.index(DIM) < shown.index("Hm.") < shown.index(PLAIN, shown.index("Hm.")) < shown.index("Well, yes.\n")
    assert shown.count("\n") == 3


def test_a_pipe_gets_nothing_but_text() -> None:
    """No colours, line by line."""
    assert show_an_answer(io.StringIO()) == "Hm.\nWell, yes.\n(done)\n"


@pytest.mark.parametrize("text", ["\x1b[2J", "\x07", "\r", "\x9b2J", "\x7f", "\x00"])
def test_no_model_moves_the_cursor(text: str) -> None:
    """Control characters are shown, not sent."""
    assert "�" in printable(text)
    assert not set(printable(text)) & {"\x1b", "\x07", "\r", "\x9b", "\x7f", "\x00"}
    out = FakeTerminal()
    Screen(out).stream(text)
    assert out.getvalue() == printable(text)


def test_other_text_is_what_it_is() -> None:
    """Line ends, tabs, every script."""
    assert printable("Grüße,\n\t日本 🙂") == "Grüße,\n\t日本 🙂"

"""What a terminal shows: answers as they come, thoughts dimmed, remarks apart; plain text into a pipe."""

from __future__ import annotations

import sys
from typing import TextIO

DIM, BOLD, RED, PLAIN = "\x1b[2m", "\x1b[1m", "\x1b[31m", "\x1b[0m"
PROMPT = "> "


class Screen:
    """Writes to `out`, with colours if it is a terminal. What comes from a model can move no cursor."""

    def __init__(self, out: TextIO = sys.stdout) -> None:
        self._out = out
        self._is_terminal = out.isatty()
        self._style = PLAIN
        self._at_line_start = True

    def remark(self, text: str) -> None:
        """Say something about the conversation, on lines of its own."""
        self._line(text, DIM)

    def complain(self, text: str) -> None:
        """Say what went wrong, on a line of its own."""
        self._line(f"error: {text}", RED)

    def said_by_user(self, text: str) -> None:
        """Show what was said earlier."""
        self._line(f"{PROMPT}{text}", BOLD)

    def stream(self, text: str, *, is_thought: bool = False) -> None:
        """Show a piece of an answer; a thought and what is said after it are apart."""
        style = DIM if is_thought else PLAIN
        if style != self._style and not self._at_line_start:
            self._write("\n")
        self._switch(style)
        self._write(printable(text) if self._is_terminal else text)
        self._out.flush()

    def end(self) -> None:
        """An answer is over, whole or not."""
        self._switch(PLAIN)
        if not self._at_line_start:
            self._write("\n")
        self._out.flush()

    def _line(self, text: str, style: str) -> None:
        self.end()
        self._switch(style)
        self._write(printable(text) if self._is_terminal else text)
        self._switch(PLAIN)
        self._write("\n")
        self._out.flush()

    def _switch(self, style: str) -> None:
        if style != self._style and self._is_terminal:
            self._out.write(style if style == PLAIN else PLAIN + style)
        self._style = style

    def _write(self, text: str) -> None:
        if text:
            self._out.write(text)
            self._at_line_start = text.endswith("\n")


def printable(text: str) -> str:
    """Return `text` with control characters made visible: a terminal would obey them."""
    return "".join(character if _is_harmless(character) else "\N{REPLACEMENT CHARACTER}" for character in text)


def _is_harmless(character: str) -> bool:
    return character in "\n\t" or not (ord(character) < 0x20 or 0x7F <= ord(character) < 0xA0)

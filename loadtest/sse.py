"""Bytes to server-sent events, incrementally (HTML standard, section 9.2.6)."""

from __future__ import annotations

import re

_LINE_END = re.compile(rb"\r\n|\n|\r")


class EventParser:
    """Turns a stream of bytes, however it is cut, into the data of its events.

    Comments (keep-alives) and the fields `event`, `id` and `retry` are dropped: OpenAI's streams carry all they say in
    `data`.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, piece: bytes) -> list[bytes]:
        """Return the data of the events that `piece` completes."""
        text = self._rest + piece
        lines = _LINE_END.split(text)
        # A carriage return at the very end may be half of a line end: it waits for what follows.
        if text.endswith(b"\r"):
            lines[-2:] = [lines[-2] + b"\r"]
        self._rest = lines.pop()
        return [event for line in lines if (event := self._take(line)) is not None]

    def _take(self, line: bytes) -> bytes | None:
        if line:
            name, _, value = line.partition(b":")
            if name == b"data":
                self._data.append(value.removeprefix(b" "))
            return None
        event = b"\n".join(self._data) if self._data else None
        self._data = []
        return event

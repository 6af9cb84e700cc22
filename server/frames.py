"""Server-sent events as bytes: how a chunk is framed, and chunks of which only the text changes."""

from __future__ import annotations

import uuid
from collections.abc import Callable

import msgspec

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"

# JSON may hold them as they are, but readers that split streams into lines of text take them for ends of lines.
_LINE_ENDS = {"\u0085": rb"\u0085", "\u2028": rb"\u2028", "\u2029": rb"\u2029"}

_encoder = msgspec.json.Encoder()


def _encode(value: object) -> bytes:
    """Return `value` as JSON that is one line, however lines are told apart."""
    data = _encoder.encode(value)
    if not data.isascii():
        for character, escaped in _LINE_ENDS.items():
            data = data.replace(character.encode(), escaped)
    return data


def frame(data: msgspec.Struct, name: str | None = None) -> bytes:
    """Return `data` as one event, of the type `name` if given."""
    head = b"" if name is None else b"event: %b\n" % name.encode()
    return b"%bdata: %b\n\n" % (head, _encode(data))


class FrameTemplate:
    """A frame rendered once, into which texts are filled: the same bytes as rendering it anew for each."""

    __slots__ = ("_after", "_before")

    def __init__(self, render: Callable[[str], bytes]) -> None:
        """Render the frame by `render(text)`, which says `text` exactly once, as a JSON string."""
        blank = uuid.uuid4().hex  # nothing else in a frame can look like it
        self._before, found, self._after = render(blank).partition(_encode(blank))
        assert found, "the frame says its text"

    def fill(self, text: str) -> bytes:
        """Return the frame that says `text`."""
        return b"%b%b%b" % (self._before, _encode(text), self._after)

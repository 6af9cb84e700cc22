"""Calls of tools in an answer: how one is written, and how it is found while the answer arrives.

A call is a JSON object in a fence, the name first:

    ```json
    {"name":"get_weather","arguments":{"city":"Paris"}}
    ```

An answer has at most one. Words may stand before the fence and after it.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Sequence
from dataclasses import dataclass

FENCE = "```json"
END_OF_FENCE = "```"
JSON_SPACE = " \t\r\n"


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call: of which tool, and with what, as JSON text."""

    name: str
    arguments: str

    @property
    def text(self) -> str:
        """The call as a model writes it."""
        call = f'{{"name":{json.dumps(self.name)},"arguments":{self.arguments}}}'
        return f"{FENCE}\n{call}\n{END_OF_FENCE}"


def is_object(text: str) -> bool:
    """Return whether `text` is the JSON of an object."""
    try:
        return isinstance(json.loads(text, parse_constant=_refuse_constant), dict)
    except (ValueError, RecursionError):
        return False


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


@dataclass(frozen=True, slots=True)
class CallText:
    """A piece of an answer: words, and what it adds to the call."""

    content: str = ""
    name: str | None = None  # the call begins
    arguments: str = ""


class _State(enum.Enum):
    SEEKING = enum.auto()  # of what is held, the beginning is words and the rest may begin a call
    ARGUMENTS = enum.auto()  # inside the arguments
    CLOSING = enum.auto()  # after them, before what only completes the call is complete
    WORDS = enum.auto()  # all that comes is words


class CallReader:
    """Finds the call in the text of one answer while it arrives.

    A call is one once its name is that of a tool and its arguments have begun; they are passed on as they come. What
    only looked like a call until then is words, and so is everything else but the form itself. The pieces do not
    depend on how the text was cut.
    """

    def __init__(self, names: Sequence[str], *, is_open: bool) -> None:
        """Look for calls of the tools called `names`; `is_open` says that the prompt has opened the fence already."""
        self._names = names
        self._is_open = is_open
        self._state = _State.SEEKING
        self._is_at_start = True  # of the answer, where a call may also come without a fence
        self._held = ""
        self._arguments = _ObjectScanner()
        self.has_called = False  # a whole call has come

    def push(self, text: str) -> CallText:
        """Return what `text` adds."""
        self._held += text
        content, name, arguments = "", None, ""
        if self._state is _State.SEEKING:
            content, name = self._seek()
        if self._state is _State.ARGUMENTS:
            arguments = self._take_arguments()
        if self._state is _State.CLOSING:
            self._close()
        if self._state is _State.WORDS:
            content += self._take(len(self._held))
        return CallText(content, name, arguments)

    def flush(self) -> CallText:
        """Return what was held back, now that the text is at its end."""
        rest = self._take(len(self._held))
        is_form = self._state is _State.CLOSING and ("}" + END_OF_FENCE).startswith("".join(rest.split()))
        return CallText() if is_form else CallText(rest)

    def _take(self, size: int) -> str:
        taken, self._held = self._held[:size], self._held[size:]
        return taken

    def _seek(self) -> tuple[str, str | None]:
        """Take the words before a call, and its head if it is whole."""
        content = ""
        while self._state is _State.SEEKING:
            start = self._candidate()
            content += self._take(start)
            self._is_at_start = self._is_at_start and not content
            try:
                head = _read_head(self._held, self._names, is_open=self._is_open)
            except _Incomplete:
                return content, None
            if head is not None:
                self._take(head.size)
                self._state = _State.ARGUMENTS
                if head.is_without_arguments:
                    self._held = "{}}" + self._held
                return content, head.name
            if self._is_open:
                self._state = _State.WORDS
            else:
                content += self._take(_size_of_beginning(self._held))
                self._is_at_start = False
        return content, None

    def _candidate(self) -> int:
        """Return where in the held text a call may begin; its length if nowhere."""
        if self._is_open:
            return 0
        if self._is_at_start and self._held.lstrip(JSON_SPACE)[:1] in ("", "{"):
            return 0
        start = self._held.find(FENCE)
        if start < 0:
            start = len(self._held) - overlap(self._held, FENCE)
        return 0 if self._is_at_start and not self._held[:start].strip(JSON_SPACE) else start

    def _take_arguments(self) -> str:
        """Take what belongs to the arguments, and notice their end."""
        taken = self._take(self._arguments.scan(self._held))
        if self._arguments.is_at_end:
            self.has_called = is_object(self._arguments.text)
            self._state = _State.CLOSING if self.has_called else _State.WORDS
        return taken

    def _close(self) -> None:
        """Drop what only completes the call, once it is certain what that is."""
        cursor = _Cursor(self._held)
        try:
            closed = cursor.skip_space() and cursor.skip("}") and cursor.skip_space()
            if closed and cursor.skip(END_OF_FENCE):
                cursor.skip_space()
        except _Incomplete:
            return
        self._take(cursor.position if closed else 0)
        self._state = _State.WORDS


# -- the head of a call -----------------------------------------------------------------------------------------------


class _Incomplete(Exception):
    """The text ends before it is certain what it is."""


class _Cursor:
    """A place in a text that may go on."""

    def __init__(self, text: str) -> None:
        self._text = text
        self.position = 0

    def skip_space(self) -> bool:
        """Go to the next character that is no space; raises `_Incomplete` if there is none yet."""
        rest = self._text[self.position :].lstrip(JSON_SPACE)
        if not rest:
            raise _Incomplete
        self.position = len(self._text) - len(rest)
        return True

    def skip(self, word: str) -> bool:
        """Go behind `word` if it is here; raises `_Incomplete` if that is not certain yet."""
        if self._text.startswith(word, self.position):
            self.position += len(word)
            return True
        if word.startswith(self._text[self.position :]):
            raise _Incomplete
        return False


@dataclass(frozen=True, slots=True)
class _Head:
    name: str
    size: int  # characters before the arguments
    is_without_arguments: bool = False


def _read_head(text: str, names: Sequence[str], *, is_open: bool) -> _Head | None:
    """Return the head of the call that `text` begins with; None: it is none; raises `_Incomplete`."""
    cursor = _Cursor(text)
    cursor.skip_space()
    if not is_open and cursor.skip(FENCE):
        cursor.skip_space()
    if not (_skip_all(cursor, "{", '"name"', ":") and (name := _read_name(cursor, names))):
        return None
    cursor.skip_space()
    if cursor.skip("}"):
        return _Head(name, cursor.position, is_without_arguments=True)
    if not _skip_all(cursor, ",", '"arguments"', ":"):
        return None
    start = cursor.position
    return _Head(name, start) if cursor.skip("{") else None


def _skip_all(cursor: _Cursor, *words: str) -> bool:
    """Skip words in a row, and the space before and after each."""
    return all(cursor.skip_space() and cursor.skip(word) for word in words) and cursor.skip_space()


def _read_name(cursor: _Cursor, names: Sequence[str]) -> str | None:
    is_incomplete = False
    for name in names:
        try:
            if cursor.skip(json.dumps(name)):
                return name
        except _Incomplete:
            is_incomplete = True
    if is_incomplete:
        raise _Incomplete
    return None


def _size_of_beginning(text: str) -> int:
    """Return how much of what turned out to be no call has to be passed before another may begin."""
    start = len(text) - len(text.lstrip(JSON_SPACE))
    return start + (len(FENCE) if text.startswith(FENCE, start) else 1)


def overlap(text: str, word: str) -> int:
    """Return how many characters at the end of `text` could be the beginning of `word`."""
    sizes = range(min(len(text), len(word) - 1), 0, -1)
    return next((size for size in sizes if text.endswith(word[:size])), 0)


class _ObjectScanner:
    """Finds the end of a JSON object by its braces and strings."""

    def __init__(self) -> None:
        self.text = ""
        self._depth = 0
        self._is_in_string = False
        self._is_escaped = False

    @property
    def is_at_end(self) -> bool:
        """Whether the object is closed."""
        return bool(self.text) and self._depth == 0

    def scan(self, text: str) -> int:
        """Take the characters of `text` that belong to the object; return how many."""
        size = len(text)
        for index, character in enumerate(text):
            self._see(character)
            if self._depth == 0:
                size = index + 1
                break
        self.text += text[:size]
        return size

    def _see(self, character: str) -> None:
        if self._is_escaped:
            self._is_escaped = False
        elif self._is_in_string:
            self._is_escaped = character == "\\"
            self._is_in_string = character != '"'
        elif character == '"':
            self._is_in_string = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1

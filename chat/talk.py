"""The terminal's side of a conversation: lines in, turns and commands out."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from chat.api import Api, ApiError, Applied, Head, NotFound, Said, Unreachable, VersionMoved
from chat.screen import Screen

NUM_SHOWN = 20  # of what was said, on joining
NUM_RECONNECTS = 10
RECONNECT_SECONDS = 0.25  # before the first; twice as long before each other
MAX_RECONNECT_SECONDS = 4.0
EXCERPT_CHARS = 60

HELP = """\
/new [ID]             begin another conversation
/fork [VERSION]       go on in a copy of this one, from its head or an earlier version
/rewind VERSION       go back to a version of this one
/export FILE [state]  write this conversation to a file, with the model's state if asked
/import FILE          go on with a conversation from a file
/items                list what was said, with ids
/delete ITEM          take something back, by its id
/id                   say where we are
/quit                 leave; the conversation stays (Ctrl-D does the same)
Anything else is said to the model; begin with // to say something that begins with /.
Ctrl-C stops an answer."""


class UsageError(ApiError):
    """A command that is none, or without what it needs."""


class Talk:
    """One person at a terminal, in one conversation at a time. `options` go with every turn."""

    def __init__(self, api: Api, screen: Screen, options: dict[str, Any]) -> None:
        self._api = api
        self._screen = screen
        self._options = options
        self._head = Head("", 0, 0, "")
        self._commands: dict[str, Callable[[list[str]], None]] = {
            "/help": lambda words: screen.remark(HELP),
            "/new": self._new,
            "/fork": self._fork,
            "/rewind": self._rewind,
            "/export": self._export,
            "/import": self._import,
            "/items": self._items,
            "/delete": self._delete,
            "/id": lambda words: self._tell_where(),
        }

    def join(self, name: str | None) -> None:
        """Go on with the conversation of that name, which begins if there is none; or begin one; raises `ApiError`."""
        try:
            head = self._api.create() if name is None else self._api.get(name)
        except NotFound:
            head = self._api.create(name)
        self._enter(head)

    def take(self, line: str) -> bool:
        """Do what a line says, and tell what goes wrong; False: leave."""
        line = line.strip()
        if line == "/quit":
            return False
        try:
            if line.startswith("//"):
                self._say(line[1:])
            elif line.startswith("/"):
                self._command(line)
            elif line:
                self._say(line)
        except ApiError as error:
            self._screen.complain(str(error))
        except KeyboardInterrupt:
            self._screen.complain("interrupted")
        return True

    # -- turns --------------------------------------------------------------------------------------------------------

    def _say(self, text: str) -> None:
        applied: Applied | None = None
        try:
            with contextlib.closing(self._api.say(self._head, text, **self._options)) as answer:
                for event in answer:
                    if isinstance(event, Said):
                        self._screen.stream(event.text, is_thought=event.is_thought)
                    else:
                        applied = event
        except KeyboardInterrupt:
            self._screen.end()
            self._find_out("stopped")
        except Unreachable as error:
            self._screen.end()
            self._screen.complain(str(error))
            self._find_out("reconnected")
        except VersionMoved:
            self._show_news()
        finally:
            self._screen.end()
        if applied is not None:
            self._head = self._api.get(self._head.id)
            if applied.finish_reason == "length":
                self._screen.remark(f"(cut off: the limit of tokens was reached; version {applied.version})")

    def _find_out(self, why: str) -> None:
        """Tell what became of a turn whose answer was not heard to its end."""
        before, self._head = self._head, self._reconnected()
        if self._head.version == before.version:
            self._screen.remark(f"({why}: the turn was not applied; still at version {before.version})")
            return
        self._screen.remark(f"({why}: the turn was applied; version {self._head.version})")
        self._show(self._api.items(self._head.id, 1))

    def _reconnected(self) -> Head:
        """Return where the conversation is, from a server that may be starting again; raises `Unreachable`."""
        seconds = RECONNECT_SECONDS
        for _ in range(NUM_RECONNECTS):
            try:
                return self._api.get(self._head.id)
            except Unreachable:
                time.sleep(seconds)
                seconds = min(2 * seconds, MAX_RECONNECT_SECONDS)
        return self._api.get(self._head.id)

    def _show_news(self) -> None:
        """Somebody else changed the conversation: show how it is now instead of talking past them."""
        self._head = self._api.get(self._head.id)
        self._screen.remark(f"(not said: meanwhile the conversation came to version {self._head.version}; it is now)")
        self._show(self._api.items(self._head.id, NUM_SHOWN))

    # -- commands -----------------------------------------------------------------------------------------------------

    def _command(self, line: str) -> None:
        name, *words = line.split()
        if name not in self._commands:
            raise UsageError(f"there is no command {name}; /help lists them")
        self._commands[name](words)

    def _new(self, words: list[str]) -> None:
        self._enter(self._api.create(_optional(words, "/new [ID]")))

    def _fork(self, words: list[str]) -> None:
        usage = "/fork [VERSION]"
        given = _optional(words, usage)
        self._enter(self._api.fork(self._head.id, None if given is None else _version(given, usage)))

    def _rewind(self, words: list[str]) -> None:
        usage = "/rewind VERSION"
        self._enter(self._api.rewind(self._head.id, _version(_required(words, usage), usage)))

    def _export(self, words: list[str]) -> None:
        usage = "/export FILE [state]"
        if len(words) == 2 and words[1] != "state":
            raise UsageError(f"usage: {usage}")
        path = Path(_required(words[:1] if len(words) == 2 else words, usage)).expanduser()
        file = self._api.export(self._head.id, include_state=len(words) == 2)
        with _file_errors(), path.open("xb") as opened:  # nothing is overwritten
            opened.write(file)
        self._screen.remark(f"(wrote {len(file)} bytes to {path})")

    def _import(self, words: list[str]) -> None:
        with _file_errors():
            file = Path(_required(words, "/import FILE")).expanduser().read_bytes()
        self._enter(self._api.import_file(file))

    def _items(self, words: list[str]) -> None:
        for item in self._api.items(self._head.id):
            self._screen.remark(f"{item['id']}  {_who(item)}: {_excerpt(_text_of(item))}")

    def _delete(self, words: list[str]) -> None:
        self._head = self._api.delete_item(self._head.id, _required(words, "/delete ITEM"))
        self._screen.remark(f"(deleted; version {self._head.version})")

    # -- what is shown ------------------------------------------------------------------------------------------------

    def _enter(self, head: Head) -> None:
        self._head = head
        self._tell_where()
        items = self._api.items(head.id, NUM_SHOWN + 1)
        if len(items) > NUM_SHOWN:
            self._screen.remark("(what was said before is not shown; /items lists it)")
        self._show(items[-NUM_SHOWN:])

    def _tell_where(self) -> None:
        head = self._head
        self._screen.remark(f"({head.id}, version {head.version}, {head.num_tokens} tokens, {head.model})")

    def _show(self, items: list[dict[str, Any]]) -> None:
        for item in items:
            if item["type"] == "message" and item["role"] == "assistant":
                self._screen.stream(_text_of(item).strip())
            elif item["type"] == "reasoning":
                self._screen.stream(_text_of(item).strip(), is_thought=True)
            elif item["type"] == "message" and item["role"] == "user":
                self._screen.said_by_user(_text_of(item))
            else:
                self._screen.remark(f"{_who(item)}: {_text_of(item)}")
            self._screen.end()


def _who(item: dict[str, Any]) -> str:
    return str(item["role"] if item["type"] == "message" else item["type"])


def _text_of(item: dict[str, Any]) -> str:
    if item["type"] == "function_call":
        return f"{item['name']}({item['arguments']})"
    if item["type"] == "function_call_output":
        return str(item["output"])
    return "".join(part["text"] for part in item["content"])


def _excerpt(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= EXCERPT_CHARS else f"{line[: EXCERPT_CHARS - 1]}…"


def _optional(words: list[str], usage: str) -> str | None:
    if len(words) > 1:
        raise UsageError(f"usage: {usage}")
    return words[0] if words else None


def _required(words: list[str], usage: str) -> str:
    if (word := _optional(words, usage)) is None:
        raise UsageError(f"usage: {usage}")
    return word


def _version(word: str, usage: str) -> int:
    if not word.isdecimal() or not word.isascii():
        raise UsageError(f"usage: {usage}")
    return int(word)


@contextlib.contextmanager
def _file_errors() -> Iterator[None]:
    """Tell in one line what is wrong with a file."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"{error.filename}: {error.strerror}") from error

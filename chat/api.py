"""What the terminal asks of a server, over HTTP. Every failure is an `ApiError` of one line.

ApiError                 the server refused, or sent what nobody understands
├── Unreachable          it did not answer, or the connection broke
├── NotFound             no such conversation, item or version
└── VersionMoved         somebody else took a turn since we looked
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import httpx

from loadtest.sse import EventParser

CONNECT_SECONDS = 5.0
READ_SECONDS = 300.0  # of silence: a long prompt may be read for a while before the first word
QUEUE_MS = 5_000  # a turn that somebody else takes is waited for
PAGE = 100


class ApiError(Exception):
    """The server refused, or sent what nobody understands."""


class Unreachable(ApiError):
    """The server did not answer, or the connection broke: what it did is not known."""


class NotFound(ApiError):
    """There is no such conversation, item or version."""


class VersionMoved(ApiError):
    """The conversation is not at the version that the turn was meant for."""


@dataclass(frozen=True, slots=True)
class Head:
    """A conversation, as far as a terminal cares."""

    id: str
    version: int
    num_tokens: int
    model: str


@dataclass(frozen=True, slots=True)
class Said:
    """A piece of an answer."""

    text: str
    is_thought: bool = False


@dataclass(frozen=True, slots=True)
class Applied:
    """The turn is in the log."""

    version: int
    resume: str
    finish_reason: str


class Api:
    """A server. Close it, or use it as a context manager."""

    def __init__(self, url: str, api_key: str | None, model: str | None) -> None:
        self._model = {} if model is None else {"model": model}
        self._http = httpx.Client(
            base_url=url,
            headers={} if api_key is None else {"authorization": f"Bearer {api_key}"},
            timeout=httpx.Timeout(READ_SECONDS, connect=CONNECT_SECONDS),
            trust_env=False,
        )

    def __enter__(self) -> Api:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    # -- conversations ------------------------------------------------------------------------------------------------

    def create(self, name: str | None = None) -> Head:
        """Begin a conversation."""
        return _head(self._json("POST", "/v1/conversations", {} if name is None else {"id": name}))

    def get(self, name: str) -> Head:
        """Return a conversation; raises `NotFound`."""
        return _head(self._json("GET", _path(name)))

    def fork(self, name: str, version: int | None) -> Head:
        """Begin another with its history."""
        return _head(self._json("POST", f"{_path(name)}/fork", {} if version is None else {"version": version}))

    def rewind(self, name: str, version: int) -> Head:
        """Go back."""
        return _head(self._json("POST", f"{_path(name)}/rewind", {"version": version}))

    def items(self, name: str, limit: int | None = None) -> list[dict[str, Any]]:
        """Return what was said, oldest first: all of it, or the last `limit`."""
        newest_first: list[dict[str, Any]] = []
        after: dict[str, Any] = {}
        while limit is None or len(newest_first) < limit:
            wanted = PAGE if limit is None else min(PAGE, limit - len(newest_first))
            page = self._json("GET", f"{_path(name)}/items", params={"order": "desc", "limit": wanted, **after})
            newest_first += page["data"]
            if not page["has_more"]:
                break
            after = {"after": page["last_id"]}
        return newest_first[::-1]

    def delete_item(self, name: str, item_id: str) -> Head:
        """Take something back."""
        return _head(self._json("DELETE", f"{_path(name)}/items/{quote(item_id, safe='')}"))

    def export(self, name: str, *, include_state: bool) -> bytes:
        """Return the conversation as a file."""
        return self._request("POST", f"{_path(name)}/export", json={"include_state": include_state}).content

    def import_file(self, file: bytes) -> Head:
        """Begin a conversation with what a file holds."""
        return _head(self._request("POST", "/v1/conversations/import", content=file).json())

    # -- a turn -------------------------------------------------------------------------------------------------------

    def say(self, head: Head, text: str, **options: Any) -> Generator[Said | Applied]:
        """Take a turn and yield its answer; `Applied` comes last, and only when the turn is in the log.

        Leaving early aborts it. Raises `VersionMoved` if the conversation is not where `head` says, `Unreachable` if
        the answer breaks off.
        """
        body = {
            "messages": [{"role": "user", "content": text}],
            "conversation": head.id,
            "stream": True,
            "queue_ms": QUEUE_MS,
            **self._model,
            **options,
        }
        parser = EventParser()
        chunks = _Chunks()
        with (
            _told_in_one_line(),
            self._http.stream(
                "POST", "/v1/chat/completions", json=body, headers={"if-match": f'"{head.version}"'}
            ) as response,
        ):
            if response.is_error:
                response.read()
                raise _refusal(response)
            for piece in response.iter_raw():
                for data in parser.feed(piece):
                    if data == b"[DONE]":
                        yield chunks.applied()
                        return
                    yield from chunks.take(json.loads(data))
        raise Unreachable("the answer broke off")

    # -- requests -----------------------------------------------------------------------------------------------------

    def _json(
        self, method: str, path: str, body: dict[str, Any] | None = None, params: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        arguments = {} if body is None else {"json": body}
        with _told_in_one_line():
            answer: dict[str, Any] = self._request(method, path, params=params, **arguments).json()
            return answer

    def _request(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        with _told_in_one_line():
            response = self._http.request(method, path, **arguments)
        if response.is_error:
            raise _refusal(response)
        return response


class _Chunks:
    """What the chunks of one answer said about its turn."""

    def __init__(self) -> None:
        self._conversation: dict[str, Any] = {}
        self._finish_reason = ""

    def take(self, chunk: dict[str, Any]) -> Iterator[Said]:
        """Yield what a chunk says; raises `ApiError` for one that says that the turn failed."""
        if "error" in chunk:
            raise ApiError(_line(chunk["error"]["message"]))
        self._conversation = chunk.get("conversation") or self._conversation
        for choice in chunk["choices"]:
            delta = choice["delta"]
            if thought := delta.get("reasoning_content"):
                yield Said(thought, is_thought=True)
            if words := delta.get("content"):
                yield Said(words)
            self._finish_reason = choice.get("finish_reason") or self._finish_reason

    def applied(self) -> Applied:
        """Return what became of the turn."""
        return Applied(self._conversation["version"], self._conversation["resume"], self._finish_reason)


@contextlib.contextmanager
def _told_in_one_line() -> Iterator[None]:
    """Turn whatever the connection or a strange answer raises into an `ApiError`."""
    try:
        yield
    except (httpx.TransportError, httpx.StreamError) as error:
        raise Unreachable(f"the server does not answer: {_line(str(error)) or type(error).__name__}") from error
    except httpx.InvalidURL as error:
        raise ApiError(f"this is no address of a server: {_line(str(error))}") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ApiError("the server's answer is not what a Sostenuto server sends") from error


def _refusal(response: httpx.Response) -> ApiError:
    try:
        detail = response.json()["error"]
        message, code = _line(detail["message"]).rstrip("."), detail["code"]
    except (ValueError, LookupError, TypeError):
        return ApiError(f"the server answered {response.status_code}")
    kind = {404: NotFound, 412: VersionMoved}.get(response.status_code, ApiError)
    return kind(f"{message} ({code})")


def _head(conversation: dict[str, Any]) -> Head:
    with _told_in_one_line():
        return Head(
            conversation["id"], conversation["version"], conversation["num_tokens"], conversation.get("model", "")
        )


def _path(name: str) -> str:
    return f"/v1/conversations/{quote(name, safe='')}"


def _line(text: str) -> str:
    return " ".join(str(text).split())

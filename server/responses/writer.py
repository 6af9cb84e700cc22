"""What a response says: OpenAI's events in order, or the whole of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import msgspec

from engine.tokenizer import Tokenizer
from server.errors import Answer
from server.frames import frame
from server.generation import ChoiceEvent, Delivered, Finished
from server.items import FunctionCallBody, MessageBody, OutputContent, ReasoningBody, ReasoningText
from server.responses.draft import Draft
from server.responses.logprobs import output_logprobs
from server.schemas.responses import Response
from server.templates import AnswerReader, AnswerText


class Event(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One event of a stream; each type uses its own of these fields."""

    type: str
    sequence_number: int
    response: Response | msgspec.UnsetType = msgspec.UNSET
    output_index: int | msgspec.UnsetType = msgspec.UNSET
    content_index: int | msgspec.UnsetType = msgspec.UNSET
    item_id: str | msgspec.UnsetType = msgspec.UNSET
    item: Any = msgspec.UNSET
    part: Any = msgspec.UNSET
    delta: str | msgspec.UnsetType = msgspec.UNSET
    text: str | msgspec.UnsetType = msgspec.UNSET
    name: str | msgspec.UnsetType = msgspec.UNSET
    arguments: str | msgspec.UnsetType = msgspec.UNSET
    logprobs: list[Any] | msgspec.UnsetType = msgspec.UNSET


class ResponseWriter:
    """Writes one response. Events are numbered from 0 without a gap; after the last one nothing follows."""

    def __init__(self, draft: Draft, tokenizer: Tokenizer, *, queued: bool = False) -> None:
        self._draft = draft
        self._tokenizer = tokenizer
        self._queued = queued
        self._number = 0
        self._reader: AnswerReader | None = None
        self._open: _Thought | _Words | _Call | None = None
        self._num_closed = 0
        self._final: Response | None = None

    # -- a stream -----------------------------------------------------------------------------------------------------

    def opening(self) -> bytes:
        """Return the events before there is anything to say."""
        begun = self._draft.begun()
        if not self._queued:
            events = {"response.created": begun}
        else:
            events = dict.fromkeys(("response.created", "response.queued"), self._draft.begun("queued"))
        events["response.in_progress"] = begun
        return b"".join(self._event(name, response=response) for name, response in events.items())

    def frames(self, event: ChoiceEvent) -> bytes:
        """Return the events that tell of `event`."""
        if isinstance(event, Delivered):
            return self._delivered(event)
        return self._finished(event) if isinstance(event, Finished) else b""

    def closing(self) -> bytes:
        """Return nothing: the last event has said how it ended."""
        return b""

    def failure(self, told: Answer) -> bytes:
        """Return the event that says why there will be no more."""
        if told.code == "response_cancelled":
            response = self._draft.begun("cancelled")
        else:
            response = self._draft.failed(told.code, told.body.error.message)
        return self._event("response.failed", response=response)

    # -- the whole ----------------------------------------------------------------------------------------------------

    def add(self, event: ChoiceEvent) -> None:
        """Wait for the end, which has everything."""

    def finish(self, response: Response) -> None:
        """Take the final form, which is made before it is committed and told after."""
        self._final = response

    def reply(self) -> Response:
        """Return the whole response."""
        assert self._final is not None, "a finished response has a final form"
        return self._final

    # -- events -------------------------------------------------------------------------------------------------------

    def _event(self, name: str, **fields: Any) -> bytes:
        number, self._number = self._number, self._number + 1
        return frame(Event(type=name, sequence_number=number, **fields), name)

    def _delivered(self, event: Delivered) -> bytes:
        if self._reader is None:
            self._reader = self._draft.reader()
        return self._said(self._reader.push(event.text), event)

    def _said(self, text: AnswerText, event: Delivered | None) -> bytes:
        frames = b""
        if text.reasoning:
            frames += self._begin(_Thought, self._draft.ids.thought) + self._grow(text.reasoning)
        if text.content or (event is not None and event.logprobs and isinstance(self._open, _Words)):
            logprobs = self._logprobs(event)
            frames += self._begin(_Words, self._draft.ids.message) + self._grow(text.content, logprobs)
        if text.call_name is not None:
            frames += self._begin(partial(_Call, self._draft.ids.call, text.call_name), self._draft.ids.call_item)
        if text.call_arguments:
            frames += self._grow(text.call_arguments)
        return frames

    def _logprobs(self, event: Delivered | None) -> list[dict[str, Any]]:
        if event is None or event.logprobs is None:
            return []
        return output_logprobs(self._tokenizer, event.token_ids, event.logprobs)

    def _begin(self, kind: Callable[[str, int], _Thought | _Words | _Call], item_id: str) -> bytes:
        """Open the item that what comes next belongs to, and close another."""
        if self._open is not None and self._open.item_id == item_id:
            return b""
        closed = self._close()
        self._open = item = kind(item_id, self._num_closed)
        return closed + self._events(item.opening())

    def _grow(self, text: str, logprobs: list[dict[str, Any]] | None = None) -> bytes:
        assert self._open is not None, "text belongs to an item"
        return self._events([self._open.grow(text, logprobs or [])])

    def _close(self, status: str = "completed") -> bytes:
        item, self._open = self._open, None
        if item is None:
            return b""
        self._num_closed += 1
        return self._events(item.closing(status))

    def _events(self, events: Iterable[tuple[str, dict[str, Any]]]) -> bytes:
        return b"".join(self._event(name, **fields) for name, fields in events)

    def _finished(self, event: Finished) -> bytes:
        if self._reader is None:
            self._reader = self._draft.reader()
        frames = self._said(self._reader.flush(), None)
        response = self.reply()
        if len(response.output) > self._num_closed + (self._open is not None):
            frames += self._begin(_Words, self._draft.ids.message)  # an empty answer is an item all the same
        frames += self._close("completed" if response.status == "completed" else "incomplete")
        return frames + self._event(f"response.{response.status}", response=response)


def frames_after(response: Response, start: int) -> bytes:
    """Return the events that bring a reader who has those before number `start` to the end of a stored response.

    What streamed is not kept as it came. So whoever was there already gets every text once more, whole, in the events
    that end it; who was not gets the beginning, too.
    """
    number = start

    def event(name: str, **fields: Any) -> bytes:
        nonlocal number
        number += 1
        return frame(Event(type=name, sequence_number=number - 1, **fields), name)

    begun = msgspec.structs.replace(response, status="in_progress", output=[], usage=None, error=None)
    frames = [] if start else [event("response.created", response=begun), event("response.in_progress", response=begun)]
    if response.status in ("queued", "in_progress"):
        return b"".join(frames)
    for index, raw in enumerate(response.output):
        item = msgspec.json.decode(raw)
        frames.append(event("response.output_item.added", output_index=index, item=item))
        frames.append(event("response.output_item.done", output_index=index, item=item))
    name = response.status if response.status in ("completed", "incomplete") else "failed"
    return b"".join([*frames, event(f"response.{name}", response=response)])


Said = tuple[str, dict[str, Any]]  # the name of an event, and its fields


class _Item:
    """An item that is being said: its events as it begins, grows and ends."""

    def __init__(self, item_id: str, index: int) -> None:
        self.item_id = item_id
        self.text = ""
        self._index = index

    def _added(self, body: msgspec.Struct) -> Said:
        return "response.output_item.added", {"output_index": self._index, "item": body}

    def _done(self, body: msgspec.Struct) -> Said:
        return "response.output_item.done", {"output_index": self._index, "item": body}

    @property
    def _place(self) -> dict[str, Any]:
        return {"item_id": self.item_id, "output_index": self._index}

    @property
    def _part_place(self) -> dict[str, Any]:
        return {**self._place, "content_index": 0}


class _Thought(_Item):
    """A thought."""

    def opening(self) -> list[Said]:
        """It begins."""
        part = ("response.content_part.added", {**self._part_place, "part": ReasoningText(text="")})
        return [self._added(ReasoningBody(id=self.item_id, status="in_progress", content=[])), part]

    def grow(self, text: str, logprobs: list[dict[str, Any]]) -> Said:
        """It goes on."""
        self.text += text
        return "response.reasoning_text.delta", {**self._part_place, "delta": text}

    def closing(self, status: str) -> list[Said]:
        """It ends."""
        part = ReasoningText(text=self.text)
        return [
            ("response.reasoning_text.done", {**self._part_place, "text": self.text}),
            ("response.content_part.done", {**self._part_place, "part": part}),
            self._done(ReasoningBody(id=self.item_id, status=status, content=[part])),
        ]


class _Words(_Item):
    """A message."""

    def __init__(self, item_id: str, index: int) -> None:
        super().__init__(item_id, index)
        self._logprobs: list[dict[str, Any]] = []

    def opening(self) -> list[Said]:
        """It begins."""
        body = MessageBody(id=self.item_id, status="in_progress", role="assistant", content=[])
        return [
            self._added(body),
            ("response.content_part.added", {**self._part_place, "part": OutputContent(text="")}),
        ]

    def grow(self, text: str, logprobs: list[dict[str, Any]]) -> Said:
        """It goes on."""
        self.text += text
        self._logprobs += logprobs
        return "response.output_text.delta", {**self._part_place, "delta": text, "logprobs": logprobs}

    def closing(self, status: str) -> list[Said]:
        """It ends."""
        part = OutputContent(text=self.text, logprobs=self._logprobs)
        said = {**self._part_place, "text": self.text, "logprobs": self._logprobs}
        return [
            ("response.output_text.done", said),
            ("response.content_part.done", {**self._part_place, "part": part}),
            self._done(MessageBody(id=self.item_id, status=status, role="assistant", content=[part])),
        ]


class _Call(_Item):
    """A call of a tool."""

    def __init__(self, call_id: str, name: str, item_id: str, index: int) -> None:
        super().__init__(item_id, index)
        self._call_id = call_id
        self._name = name

    def opening(self) -> list[Said]:
        """It begins."""
        return [self._added(self._body("in_progress"))]

    def grow(self, text: str, logprobs: list[dict[str, Any]]) -> Said:
        """It goes on."""
        self.text += text
        return "response.function_call_arguments.delta", {**self._place, "delta": text}

    def closing(self, status: str) -> list[Said]:
        """It ends."""
        said = {**self._place, "name": self._name, "arguments": self.text}
        return [("response.function_call_arguments.done", said), self._done(self._body(status))]

    def _body(self, status: str) -> FunctionCallBody:
        return FunctionCallBody(
            id=self.item_id, status=status, call_id=self._call_id, name=self._name, arguments=self.text
        )

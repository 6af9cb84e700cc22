"""What a response says: OpenAI's events in order, or the whole of it."""

from __future__ import annotations

from typing import Any

import msgspec

from engine.messages import TokenLogprobs
from engine.tokenizer import Tokenizer
from server.api.replies import clamped, most_likely
from server.errors import Answer
from server.frames import frame
from server.generation import ChoiceEvent, Delivered, Finished
from server.items import MessageBody, OutputContent, ReasoningBody, ReasoningText
from server.responses.draft import Draft
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
    logprobs: list[Any] | msgspec.UnsetType = msgspec.UNSET


class ResponseWriter:
    """Writes one response. Events are numbered from 0 without a gap; after the last one nothing follows."""

    def __init__(self, draft: Draft, tokenizer: Tokenizer, *, queued: bool = False) -> None:
        self._draft = draft
        self._tokenizer = tokenizer
        self._queued = queued
        self._number = 0
        self._reader: AnswerReader | None = None
        self._open: _OpenItem | None = None
        self._num_closed = 0
        self._final: Response | None = None

    # -- a stream -----------------------------------------------------------------------------------------------------

    def opening(self) -> bytes:
        """Return the events before there is anything to say."""
        queued = [self._event("response.queued", response=self._draft.begun("queued"))] if self._queued else []
        created = self._event("response.created", response=self._draft.begun())
        return b"".join([created, *queued, self._event("response.in_progress", response=self._draft.begun())])

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
            frames += self._begin(thinking=True) + self._delta("response.reasoning_text.delta", text.reasoning)
        if text.content or (event is not None and event.logprobs and self._is_answering):
            logprobs = [] if event is None else self._logprobs(event)
            frames += self._begin(thinking=False)
            frames += self._delta("response.output_text.delta", text.content, logprobs=logprobs)
        return frames

    @property
    def _is_answering(self) -> bool:
        return self._open is not None and not self._open.thinking

    def _begin(self, *, thinking: bool) -> bytes:
        """Open the item that what comes next belongs to, and close one of another kind."""
        if self._open is not None and self._open.thinking == thinking:
            return b""
        closed = self._close()
        item_id = self._draft.ids.thought if thinking else self._draft.ids.message
        self._open = item = _OpenItem(item_id, self._num_closed, thinking)
        added = self._event("response.output_item.added", output_index=item.index, item=item.body("in_progress", []))
        return closed + added + self._event("response.content_part.added", **item.place, part=item.part(""))

    def _delta(self, name: str, text: str, **fields: Any) -> bytes:
        assert self._open is not None, "text belongs to an item"
        self._open.text += text
        self._open.logprobs += fields.get("logprobs", [])
        return self._event(name, **self._open.place, delta=text, **fields)

    def _close(self, status: str = "completed") -> bytes:
        item, self._open = self._open, None
        if item is None:
            return b""
        self._num_closed += 1
        part = item.part(item.text)
        if item.thinking:
            said = self._event("response.reasoning_text.done", **item.place, text=item.text)
        else:
            said = self._event("response.output_text.done", **item.place, text=item.text, logprobs=item.logprobs)
        ended = self._event("response.content_part.done", **item.place, part=part)
        body = item.body(status, [part])
        return said + ended + self._event("response.output_item.done", output_index=item.index, item=body)

    def _finished(self, event: Finished) -> bytes:
        if self._reader is None:
            self._reader = self._draft.reader()
        frames = self._said(self._reader.flush(), None)
        response = self.reply()
        is_complete = response.status == "completed"
        if not self._is_answering:
            frames += self._begin(thinking=False)  # an answer may be empty, and is an item all the same
        frames += self._close("completed" if is_complete else "incomplete")
        return frames + self._event(f"response.{response.status}", response=response)

    def _logprobs(self, event: Delivered) -> list[dict[str, Any]]:
        if event.logprobs is None:
            return []
        return [self._logprob(token_id, entry) for token_id, entry in zip(event.token_ids, event.logprobs, strict=True)]

    def _logprob(self, token_id: int, entry: TokenLogprobs) -> dict[str, Any]:
        return {
            **self._token(token_id, clamped(entry.logprob)),
            "top_logprobs": [self._token(top_id, value) for top_id, value in most_likely(entry)],
        }

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        data = self._tokenizer.token_bytes(token_id)
        return {"token": self._tokenizer.token_text(token_id), "bytes": list(data), "logprob": logprob}


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


class _OpenItem:
    """The item that is being said."""

    def __init__(self, item_id: str, index: int, thinking: bool) -> None:
        self.item_id = item_id
        self.index = index
        self.thinking = thinking
        self.text = ""
        self.logprobs: list[dict[str, Any]] = []

    @property
    def place(self) -> dict[str, Any]:
        """Where its only part is."""
        return {"item_id": self.item_id, "output_index": self.index, "content_index": 0}

    def part(self, text: str) -> ReasoningText | OutputContent:
        """Return its part, saying `text`."""
        return ReasoningText(text=text) if self.thinking else OutputContent(text=text, logprobs=self.logprobs)

    def body(self, status: str, content: list[Any]) -> ReasoningBody | MessageBody:
        """Return the item."""
        if self.thinking:
            return ReasoningBody(id=self.item_id, status=status, content=content)
        return MessageBody(id=self.item_id, status=status, role="assistant", content=content)

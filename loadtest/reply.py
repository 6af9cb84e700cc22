"""A streamed chat reply as its bytes arrive: when it came, how much it was, and whether it keeps the API's promises."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import orjson

from loadtest.sse import EventParser


@dataclass(slots=True)
class TurnRecord:
    """What became of one turn. Times are in seconds since the run began; latencies count from `intended_start`."""

    conversation: int
    turn: int  # from 1
    intended_start: float
    sent: float | None = None
    first_token: float | None = None
    end: float = 0.0
    token_gaps: list[float] = field(default_factory=list)  # between one delivery of text and the next
    request_bytes: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    finish_reason: str | None = None
    version: int | None = None
    resume: str | None = None
    error: str | None = None  # its kind; None: the turn succeeded
    violations: list[str] = field(default_factory=list)

    @property
    def ttft_seconds(self) -> float | None:
        """Time to first token, from the intended start."""
        return None if self.first_token is None else self.first_token - self.intended_start

    @property
    def turn_seconds(self) -> float:
        """The whole turn, from the intended start."""
        return self.end - self.intended_start

    @property
    def start_delay_seconds(self) -> float | None:
        """How long after its intended start the request was sent: this program's own share of the latency."""
        return None if self.sent is None else self.sent - self.intended_start

    @property
    def seconds_per_token(self) -> float | None:
        """Mean time per output token after the first delivery."""
        if self.first_token is None or self.output_tokens < 2:
            return None
        return sum(self.token_gaps) / (self.output_tokens - 1)


class StreamedReply:
    """Reads the body of one `text/event-stream` reply into `record`.

    `previous_version` is the version the conversation had before this turn (0: none); None where the server is not
    asked to keep the conversation. `max_tokens` is the limit that was asked for.
    """

    def __init__(self, record: TurnRecord, *, max_tokens: int, previous_version: int | None) -> None:
        self.record = record
        self._max_tokens = max_tokens
        self._previous_version = previous_version
        self._parser = EventParser()
        self._pieces: list[str] = []
        self._last_delivery: float | None = None
        self._done = False
        self._usage_seen = False
        self._conversation: dict[str, Any] | None = None
        self._ids: set[str] = set()

    @property
    def text(self) -> str:
        """What the model said so far."""
        return "".join(self._pieces)

    def feed(self, piece: bytes, now: float) -> None:
        """Take bytes that arrived at `now`."""
        for data in self._parser.feed(piece):
            if self._done:
                self._violate("event_after_done")
            elif data == b"[DONE]":
                self._done = True
            else:
                self._take(data, now)

    def finish(self) -> None:
        """The body ended: check what a whole reply must have. Call once, and only if the connection did not break."""
        if self.record.error is not None:
            return
        if not self._done:
            self._violate("no_done")
        if self.record.finish_reason is None:
            self._violate("no_finish_reason")
        if not self._usage_seen:
            self._violate("no_usage")
        elif not 0 <= self.record.output_tokens <= self._max_tokens:
            self._violate("output_exceeds_max_tokens")
        if len(self._ids) != 1:
            self._violate("id_changes")
        if self._previous_version is not None:
            self._check_conversation(self._previous_version)

    def _take(self, data: bytes, now: float) -> None:
        try:
            event = orjson.loads(data)
        except orjson.JSONDecodeError:
            event = None
        if not isinstance(event, dict):
            self._violate("event_is_not_json")
            return
        if "error" in event:
            self.record.error = f"stream:{error_name(event)}"
            return
        if identity := event.get("id"):
            self._ids.add(identity)
        if conversation := event.get("conversation"):
            self._conversation = conversation
        if usage := event.get("usage"):
            self._take_usage(usage)
        for choice in event.get("choices", ()):
            self._take_choice(choice, now)

    def _take_choice(self, choice: dict[str, Any], now: float) -> None:
        if text := (choice.get("delta") or {}).get("content"):
            if self.record.finish_reason is not None:
                self._violate("text_after_finish")
            self._pieces.append(text)
            if self._last_delivery is None:
                self.record.first_token = now
            else:
                self.record.token_gaps.append(now - self._last_delivery)
            self._last_delivery = now
        if reason := choice.get("finish_reason"):
            if self.record.finish_reason is not None:
                self._violate("second_finish_reason")
            self.record.finish_reason = reason

    def _take_usage(self, usage: dict[str, Any]) -> None:
        self._usage_seen = True
        record = self.record
        record.prompt_tokens = usage.get("prompt_tokens", 0)
        record.output_tokens = usage.get("completion_tokens", 0)
        record.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        if usage.get("total_tokens") != record.prompt_tokens + record.output_tokens:
            self._violate("usage_does_not_add_up")

    def _check_conversation(self, previous_version: int) -> None:
        conversation = self._conversation
        if conversation is None:
            self._violate("no_conversation")
            return
        self.record.version = conversation.get("version")
        self.record.resume = conversation.get("resume")
        if self.record.version != previous_version + 1:
            self._violate("version_not_consecutive")
        if (conversation.get("parent_version") or 0) != previous_version:
            self._violate("wrong_parent_version")
        if (self.record.resume == "new") != (previous_version == 0):
            self._violate("wrong_resume")

    def _violate(self, promise: str) -> None:
        self.record.violations.append(promise)


def error_name(body: object) -> str:
    """Return the code, else the type, of an OpenAI error body; `unknown` where it has neither."""
    error = body.get("error") if isinstance(body, dict) else None
    if not isinstance(error, dict):
        return "unknown"
    return str(error.get("code") or error.get("type") or "unknown")

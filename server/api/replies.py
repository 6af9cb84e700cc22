"""What the two reply writers share: identity, token counts, log-probabilities."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence

import msgspec

from engine.messages import FinishReason, TokenLogprobs
from engine.tokenizer import Tokenizer
from server.conversations.open_turn import TurnReceipt
from server.errors import BadRequest
from server.generation import ChoiceEvent, Delivered, Finished, Prompted
from server.schemas.items import ItemList
from server.schemas.replies import ConversationInfo, PromptTokens, Usage
from server.services import ServedModel
from server.templates import END_OF_THOUGHT

# JSON has no infinity. A log-probability this low is none at all.
LOWEST_LOGPROB = -9999.0

_END_OF_THOUGHT = END_OF_THOUGHT.encode()


def new_reply_id(prefix: str) -> str:
    """Return an id that no other reply has."""
    return f"{prefix}-{uuid.uuid4().hex}"


class Identity:
    """What every part of one reply says about itself."""

    def __init__(self, reply_id: str, model: ServedModel) -> None:
        self.id = reply_id
        self.created = int(time.time())
        self.model = model.name
        self.system_fingerprint = model.system_fingerprint


class ThoughtCounter:
    """Counts the tokens of a thought that begins an answer: those up to the one that ends it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.num_tokens = 0
        self._tokenizer = tokenizer
        self._seen = b""
        self._has_ended = False

    def push(self, token_ids: Sequence[int]) -> None:
        """Take in what comes next."""
        for token_id in token_ids:
            if self._has_ended:
                return
            self.num_tokens += 1
            self._seen = self._seen[1 - len(_END_OF_THOUGHT) :] + self._tokenizer.token_bytes(token_id)
            self._has_ended = _END_OF_THOUGHT in self._seen


class Meter:
    """Counts a request's tokens, and keeps the receipt of its turn."""

    def __init__(self, choices_per_prompt: int) -> None:
        self._choices_per_prompt = choices_per_prompt
        self._num_prompt_tokens: dict[int, int] = {}  # by prompt: its choices share one
        self._num_cached_tokens: dict[int, int] = {}  # likewise: what one of them computes, the others need not
        self._num_kept_tokens: dict[int, int] = {}
        self._num_output_tokens = 0
        self._receipt: TurnReceipt | None = None
        self.thoughts: Sequence[ThoughtCounter] | None = None  # by choice, of those that think; None: none ever do

    def see(self, event: ChoiceEvent) -> None:
        """Take in an event."""
        if isinstance(event, Delivered):
            if self.thoughts:
                self.thoughts[event.index].push(event.token_ids)
            return
        prompt = event.index // self._choices_per_prompt
        if isinstance(event, Prompted):
            self._num_prompt_tokens[prompt] = len(event.prompt_ids)
        elif isinstance(event, Finished):
            known = self._num_cached_tokens.get(prompt, event.num_cached_tokens)
            self._num_cached_tokens[prompt] = min(known, event.num_cached_tokens)
            self._num_kept_tokens[prompt] = max(self._num_kept_tokens.get(prompt, 0), event.num_kept_tokens)
            self._num_output_tokens += event.num_output_tokens
            self._receipt = event.receipt

    @property
    def usage(self) -> Usage:
        """The count so far."""
        counts = (self._num_prompt_tokens, self._num_cached_tokens, self._num_kept_tokens)
        prompts = PromptTokens(*(sum(count.values()) for count in counts))
        num_thought = None if self.thoughts is None else sum(thought.num_tokens for thought in self.thoughts)
        return Usage.of(prompts, self._num_output_tokens, self._receipt, num_thought)

    @property
    def conversation(self) -> ConversationInfo | msgspec.UnsetType:
        """Where the turn left its conversation, if it was one and is applied."""
        return msgspec.UNSET if self._receipt is None else ConversationInfo.of(self._receipt)


def page_of(items: Sequence[msgspec.Raw], *, after: str | None, limit: int, newest_first: bool) -> ItemList:
    """Return up to `limit` of `items`, which are in order, behind the one called `after`; raises `BadRequest`."""
    bodies = [msgspec.json.decode(item, type=_Named) for item in items]
    ids = [body.id for body in bodies]
    order = range(len(ids))[::-1] if newest_first else range(len(ids))
    begin = 0
    if after is not None:
        if after not in ids:
            raise BadRequest("after: there is no such item in the list.", "after")
        begin = order.index(ids.index(after)) + 1
    page = order[begin : begin + limit]
    return ItemList(
        data=[items[index] for index in page],
        first_id=ids[page[0]] if page else None,
        last_id=ids[page[-1]] if page else None,
        has_more=begin + limit < len(ids),
    )


class _Named(msgspec.Struct):
    id: str


def finish_reason(event: Finished) -> str:
    """Return the reason in OpenAI's words."""
    return {FinishReason.STOP: "stop", FinishReason.LENGTH: "length"}[event.reason]


def stop_reason(event: Finished) -> int | str | None:
    """Return the token id or the text that ended the choice."""
    return event.stop_reason.decode() if isinstance(event.stop_reason, bytes) else event.stop_reason


def most_likely(entry: TokenLogprobs) -> Iterator[tuple[int, float]]:
    """Yield `(token id, log-probability)` of the most likely tokens, most likely first."""
    return zip(entry.top_ids, map(clamped, entry.top_logprobs), strict=True)


def clamped(logprob: float) -> float:
    """Return `logprob` as JSON can say it."""
    return max(logprob, LOWEST_LOGPROB)

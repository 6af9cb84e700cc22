"""Bodies of `/v1/chat/completions`."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import msgspec
from pydantic import BeforeValidator, Field, model_validator

from server.errors import BadRequest
from server.schemas.generation import MAX_PROMPT_CHARS, GenerationFields
from server.schemas.replies import ConversationInfo, Usage
from server.schemas.strict import StrictModel

MAX_MESSAGES = 4096


def _as_parts(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


class TextPart(StrictModel):
    """A piece of a message. Images, audio and files are refused by their type."""

    type: Literal["text"]
    text: str


class Message(StrictModel):
    """One message of a chat."""

    # What clients send back when they append a reply of ours, or of OpenAI's, to the next request.
    neutral_values: ClassVar[dict[str, tuple[object, ...]]] = {
        "tool_calls": ([],),
        "function_call": (),
        "refusal": (),
        "audio": (),
        "annotations": ([],),
        "name": (),
    }

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[TextPart], BeforeValidator(_as_parts, json_schema_input_type=str | list[TextPart])]

    @property
    def text(self) -> str:
        """The message's text."""
        return "".join(part.text for part in self.content)


class ChatRequest(GenerationFields):
    """Answer the messages. In a conversation they are the new ones only; it remembers the others."""

    neutral_values: ClassVar[dict[str, tuple[object, ...]]] = {
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "parallel_tool_calls": (True, False),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "response_format": ({"type": "text"},),
        "modalities": (["text"],),
        "audio": (),
        "prediction": (),
        "web_search_options": (),
        "moderation": (),
        "store": (False,),
        "service_tier": ("auto", "default"),
        "verbosity": ("medium",),
    }

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=0)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0)
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None

    @model_validator(mode="after")
    def _check_chat(self) -> ChatRequest:
        if sum(len(part.text) for message in self.messages for part in message.content) > MAX_PROMPT_CHARS:
            raise BadRequest(f"messages: at most {MAX_PROMPT_CHARS} characters.", "messages")
        if self.top_logprobs is not None and not self.logprobs:
            raise BadRequest("top_logprobs: needs logprobs to be true.", "top_logprobs")
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise BadRequest("max_tokens and max_completion_tokens contradict each other.", "max_tokens")
        return self

    @property
    def num_logprobs(self) -> int | None:
        """How many of the most likely tokens to report with each token; None: nothing."""
        return (self.top_logprobs or 0) if self.logprobs else None


class TopLogprob(msgspec.Struct, frozen=True):
    """One of the most likely tokens at a position."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(msgspec.Struct, frozen=True):
    """The token at a position, and the most likely ones."""

    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(msgspec.Struct, frozen=True):
    """Log-probabilities of a choice, or of a chunk."""

    content: list[TokenLogprob]
    refusal: None = None


class Delta(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a chunk adds to the answer: to what is said, or to the thought before it."""

    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None


class AssistantMessage(msgspec.Struct, kw_only=True):
    """The answer."""

    role: str = "assistant"
    content: str = ""
    reasoning_content: str | msgspec.UnsetType = msgspec.UNSET
    refusal: None = None

    def add(self, delta: Delta) -> None:
        """Append what a chunk adds."""
        self.content += delta.content or ""
        if delta.reasoning_content is not None:
            self.reasoning_content = (self.reasoning_content or "") + delta.reasoning_content


class _Choice(msgspec.Struct, kw_only=True):
    index: int
    logprobs: ChoiceLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class ChatChoice(_Choice, kw_only=True):
    """One answer."""

    message: AssistantMessage


class ChatChunkChoice(_Choice, kw_only=True):
    """What a chunk adds to one answer."""

    delta: Delta


class _ChatReply(msgspec.Struct, kw_only=True):
    id: str
    created: int
    model: str
    system_fingerprint: str
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET
    prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
    conversation: ConversationInfo | msgspec.UnsetType = msgspec.UNSET


class ChatCompletion(_ChatReply, kw_only=True):
    """The reply in one piece."""

    object: str = "chat.completion"
    choices: list[ChatChoice]


class ChatChunk(_ChatReply, kw_only=True):
    """One event of a streamed reply."""

    object: str = "chat.completion.chunk"
    choices: list[ChatChunkChoice]

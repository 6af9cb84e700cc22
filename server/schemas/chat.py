"""Bodies of `/v1/chat/completions`."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import msgspec
from pydantic import BeforeValidator, Field, StringConstraints, model_validator

from engine.messages import Grammar
from server.errors import BadRequest
from server.schemas.conversations import Metadata
from server.schemas.generation import MAX_PROMPT_CHARS, GenerationFields
from server.schemas.replies import ConversationInfo, Usage
from server.schemas.strict import StrictModel
from server.schemas.structured import ResponseFormat
from server.schemas.tools import MAX_TOOLS, FunctionDefinition, FunctionName, check_tools, toolbox_of
from server.templates import Toolbox

MAX_MESSAGES = 4096

CallId = Annotated[str, StringConstraints(min_length=1, max_length=128)]


def _as_parts(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


class TextPart(StrictModel):
    """A piece of a message. Images, audio and files are refused by their type."""

    type: Literal["text"]
    text: str


class CalledFunction(StrictModel):
    """What a message of the assistant called, and with what."""

    without_effect: ClassVar[frozenset[str]] = frozenset(
        {"parsed_arguments"}
    )  # OpenAI's client adds the arguments again

    name: FunctionName
    arguments: str


class MessageToolCall(StrictModel):
    """A call in a message of the assistant."""

    without_effect: ClassVar[frozenset[str]] = frozenset({"index"})  # its place in the list, left over from a stream

    id: CallId
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(StrictModel):
    """One message of a chat."""

    # What clients send back when they append a reply of ours, or of OpenAI's, to the next request.
    neutral_values: ClassVar[dict[str, tuple[object, ...]]] = {
        "function_call": (),
        "refusal": (),
        "audio": (),
        "annotations": ([],),
        "name": (),
    }

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[
        list[TextPart] | None, BeforeValidator(_as_parts, json_schema_input_type=str | list[TextPart] | None)
    ] = None
    reasoning_content: str | None = None  # sent back with an answer; the trained form of a history has no thoughts
    tool_calls: list[MessageToolCall] = []
    tool_call_id: CallId | None = None

    def problem(self) -> tuple[str, str] | None:
        """Return the field that its role has no use for, or needs and lacks, and why; None: all is well."""
        if self.reasoning_content is not None and self.role != "assistant":
            return "reasoning_content", "only an answer has a thought"
        if self.tool_calls and self.role != "assistant":
            return "tool_calls", "only an answer calls tools"
        if len(self.tool_calls) > 1:
            return "tool_calls", "an answer of these models makes one call"
        if (self.tool_call_id is not None) != (self.role == "tool"):
            return "tool_call_id", "the message of a tool has one, and no other"
        if self.content is None and not self.tool_calls:
            return "content", "a message without a call needs one"
        return None

    @property
    def text(self) -> str:
        """The message's text."""
        return "".join(part.text for part in self.content or ())

    @property
    def num_chars(self) -> int:
        """Characters that go into the prompt."""
        return len(self.text) + sum(len(call.function.arguments) for call in self.tool_calls)


class FunctionTool(StrictModel):
    """A tool. Functions are the only kind."""

    type: Literal["function"]
    function: FunctionDefinition


class FunctionReference(StrictModel):
    """One of the functions."""

    name: FunctionName


class NamedToolChoice(StrictModel):
    """The function that must be called."""

    type: Literal["function"]
    function: FunctionReference


class ChatRequest(GenerationFields):
    """Answer the messages. In a conversation they are the new ones only; it remembers the others."""

    # A wish for a shorter or longer answer; no model here is trained to follow it.
    without_effect: ClassVar[frozenset[str]] = (GenerationFields.without_effect | {"verbosity"}) - {"metadata"}

    neutral_values: ClassVar[dict[str, tuple[object, ...]]] = {
        "functions": ([],),
        "function_call": ("none", "auto"),
        "modalities": (["text"],),
        "audio": (),
        "prediction": (),
        "web_search_options": (),
        "moderation": (),
        "service_tier": ("auto", "default"),
    }

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    store: bool = False
    metadata: Metadata = {}  # of what is stored
    keep_reasoning: bool = True  # whether the conversation remembers what was thought
    max_completion_tokens: int | None = Field(None, ge=0)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0)
    response_format: ResponseFormat | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    tools: list[FunctionTool] = Field([], max_length=MAX_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool = True  # either way: an answer of these models makes one call

    @model_validator(mode="after")
    def _check_chat(self) -> ChatRequest:
        if sum(message.num_chars for message in self.messages) > MAX_PROMPT_CHARS:
            raise BadRequest(f"messages: at most {MAX_PROMPT_CHARS} characters.", "messages")
        if self.top_logprobs is not None and not self.logprobs:
            raise BadRequest("top_logprobs: needs logprobs to be true.", "top_logprobs")
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise BadRequest("max_tokens and max_completion_tokens contradict each other.", "max_tokens")
        if not self.keep_reasoning and not self.is_stateful:
            raise BadRequest("keep_reasoning: only a conversation remembers anything.", "keep_reasoning")
        return self

    @model_validator(mode="after")
    def _check_tools(self) -> ChatRequest:
        functions = [tool.function for tool in self.tools]
        check_tools(functions, self.tool_choice, self._called_name, lambda index: f"tools[{index}].function.parameters")
        return self

    @model_validator(mode="after")
    def _check_messages(self) -> ChatRequest:
        called: set[str] = set()  # in a conversation a result may answer a call that it remembers
        for index, message in enumerate(self.messages):
            problem = message.problem()
            called.update(call.id for call in message.tool_calls)
            if message.tool_call_id is not None and message.tool_call_id not in called and not self.is_stateful:
                problem = problem or ("tool_call_id", "no message before it makes this call")
            if problem is not None:
                field = f"messages[{index}].{problem[0]}"
                raise BadRequest(f"{field}: {problem[1]}.", field)
        return self

    @property
    def asked_grammars(self) -> dict[str, Grammar]:
        """The grammars of the answer, by the fields that ask for them; there may be one."""
        grammar = None if self.response_format is None else self.response_format.grammar
        return ({} if grammar is None else {"response_format": grammar}) | super().asked_grammars

    @property
    def is_remembered(self) -> bool:
        """Whether anything is left of the answer when it has been told."""
        return self.is_stateful or self.store

    @property
    def num_logprobs(self) -> int | None:
        """How many of the most likely tokens to report with each token; None: nothing."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def toolbox(self) -> Toolbox | None:
        """The tools that the model hears of; None: it is not to call any."""
        return toolbox_of([tool.function for tool in self.tools], self.tool_choice, self._called_name)

    @property
    def _called_name(self) -> str | None:
        return self.tool_choice.function.name if isinstance(self.tool_choice, NamedToolChoice) else None


class ChatCompletionUpdate(StrictModel):
    """Change the metadata of a stored completion."""

    metadata: Metadata


class ChatCompletionDeleted(msgspec.Struct, frozen=True, kw_only=True):
    """A stored completion is gone."""

    id: str
    object: str = "chat.completion.deleted"
    deleted: bool = True


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


class FunctionDelta(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a chunk adds to a call: its name with the first, then its arguments as they come."""

    name: str | None = None
    arguments: str


class ToolCallDelta(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a chunk adds to a call; identity comes with the first."""

    index: int
    id: str | None = None
    type: str | None = None
    function: FunctionDelta


class Delta(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a chunk adds to the answer: to the thought, to what is said, to a call."""

    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class FunctionCall(msgspec.Struct, kw_only=True):
    """Of which function, and with what, as JSON text."""

    name: str
    arguments: str


class ToolCall(msgspec.Struct, kw_only=True):
    """A call that the answer makes."""

    id: str
    type: str = "function"
    function: FunctionCall


class AssistantMessage(msgspec.Struct, kw_only=True):
    """The answer."""

    role: str = "assistant"
    content: str | None = ""
    reasoning_content: str | msgspec.UnsetType = msgspec.UNSET
    tool_calls: list[ToolCall] | msgspec.UnsetType = msgspec.UNSET
    refusal: None = None

    def add(self, delta: Delta) -> None:
        """Append what a chunk adds."""
        self.content = (self.content or "") + (delta.content or "")
        if delta.reasoning_content is not None:
            self.reasoning_content = (self.reasoning_content or "") + delta.reasoning_content
        for call in delta.tool_calls or ():
            self._add_call(call)
        if self.tool_calls:
            self.content = self.content or None

    def _add_call(self, delta: ToolCallDelta) -> None:
        calls = self.tool_calls = self.tool_calls or []
        if delta.id is not None:
            calls.append(ToolCall(id=delta.id, function=FunctionCall(name=delta.function.name or "", arguments="")))
        calls[delta.index].function.arguments += delta.function.arguments


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
    metadata: dict[str, str] | msgspec.UnsetType = msgspec.UNSET  # of one that is stored


class ChatChunk(_ChatReply, kw_only=True):
    """One event of a streamed reply."""

    object: str = "chat.completion.chunk"
    choices: list[ChatChunkChoice]

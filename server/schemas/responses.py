"""Bodies of `/v1/responses`."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import msgspec
from pydantic import BeforeValidator, Field, StringConstraints, model_validator

from engine.messages import Grammar
from server.errors import BadRequest
from server.schemas.conversations import Metadata
from server.schemas.generation import MAX_PROMPT_CHARS, ConversationReference, SamplingFields, as_reference
from server.schemas.items import InputItems, check_size
from server.schemas.strict import StrictModel
from server.schemas.structured import JsonSchema, SchemaName, json_grammar
from server.schemas.tools import MAX_TOOLS, FunctionDefinition, FunctionName, check_tools, toolbox_of
from server.templates import Toolbox

RESPONSE_ID = r"resp_[A-Za-z0-9]{1,64}"
ResponseId = Annotated[str, StringConstraints(pattern=rf"^{RESPONSE_ID}$")]

LOGPROBS = "message.output_text.logprobs"
INCLUDABLE = frozenset(
    {
        LOGPROBS,
        # What these would add comes from tools that this server does not have, so there is never anything to add.
        "web_search_call.results",
        "web_search_call.action.sources",
        "file_search_call.results",
        "code_interpreter_call.outputs",
        "computer_call_output.output.image_url",
        "message.input_image.image_url",
        # Thoughts are stored or sent back in plain text.
        "reasoning.encrypted_content",
    }
)


def _as_items(value: Any) -> Any:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


def _functions_only(value: Any) -> Any:
    """Refuse other tools by their type, before what else they lack."""
    for index, tool in enumerate(value if isinstance(value, list) else ()):
        if isinstance(tool, dict) and tool.get("type", "function") != "function":
            field = f"tools[{index}].type"
            raise BadRequest(f"{field}: functions are the only kind of tool here.", field, "unsupported_parameter")
    return value


class Reasoning(StrictModel):
    """How to think before the answer. A thought is streamed as it is, so there is no summary of it."""

    without_effect: ClassVar[frozenset[str]] = frozenset({"summary", "generate_summary", "context", "mode"})

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None


class TextFormat(JsonSchema):
    """What form the answer has: chat's `response_format` without its inner object."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: SchemaName | None = None  # type: ignore[assignment]

    @model_validator(mode="after")
    def _check_format(self) -> TextFormat:
        if (self.type == "json_schema") != (self.schema_ is not None and self.name is not None):
            message = "there must be a name and a schema with type json_schema, and only then."
            raise BadRequest(f"text.format: {message}", "text.format")
        return self

    @property
    def grammar(self) -> Grammar | None:
        """The grammar that is asked for; None for plain text."""
        return None if self.type == "text" else json_grammar(self.schema_)


class TextConfig(StrictModel):
    """How the answer is written."""

    without_effect: ClassVar[frozenset[str]] = frozenset({"verbosity"})  # a wish; no model here is trained to follow it

    format: TextFormat = TextFormat()


class ResponseTool(FunctionDefinition):
    """A function that the model may call. Functions are the only kind of tool."""

    type: Literal["function"]


class ResponseToolChoice(StrictModel):
    """The function that must be called."""

    type: Literal["function"]
    name: FunctionName


class ResponseStreamOptions(StrictModel):
    """What a stream says besides events."""

    neutral_values: ClassVar[dict[str, tuple[object, ...]]] = {"include_obfuscation": (False,)}


class ResponseRequest(SamplingFields):
    """Answer the input, after everything that came before it in a conversation or a chain of responses."""

    without_effect: ClassVar[frozenset[str]] = SamplingFields.without_effect | {"context_management"}
    neutral_values: ClassVar[dict[str, tuple[object, ...]]] = {
        "max_tool_calls": (),
        "prompt": (),
        "service_tier": ("auto", "default"),
        "moderation": (),
        "background_options": (),
        "image": (),
        "access_programs": (),
    }

    input: Annotated[InputItems, BeforeValidator(_as_items)] = Field(min_length=1)
    instructions: Annotated[str, StringConstraints(max_length=MAX_PROMPT_CHARS)] | None = None
    previous_response_id: ResponseId | None = None
    conversation: Annotated[ConversationReference | None, BeforeValidator(as_reference)] = None
    store: bool = True
    background: bool = False
    metadata: Metadata = {}
    max_output_tokens: int | None = Field(None, ge=1)
    reasoning: Reasoning = Reasoning()
    keep_reasoning: bool = True  # whether what was thought is remembered
    text: TextConfig = TextConfig()
    include: list[str] = []
    top_logprobs: int | None = Field(None, ge=0)
    tools: Annotated[list[ResponseTool], BeforeValidator(_functions_only)] = Field([], max_length=MAX_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | ResponseToolChoice | None = None
    parallel_tool_calls: bool = True  # either way: an answer of these models makes one call
    truncation: Literal["auto", "disabled"] = "disabled"  # a recurrent state has no window to cut to
    stream_options: ResponseStreamOptions = ResponseStreamOptions()

    @model_validator(mode="after")
    def _check_response(self) -> ResponseRequest:
        check_size("input", self.input)
        if self.conversation is not None and self.previous_response_id is not None:
            raise BadRequest("previous_response_id and conversation exclude each other.", "previous_response_id")
        if self.background and not self.store:
            raise BadRequest("background: a response that is not stored cannot be asked for later.", "background")
        check_tools(self.tools, self.tool_choice, self._called_name, lambda index: f"tools[{index}].parameters")
        if not self.keep_reasoning and not self.is_remembered:
            raise BadRequest("keep_reasoning: nothing of this response is remembered.", "keep_reasoning")
        unknown = [name for name in self.include if name not in INCLUDABLE]
        if unknown:
            raise BadRequest("include: there is no such addition.", "include")
        return self

    @property
    def is_remembered(self) -> bool:
        """Whether anything is left of the answer when it has been told."""
        return self.store or self.conversation is not None

    @property
    def asked_grammars(self) -> dict[str, Grammar]:
        """The grammars of the answer, by the fields that ask for them; there may be one."""
        grammar = self.text.format.grammar
        return ({} if grammar is None else {"text.format": grammar}) | super().asked_grammars

    @property
    def _called_name(self) -> str | None:
        return self.tool_choice.name if isinstance(self.tool_choice, ResponseToolChoice) else None

    @property
    def toolbox(self) -> Toolbox | None:
        """The tools that the model hears of; None: it is not to call any."""
        return toolbox_of(self.tools, self.tool_choice, self._called_name)

    @property
    def num_logprobs(self) -> int | None:
        """How many of the most likely tokens to report with each token; None: nothing."""
        if self.top_logprobs is None and LOGPROBS not in self.include:
            return None
        return self.top_logprobs or 0


class InputTokensRequest(ResponseRequest):
    """Count what an input would cost, without an answer."""

    input: Annotated[InputItems, BeforeValidator(_as_items)] = []


class InputTokensReply(msgspec.Struct, frozen=True, kw_only=True):
    """How many tokens the model would read."""

    object: str = "response.input_tokens"
    input_tokens: int


class InputTokensDetails(msgspec.Struct, frozen=True, kw_only=True):
    """Of the tokens read, how many cost nothing, and how many left their state behind."""

    cached_tokens: int
    cache_write_tokens: int


class OutputTokensDetails(msgspec.Struct, frozen=True, kw_only=True):
    """Of the tokens generated, how many were thought."""

    reasoning_tokens: int


class ResponseUsage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens of a response, its whole history included."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseFailure(msgspec.Struct, frozen=True, kw_only=True):
    """Why there is no answer."""

    code: str
    message: str


class IncompleteDetails(msgspec.Struct, frozen=True, kw_only=True):
    """Why the answer ends early."""

    reason: str


class ReasoningReply(msgspec.Struct, frozen=True, kw_only=True):
    """How was thought."""

    effort: str | None = None
    summary: None = None


class TextReply(msgspec.Struct, frozen=True, kw_only=True):
    """How the answer is written."""

    format: dict[str, Any] = msgspec.field(default_factory=lambda: {"type": "text"})


class StateInfo(msgspec.Struct, frozen=True, kw_only=True):
    """How the model's state before the input was obtained, and what the response survives; null: it is not stored."""

    resume: str  # new | hot | restored | replayed
    durability: str | None  # memory | acked | fsynced
    version: int | None  # of its conversation
    parent_version: int | None


class Response(msgspec.Struct, frozen=True, kw_only=True):
    """A response: a request, what became of it, and where that leaves its conversation."""

    id: str
    object: str = "response"
    created_at: int
    completed_at: int | None = None
    status: str  # queued | in_progress | completed | incomplete | failed | cancelled
    background: bool = False
    error: ResponseFailure | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    max_tool_calls: None = None
    metadata: dict[str, str] = {}
    model: str
    output: list[msgspec.Raw] = []
    parallel_tool_calls: bool = False
    previous_response_id: str | None = None
    conversation: dict[str, str] | None = None
    reasoning: ReasoningReply = ReasoningReply()
    service_tier: str = "default"
    store: bool = True
    temperature: float
    top_p: float
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    text: TextReply = TextReply()
    tool_choice: Any = "none"
    tools: list[Any] = []
    top_logprobs: int = 0
    truncation: str = "disabled"
    usage: ResponseUsage | None = None
    state: StateInfo | None = None  # ours


class ResponseDeleted(msgspec.Struct, frozen=True, kw_only=True):
    """A response is gone."""

    id: str
    object: str = "response"
    deleted: bool = True

"""Bodies of `/v1/completions`."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import msgspec
from pydantic import BeforeValidator, Field, model_validator

from server.errors import BadRequest
from server.schemas.generation import MAX_CHOICES, MAX_PROMPT_CHARS, MAX_SEQUENCES, GenerationFields
from server.schemas.replies import ConversationInfo, Usage

Prompt = str | list[int]


def _as_prompts(value: Any) -> list[Prompt]:
    """Return the four shapes a prompt may have as one: a list of texts and lists of token ids."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        if all(type(item) is int for item in value):
            return [value]
        if all(isinstance(item, str) for item in value):
            return value
        if all(isinstance(item, list) and all(type(token_id) is int for token_id in item) for item in value):
            return value
    raise BadRequest("prompt: must be a string, strings, token ids, or lists of token ids.", "prompt")


class CompletionRequest(GenerationFields):
    """Continue a text, or several."""

    neutral_values: ClassVar[dict[str, tuple[object, ...]]] = {
        "suffix": ("",),
        "store": (False,),
        "service_tier": ("auto", "default"),
    }

    prompt: Annotated[
        list[Any], BeforeValidator(_as_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]])
    ]
    echo: bool = False
    logprobs: int | None = Field(None, ge=0)
    best_of: int | None = Field(None, ge=1, le=MAX_CHOICES)

    @model_validator(mode="after")
    def _check_prompts(self) -> CompletionRequest:
        if any(len(prompt) > MAX_PROMPT_CHARS for prompt in self.prompts):
            raise BadRequest(f"prompt: at most {MAX_PROMPT_CHARS} characters or tokens.", "prompt")
        self._check_best_of()
        if len(self.prompts) * self.num_candidates > MAX_SEQUENCES:
            raise BadRequest(f"prompt: at most {MAX_SEQUENCES} choices a request.", "prompt")
        if self.is_stateful and len(self.prompts) > 1:
            raise BadRequest("prompt: a conversation has one next turn, so there must be one prompt.", "prompt")
        return self

    def _check_best_of(self) -> None:
        if self.best_of is None:
            return
        if self.best_of < self.n:
            raise BadRequest("best_of: must not be below n.", "best_of")
        if self.best_of > self.n and self.stream:
            raise BadRequest("best_of: which choices are the best is known at the end; not for streams.", "best_of")
        if self.best_of > 1 and self.is_stateful:
            raise BadRequest("best_of: a conversation has one next turn, so best_of must be 1.", "best_of")

    @property
    def num_candidates(self) -> int:
        """How many continuations of each prompt are generated; the best `n` of them are told."""
        return self.best_of or self.n

    @property
    def prompts(self) -> list[Prompt]:
        """The prompts, each a text or token ids."""
        return self.prompt


class CompletionLogprobs(msgspec.Struct):
    """Log-probabilities of a choice's tokens, in four lists of equal length."""

    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] = []
    text_offset: list[int] = []

    def extend(self, more: CompletionLogprobs) -> None:
        """Append the lists of the tokens that follow."""
        self.tokens += more.tokens
        self.token_logprobs += more.token_logprobs
        self.top_logprobs += more.top_logprobs
        self.text_offset += more.text_offset


class CompletionChoice(msgspec.Struct, kw_only=True):
    """One continuation, or what a chunk adds to it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
    prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class Completion(msgspec.Struct, kw_only=True):
    """The reply, and every chunk of a stream."""

    id: str
    object: str = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET
    conversation: ConversationInfo | msgspec.UnsetType = msgspec.UNSET

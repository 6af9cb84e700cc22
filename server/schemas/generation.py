"""The fields that completions and chat share: sampling, stopping, streaming, conversations; and their limits."""

from __future__ import annotations

import secrets
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, StringConstraints, model_validator

from engine.messages import Grammar, SamplingParams, StopRules
from server.errors import BadRequest
from server.schemas.strict import StrictModel
from server.schemas.structured import GrammarText, StructuredOutputs, lark_grammar, regex_grammar

MAX_CHOICES = 16  # n, and what a batch of prompts may add up to with it is MAX_SEQUENCES
MAX_SEQUENCES = 128
MAX_PROMPT_CHARS = 1_000_000
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_STOP_TOKEN_IDS = 128
MAX_LOGIT_BIASES = 1024
MAX_QUEUE_MS = 60_000

CONVERSATION_ID = r"[A-Za-z0-9_.:@-]{1,128}"
ConversationId = Annotated[str, StringConstraints(pattern=rf"^{CONVERSATION_ID}$")]

StopText = Annotated[str, StringConstraints(min_length=1, max_length=MAX_STOP_CHARS)]
StopTexts = Annotated[list[StopText], Field(max_length=MAX_STOPS)]


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def as_reference(value: object) -> object:
    """Return the reference that a bare id stands for."""
    return {"id": value} if isinstance(value, str) else value


class StreamOptions(StrictModel):
    """What a stream says besides tokens."""

    neutral_values = {"include_obfuscation": (False,)}

    include_usage: bool = False


class ConversationReference(StrictModel):
    """OpenAI's way to name a conversation: it must exist."""

    id: ConversationId


class SamplingFields(StrictModel):
    """How to choose tokens and when to stop, whatever the route."""

    without_effect: ClassVar[frozenset[str]] = frozenset(
        {
            "user",  # names the client's user for abuse reports
            "safety_identifier",
            "metadata",  # of what is stored: see the requests that can be
            "prompt_cache_key",  # hints where to look for a cache
            "prompt_cache_options",
            "prompt_cache_retention",
        }
    )

    model: str | None = None
    stream: bool = False

    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, lt=2**31)  # 0 and, as elsewhere, -1: off
    min_p: float = Field(0.0, ge=0, le=1)
    typical_p: float = Field(1.0, gt=0, le=1)
    top_n_sigma: float = Field(0.0, ge=-1, le=100)  # 0 and, as elsewhere, -1: off
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, ge=0.01, le=10)  # float32 has room for a score divided by it
    penalty_decay: float = Field(1.0, gt=0, le=1)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = Field({}, max_length=MAX_LOGIT_BIASES)
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)

    stop: Annotated[list[StopText], BeforeValidator(_as_list, json_schema_input_type=StopText | StopTexts)] = Field(
        [], max_length=MAX_STOPS
    )
    stop_token_ids: list[int] = Field([], max_length=MAX_STOP_TOKEN_IDS)
    ignore_eos: bool = False
    min_tokens: int = Field(0, ge=0)

    structured_outputs: StructuredOutputs | None = None
    guided_regex: GrammarText | None = None
    guided_grammar: GrammarText | None = None
    priority: int = Field(0, ge=-(2**31), lt=2**31)
    on_disconnect: Literal["abort", "finish"] = "abort"

    @model_validator(mode="after")
    def _check_sampling(self) -> SamplingFields:
        if -1 < self.top_n_sigma < 0:
            raise BadRequest("top_n_sigma: must be -1 or not negative.", "top_n_sigma")
        if len(asked := self.asked_grammars) > 1:
            first, second, *_ = asked
            raise BadRequest(f"{first} and {second} exclude each other.", first)
        if self.outlives_reader and not self.is_remembered:
            raise BadRequest("on_disconnect: only what is remembered or stored can be finished.", "on_disconnect")
        return self

    @property
    def outlives_reader(self) -> bool:
        """Whether to go on when the client has left."""
        return self.on_disconnect == "finish"

    @property
    def is_remembered(self) -> bool:
        """Whether anything is left of the answer when it has been told."""
        raise NotImplementedError

    @property
    def asked_grammars(self) -> dict[str, Grammar]:
        """The grammars of the output, by the fields that ask for them; there may be one."""
        asked: dict[str, Grammar] = {}
        if self.structured_outputs is not None:
            name, grammar = self.structured_outputs.asked
            asked[f"structured_outputs.{name}"] = grammar
        if self.guided_regex is not None:
            asked["guided_regex"] = regex_grammar(self.guided_regex)
        if self.guided_grammar is not None:
            asked["guided_grammar"] = lark_grammar(self.guided_grammar)
        return asked

    @property
    def grammar(self) -> Grammar | None:
        """The grammar of the output, if one is asked for."""
        return next(iter(self.asked_grammars.values()), None)

    def sampling(self, vocab_size: int, num_logprobs: int | None) -> SamplingParams:
        """Return how to sample; the seed is drawn if none was given."""
        return SamplingParams(
            seed=secrets.randbits(63) if self.seed is None else self.seed % 2**64,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(self.top_k, 0),
            min_p=self.min_p,
            typical_p=self.typical_p,
            top_n_sigma=max(self.top_n_sigma, 0.0),
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            penalty_decay=self.penalty_decay,
            logit_bias={_token_id(key, vocab_size): bias for key, bias in self.logit_bias.items()},
            num_logprobs=num_logprobs,
            grammar=self.grammar,
        )

    def stop_rules(
        self, max_tokens: int, vocab_size: int, eos_token_ids: tuple[int, ...], stop_strings: tuple[str, ...] = ()
    ) -> StopRules:
        """Return when to stop: the request's own rules, the model's end of text, and a template's `stop_strings`."""
        if any(not 0 <= token_id < vocab_size for token_id in self.stop_token_ids):
            raise BadRequest(f"stop_token_ids: ids must lie in [0, {vocab_size}).", "stop_token_ids")
        if self.min_tokens > max_tokens:
            raise BadRequest(f"min_tokens: must not be above max_tokens, which is {max_tokens}.", "min_tokens")
        ends = () if self.ignore_eos else eos_token_ids
        return StopRules(
            max_tokens=max_tokens,
            stop_token_ids=tuple(dict.fromkeys((*self.stop_token_ids, *ends))),
            stop_strings=tuple(dict.fromkeys(text.encode() for text in (*self.stop, *stop_strings))),
            min_tokens=self.min_tokens,
        )


class GenerationFields(SamplingFields):
    """What completions and chat share besides sampling: choices, streams, conversations."""

    max_tokens: int | None = Field(None, ge=0)
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    stream_options: StreamOptions = StreamOptions()
    return_token_ids: bool = False

    conversation: Annotated[
        ConversationReference | None,
        BeforeValidator(as_reference, json_schema_input_type=ConversationId | ConversationReference),
    ] = None
    conversation_id: ConversationId | None = None
    initial_state: str | None = None  # name of a tuned state to begin from
    queue_ms: int = Field(0, ge=0, le=MAX_QUEUE_MS)

    @model_validator(mode="after")
    def _check_combinations(self) -> GenerationFields:
        if self.conversation is not None and self.conversation_id is not None:
            raise BadRequest("conversation and conversation_id exclude each other.", "conversation")
        if self.is_stateful and self.n > 1:
            raise BadRequest("n: a conversation has one next turn, so n must be 1.", "n")
        if self.queue_ms and not self.is_stateful:
            raise BadRequest("queue_ms: only a turn of a conversation can wait for another.", "queue_ms")
        if "stream_options" in self.model_fields_set and not self.stream:
            raise BadRequest("stream_options: only for streams.", "stream_options")
        return self

    @property
    def is_stateful(self) -> bool:
        """Whether this is a turn of a conversation."""
        return self.conversation is not None or self.conversation_id is not None

    @property
    def is_remembered(self) -> bool:
        """Whether anything is left of the answer when it has been told."""
        return self.is_stateful


def _token_id(key: str, vocab_size: int) -> int:
    if not (key.isascii() and key.isdecimal() and len(key) < 10 and int(key) < vocab_size):
        raise BadRequest(f"logit_bias: keys must be token ids in [0, {vocab_size}).", "logit_bias")
    return int(key)

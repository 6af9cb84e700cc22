"""What crosses the seam between an API process and an engine: small, typed, torch-free messages.

Tokens and names cross; text, tensors and state blobs never do. Commands flow from a client to the engine, events flow
back. Both are tagged msgspec structs, encoded as MessagePack.

Vocabulary: a *sequence* is one running request. Its *state* is identified by `(num_tokens, chain)`: how many tokens
it has consumed and the chain hash of exactly those tokens (`engine.token_chain`).
"""

from __future__ import annotations

import enum
from typing import Any, Literal

import msgspec

PROTOCOL_VERSION = 1


class FinishReason(enum.StrEnum):
    """Why a sequence ended."""

    STOP = "stop"  # a stop token or a stop string
    LENGTH = "length"  # max_tokens
    ABORT = "abort"  # asked to, by its client or by a drain
    ERROR = "error"  # see SequenceFailed


class ResumeKind(enum.StrEnum):
    """How the state before the prompt was obtained (promise P9)."""

    NEW = "new"  # nothing was consumed yet: the zero state, or the tuned state that the history begins from
    HOT = "hot"  # it was still in the engine's memory
    RESTORED = "restored"  # loaded from a checkpoint that had consumed exactly these tokens
    REPLAYED = "replayed"  # recomputed, wholly or from an older checkpoint on, from the token log


class Grammar(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What an output must look like, from its first token to its last. Compiled by `engine.runner.grammars`."""

    kind: Literal["json_schema", "json_object", "regex", "lark"]
    text: str = ""  # the schema as JSON, the regular expression, the grammar; nothing for a JSON object
    after: str = ""  # the grammar applies after the first time this text comes (the end of a thought)
    lead: str = ""  # regular expression: up to four characters of this may come right before
    # A model writes them to complete the opening of its answer.


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the next token is chosen. The order of the steps is documented in `engine.runner.sampler`.

    `seed` and the token's position key the random numbers, so sampling has no hidden state.
    """

    seed: int  # [0, 2**64)
    temperature: float = 1.0  # 0 = greedy
    top_p: float = 1.0  # (0, 1]; 1 = off
    top_k: int = 0  # 0 = off
    min_p: float = 0.0  # [0, 1]; 0 = off
    typical_p: float = 1.0  # (0, 1]; 1 = off
    top_n_sigma: float = 0.0  # 0 = off
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0  # 1 = off
    penalty_decay: float = 1.0  # (0, 1]; counts shrink by this factor with each generated token (RWKV: 0.996)
    logit_bias: dict[int, float] = {}
    num_logprobs: int | None = None  # None: no log-probabilities; k: the chosen token's and the k most likely
    grammar: Grammar | None = None

    @property
    def is_plain(self) -> bool:
        """Whether the next token is a matter of its logits, temperature, top-k, top-p and min-p alone."""
        return (
            not self.has_penalties
            and self.typical_p == 1
            and self.top_n_sigma == 0
            and not self.logit_bias
            and self.num_logprobs is None
            and self.grammar is None
        )

    @property
    def has_penalties(self) -> bool:
        """Whether tokens that were generated before weigh on the next."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0 or self.repetition_penalty != 1


class StopRules(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """When a sequence ends. Neither a stop token nor any byte of a stop string is part of its output or its state."""

    max_tokens: int  # generated tokens; 0 = consume the prompt only
    stop_token_ids: tuple[int, ...] = ()
    stop_strings: tuple[bytes, ...] = ()  # UTF-8, none empty
    min_tokens: int = 0  # so many are generated before any of these counts: the text in them is not searched either


class CheckpointRef(msgspec.Struct, frozen=True, kw_only=True):
    """The name of a stored state, and what it must turn out to be."""

    checkpoint_id: str  # random, never reused
    num_tokens: int
    chain: bytes
    num_bytes: int = 0


class InitialStateRef(msgspec.Struct, frozen=True):
    """A tuned state that a history may begin from instead of the zero state: its name, and what it must turn out to be.

    The fingerprint is of its content: it is part of the root of every chain that begins there.
    """

    name: str
    fingerprint: str  # hex


class StateSource(msgspec.Struct, frozen=True, kw_only=True):
    """How to obtain the state that has consumed exactly the `num_tokens` tokens behind `chain`.

    The engine tries its own memory, then `checkpoint` followed by `replay_ids` (the tokens after the checkpoint),
    and without a checkpoint `replay_ids` from the initial state, which must then be the whole history. If none of
    these can work it answers `SequenceFailed(code="state_unavailable")` and the client submits again with the whole
    history.
    """

    num_tokens: int
    chain: bytes
    checkpoint: CheckpointRef | None = None
    replay_ids: list[int] = []
    initial_state: InitialStateRef | None = None  # what the history begins from; None: the zero state


class GenerationRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One sequence to run: from a state, through `prompt_ids`, to its end."""

    request_id: str
    prompt_ids: list[int]  # never empty
    sampling: SamplingParams
    stop: StopRules
    source: StateSource
    keep_state: bool = False  # keep the final state in memory under its chain, so it can be resumed or saved
    num_prompt_logprobs: int | None = None  # as SamplingParams.num_logprobs, for every prompt token but the first
    priority: int = 0  # who gets a free slot: lower first, then by arrival
    counted_ids: list[int] = []  # generated earlier in the conversation, oldest first: penalties count them too
    # Ascending positions in `prompt_ids`, neither of its ends: here the prompt may be resumed from a state that another
    # request left behind, and leave one. Only with the empty history as source.
    borders: list[int] = []


# -- commands: client to engine ---------------------------------------------------------------------------------------


class Hello(msgspec.Struct, frozen=True, tag=True):
    """First message of a client; answered with `EngineReady` when the model is loaded."""

    protocol_version: int = PROTOCOL_VERSION


class Submit(msgspec.Struct, frozen=True, tag=True):
    """Run `request`. Answered with `SequenceStarted`, then outputs, or `SequenceFailed`."""

    request: GenerationRequest


class Abort(msgspec.Struct, frozen=True, tag=True):
    """End a sequence within one step. Answered with a last output of reason `abort`; unknown ids are ignored."""

    request_id: str


class SaveState(msgspec.Struct, frozen=True, tag=True):
    """Write the kept state behind `chain` to the state store under a fresh id: `CheckpointStored` or
    `CheckpointFailed`.

    The state may still be settling; the engine writes it when it is final. If it is not in memory it is copied from
    `copy_of`, a checkpoint of the same tokens, if one is given.
    """

    chain: bytes
    num_tokens: int
    copy_of: CheckpointRef | None = None


class AdoptCheckpoint(msgspec.Struct, frozen=True, tag=True):
    """Verify a stored state that came from elsewhere and write it under a fresh id: `CheckpointStored` or
    `CheckpointFailed`, with its id in `adopted`.

    It must be the state that `checkpoint` names, of the model being served; what is written has consumed the same
    tokens and is named by `chain`, whose root may be another. Nothing of it is kept in memory, and `checkpoint` stays.
    """

    checkpoint: CheckpointRef
    chain: bytes


class ForgetState(msgspec.Struct, frozen=True, tag=True):
    """Drop the kept state behind `chain` from memory (a deleted conversation)."""

    chain: bytes


class DeleteCheckpoints(msgspec.Struct, frozen=True, tag=True):
    """Remove stored states that nothing points to any more."""

    checkpoint_ids: tuple[str, ...]


class Drain(msgspec.Struct, frozen=True, tag=True):
    """Take no new sequences, finish the running ones, write pending checkpoints; answered with `Drained`.

    What still runs after `timeout_seconds` is aborted.
    """

    timeout_seconds: float


Command = Hello | Submit | Abort | SaveState | AdoptCheckpoint | ForgetState | DeleteCheckpoints | Drain


# -- events: engine to client -----------------------------------------------------------------------------------------


class EngineReady(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """The model is loaded and has run a step."""

    fingerprint: str  # identifies the weights, hex
    generation: str  # "7"
    vocab_size: int
    num_layers: int
    width: int
    num_parameters: int
    state_bytes: int
    device: str
    dtype: str
    state_dtype: str = "float32"
    max_num_seqs: int
    max_num_batched_tokens: int
    initial_states: tuple[InitialStateRef, ...] = ()  # what histories may begin from, by name


class SequenceStarted(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """The state is in a slot and the prompt is about to be consumed."""

    request_id: str
    resume: ResumeKind
    num_replayed_tokens: int = 0
    num_cached_tokens: int = 0  # of the prompt, that a state at one of its borders had consumed already
    queue_seconds: float = 0.0
    load_seconds: float = 0.0  # to fetch, verify and place a checkpoint


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities (natural, before temperature and truncation) at one position, most likely first."""

    logprob: float  # of the token that stands here
    top_ids: list[int] = []
    top_logprobs: list[float] = []


class SequenceOutput(msgspec.Struct, frozen=True, tag=True, kw_only=True, omit_defaults=True):
    """What one step brought for one sequence.

    `token_ids` are final: bytes that might become part of a stop string are held back until that is decided. The
    concatenation of all `token_ids` of a sequence is its output, and the tokens its kept state has consumed after the
    prompt. Where a stop string ends inside a token, the bytes before it arrive re-encoded as tokens of their own.
    """

    request_id: str
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] | None = None  # one per token id, when asked for
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # of the prompt tokens consumed in this step
    finish_reason: FinishReason | None = None
    stop_reason: int | bytes | None = None  # the stop token or stop string that ended it
    stop_logprobs: TokenLogprobs | None = None  # of the stop token that ended it, when asked for
    num_sampled_tokens: int = 0  # in the last output: tokens computed, held-back and stop tokens included
    num_kept_tokens: int = 0  # in the last output: prompt tokens computed for this request that a kept state consumed


class SequenceFailed(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """A sequence was refused or broke. Nothing of it is kept."""

    request_id: str
    # queue_full | draining | invalid_request | initial_state_unavailable | state_unavailable | numerical_error |
    # engine_error
    code: str
    message: str
    field: str | None = None


class CheckpointStored(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """A state is in the store, whole and synced as far as the store can."""

    ref: CheckpointRef
    save_seconds: float = 0.0
    tier: str = ""  # file | redis
    adopted: str = ""  # the checkpoint that was adopted, if this is what came of that


class CheckpointFailed(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """A state could not be written. The conversation is intact; its next resume may have to replay."""

    chain: bytes
    num_tokens: int
    reason: str  # a label: not_kept | store_unavailable | rejected | ...
    message: str
    adopted: str = ""  # the checkpoint that should have been adopted, if that is what failed


class Drained(msgspec.Struct, frozen=True, tag=True):
    """Nothing runs and nothing waits to be written."""


class StepStats(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """One engine step in numbers."""

    step_seconds: float
    num_decode_tokens: int
    num_prefill_tokens: int
    num_sequences: int


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """How the engine is; sent with every step and at least once a second."""

    num_steps: int
    num_running: int
    num_waiting: int
    num_slots_used: int
    num_slots: int
    num_hot_states: int
    hot_state_bytes: int
    pending_checkpoints: int
    counters: dict[str, float] = {}  # monotonic totals, by metric name; declared in server.metrics


class StepReport(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Everything one step has to say to one client, in one message."""

    events: list[SequenceStarted | SequenceOutput | SequenceFailed | CheckpointStored | CheckpointFailed] = []
    step: StepStats | None = None
    stats: EngineStats | None = None


Event = EngineReady | StepReport | Drained


_encoder = msgspec.msgpack.Encoder()
_command_decoder: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)
_event_decoder: msgspec.msgpack.Decoder[Event] = msgspec.msgpack.Decoder(Event)


def encode(message: Command | Event) -> bytes:
    """Return `message` as MessagePack."""
    return _encoder.encode(message)


def decode_command(data: Any) -> Command:
    """Return the command in `data` (bytes-like); raises `msgspec.ValidationError` for anything else."""
    return _command_decoder.decode(data)


def decode_event(data: Any) -> Event:
    """Return the event in `data` (bytes-like); raises `msgspec.ValidationError` for anything else."""
    return _event_decoder.decode(data)

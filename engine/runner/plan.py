"""One step of the engine as data: what the scheduler asks of a model runner, and what comes back. No tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec

from engine.messages import SamplingParams, TokenLogprobs
from engine.runner.grammars import GrammarMatcher
from engine.state.spec import RecurrentState, StateSpec


class Chunk(msgspec.Struct, frozen=True):
    """The tokens one slot consumes in this step. A decode is a chunk of length one."""

    slot: int
    token_ids: Sequence[int]
    sampling: SamplingParams | None = None  # sample a token after the last one
    position: int = 0  # tokens in the history before the sampled one; with the seed, it keys the random number
    num_prompt_logprobs: int | None = None  # report log-probabilities of `target_ids`
    target_ids: Sequence[int | None] | None = None  # what follows each of `token_ids`; None: skip
    num_replayed: int = 0  # so many of `token_ids` are history from before the request: penalties don't see them
    stop_token_ids: Sequence[int] = ()  # these would end the sequence
    may_stop: bool = True  # else they are not sampled
    matcher: GrammarMatcher | None = None  # says what may be sampled, and is told what was

    @property
    def is_plain(self) -> bool:
        """Whether it asks for a token by temperature, top-k, top-p and min-p, or for none, and nothing else."""
        if self.num_prompt_logprobs is not None or self.matcher is not None:
            return False
        return self.sampling is None or (self.sampling.is_plain and (self.may_stop or not self.stop_token_ids))


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Everything one step runs; at most one chunk a slot."""

    chunks: Sequence[Chunk]

    @property
    def num_tokens(self) -> int:
        """Tokens consumed by the step."""
        return sum(len(chunk.token_ids) for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class FollowingPlan:
    """What the step after one in flight runs: of its chunks `rows` go on, each with the token that it samples there."""

    rows: Sequence[int]
    chunks: Sequence[Chunk] = ()  # beside them, in slots of their own


class ChunkOutput(msgspec.Struct, frozen=True, gc=False):
    """What one chunk brought, in the plan's order."""

    token_id: int | None = None  # sampled, if asked for
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # one per target
    failed: str | None = None  # the row became NaN or infinite; its state must not be used again
    is_complete: bool = False  # the grammar allows nothing after `token_id`, or nothing at all where there is none
    grammar_error: str | None = None  # the grammar cannot be followed any further


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a step brought; `chunks` matches the plan's."""

    chunks: Sequence[ChunkOutput]


class Launch(Protocol):
    """A step that was asked of the device."""

    @property
    def can_be_followed(self) -> bool:
        """Whether `ModelRunner.can_follow` need be asked before `output` was."""
        ...

    def output(self) -> StepOutput:
        """Wait for the step; raises what went wrong with it as a whole."""
        ...


class ModelRunner(Protocol):
    """The device, seen from the scheduler: numbered slots that hold states, and steps that advance them.

    Called from the engine's one thread. What is asked of the device happens in the order in which it is asked for, so a
    slot may be given to somebody else while steps that name it are still on their way.
    """

    spec: StateSpec
    num_slots: int  # the last one is the runner's own, for padding
    vocab_size: int

    def launch(self, plan: StepPlan) -> Launch:
        """Have every chunk consumed, its slot advanced in place, and tokens sampled where asked."""
        ...

    def can_follow(self, rows: Sequence[int], chunks: Sequence[Chunk]) -> bool:
        """Say whether `follow` can be called so."""
        ...

    def follow(self, rows: Sequence[int], chunks: Sequence[Chunk] = ()) -> Launch:
        """Launch the step after the last one launched, which has not been read and can be followed.

        Of its chunks `rows` go on, in this order, each with the token that it samples there. One that samples a stop
        token or fails does not go on: its slot keeps the state it has then, and its output here means nothing. After
        the rows come `chunks`, as in any plan.
        """
        ...

    def start(self, slot: int) -> None:
        """Give the slot the zero state, and forget the penalty counters of whoever had it before."""
        ...

    def load(self, slot: int, state: RecurrentState, consumed_ids: Sequence[int] = ()) -> None:
        """As `start`, from `state`; penalties count `consumed_ids` as if the request had consumed them itself."""
        ...

    def count(self, slot: int, token_ids: Sequence[int], params: SamplingParams) -> None:
        """Let the slot's penalties begin as if `token_ids` had just been generated there."""
        ...

    def copy(self, source: int, target: int) -> None:
        """Make `target`'s state equal to `source`'s."""
        ...

    def save(self, slot: int, num_tokens: int, chain: bytes) -> RecurrentState:
        """Return the slot's state, on its way to host memory; the slot may be reused at once."""
        ...

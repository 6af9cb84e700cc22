"""A model runner without a model: the state of a slot is exactly the tokens it has consumed.

So a test can look at any state and see whether it is the prompt and the delivered tokens. The 'model' is a function of
that history, hence deterministic, and equal for every way to cut, restore or replay it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from msgspec.structs import replace

from engine.errors import InvalidRequest
from engine.messages import SamplingParams, TokenLogprobs
from engine.runner.grammars import GrammarMatcher
from engine.runner.plan import Chunk, ChunkOutput, Launch, StepOutput, StepPlan
from engine.state.spec import RecurrentState, StateSpec, TensorSpec

MAX_TOKENS = 2048
Model = Callable[[Sequence[int], SamplingParams], int]

STUB_SPEC = StateSpec(
    fingerprint="5707", generation="0", layout="tape", tensors=(TensorSpec("tape", (MAX_TOKENS,), torch.float32),)
)


def tokens_of(state: RecurrentState) -> list[int]:
    """Return the tokens that `state` has consumed."""
    tape = state.tensors["tape"].tolist()
    return [int(token) for token in tape if token >= 0]


def state_of(token_ids: Sequence[int], chain: bytes) -> RecurrentState:
    """Return the state that has consumed `token_ids`."""
    tape = torch.full((MAX_TOKENS,), -1.0)
    tape[: len(token_ids)] = torch.tensor(token_ids, dtype=torch.float32)
    return RecurrentState(len(token_ids), chain, {"tape": tape})


def random_model(vocab_size: int) -> Model:
    """Return a model that says something else after every history, the same whenever the history is the same."""

    def next_token(history: Sequence[int], sampling: SamplingParams) -> int:
        return random.Random(repr((list(history), sampling.seed))).randrange(vocab_size)

    return next_token


def scripted_model(prompt_length: int, script: Sequence[int]) -> Model:
    """Return a model that answers any prompt of `prompt_length` tokens with `script`, and then repeats its last."""

    def next_token(history: Sequence[int], sampling: SamplingParams) -> int:
        return script[min(len(history) - prompt_length, len(script) - 1)]

    return next_token


class DeviceFault(Exception):
    """What a broken device raises."""


@dataclass
class StubLaunch:
    """A step that was run, and whose output nobody has looked at."""

    chunks: list[Chunk]
    result: StepOutput | DeviceFault
    can_be_followed: bool
    was_read: bool = False

    def output(self) -> StepOutput:
        """Return what it brought, or raise."""
        self.was_read = True
        if isinstance(self.result, DeviceFault):
            raise self.result
        return self.result


class StubRunner:
    """Checks what a real runner takes for granted, and does what it promises, in plain lists."""

    runs_ahead = False  # steps can be followed before they are read

    def __init__(
        self,
        num_slots: int = 9,
        vocab_size: int = 256,
        model: Model | None = None,
        poisonous: int | None = None,  # a row that consumes this token fails
        explosive: int | None = None,  # a step that consumes this token raises
        runs_ahead: bool | None = None,
    ) -> None:
        self.spec = STUB_SPEC
        self.num_slots = num_slots
        self.vocab_size = vocab_size
        self.model = model or random_model(vocab_size)
        self.poisonous = poisonous
        self.explosive = explosive
        if runs_ahead is not None:
            self.runs_ahead = runs_ahead
        self.last: StubLaunch | None = None
        self.slots: list[list[int] | None] = [None] * num_slots
        self.consumed: list[list[int]] = [[] for _ in range(num_slots)]  # by the slot's request: what penalties see
        self.plans: list[StepPlan] = []
        self.num_followed = 0
        self.loaded: list[RecurrentState] = []
        self.counted: dict[int, list[int]] = {}
        self.broken = False  # every call raises
        self.saves_break = False

    def launch(self, plan: StepPlan) -> Launch:
        """Consume the plan's tokens: nothing but `output` shows that it happens at once."""
        self._check_device()
        if self.last is not None and isinstance(self.last.result, StepOutput):
            assert self.last.was_read, "the last step was forgotten"
        self.plans.append(plan)
        slots = [chunk.slot for chunk in plan.chunks]
        assert len(set(slots)) == len(slots), "a slot may have one chunk a step"
        assert self.num_slots - 1 not in slots, "the last slot is for padding"
        return self._run(list(plan.chunks), self._consume)

    def can_follow(self, rows: Sequence[int], chunks: Sequence[Chunk]) -> bool:
        """Take chunks that ask for no more than a token."""
        assert self.last is not None
        asks_for_more = any(c.matcher is not None or c.num_prompt_logprobs is not None for c in chunks)
        return self.last.can_be_followed and not asks_for_more

    def follow(self, rows: Sequence[int], chunks: Sequence[Chunk] = ()) -> Launch:
        """Consume what some rows of the last step sampled, unless that ended them, and what `chunks` have."""
        self._check_device()
        last = self.last
        assert last is not None
        assert self.can_follow(rows, chunks)
        assert not last.was_read, "there is no need to hurry"
        if isinstance(last.result, DeviceFault):
            return self._run([], lambda chunk: ChunkOutput(failed="never run"), fault=last.result)
        following = []
        for row in rows:
            chunk, token_id = last.chunks[row], last.result.chunks[row].token_id
            assert chunk.sampling is not None, "there is nothing to go on with"
            ends = token_id is None or (chunk.may_stop and token_id in chunk.stop_token_ids)
            token_ids = [] if ends else [token_id]
            position = chunk.position + 1
            chunk = replace(chunk, token_ids=token_ids, position=position, num_replayed=0, target_ids=None)
            following.append(chunk)
        following += chunks
        slots = [chunk.slot for chunk in following]
        assert len(set(slots)) == len(slots), "a slot may have one chunk a step"
        self.num_followed += 1
        return self._run(following, lambda c: self._consume(c) if c.token_ids else ChunkOutput(failed="not run"))

    def step(self, plan: StepPlan) -> StepOutput:
        """Launch and wait."""
        return self.launch(plan).output()

    def _run(
        self, chunks: list[Chunk], consume: Callable[[Chunk], ChunkOutput], fault: DeviceFault | None = None
    ) -> StubLaunch:
        if any(self.explosive in chunk.token_ids for chunk in chunks):
            fault = DeviceFault("boom")
            for chunk in chunks:
                self.slots[chunk.slot] = None
        result = StepOutput([consume(chunk) for chunk in chunks]) if fault is None else fault
        self.last = StubLaunch(chunks, result, self.runs_ahead)
        return self.last

    def _consume(self, chunk: Chunk) -> ChunkOutput:
        tape = self.slots[chunk.slot]
        assert tape is not None, "the slot has no state"
        assert len(chunk.token_ids) > 0
        tape.extend(chunk.token_ids)
        self.consumed[chunk.slot].extend(chunk.token_ids[chunk.num_replayed :])
        assert chunk.position == len(tape), "position is the number of tokens before the sampled one"
        if self.poisonous in chunk.token_ids:
            self.slots[chunk.slot] = None
            return ChunkOutput(failed="not a number")
        prompt_logprobs = None
        if chunk.target_ids is not None:
            assert len(chunk.target_ids) == len(chunk.token_ids)
            prompt_logprobs = [None if i is None else TokenLogprobs(-float(i)) for i in chunk.target_ids]
        if chunk.sampling is None:
            return ChunkOutput(prompt_logprobs=prompt_logprobs)
        token_id = self.model(tape, chunk.sampling)
        logprobs = TokenLogprobs(-float(token_id)) if chunk.sampling.num_logprobs is not None else None
        output = ChunkOutput(token_id, logprobs, prompt_logprobs)
        return output if chunk.matcher is None else _constrained(output, chunk.matcher)

    def start(self, slot: int) -> None:
        """Give the slot the empty history."""
        self._check_device()
        self.slots[slot], self.consumed[slot] = [], []

    def load(self, slot: int, state: RecurrentState, consumed_ids: Sequence[int] = ()) -> None:
        """Give the slot the history in `state`, which must end with what the request is said to have consumed."""
        self._check_device()
        tape = tokens_of(state)
        assert tape[len(tape) - len(consumed_ids) :] == list(consumed_ids)
        self.slots[slot], self.consumed[slot] = tape, list(consumed_ids)
        self.loaded.append(state)

    def count(self, slot: int, token_ids: Sequence[int], params: SamplingParams) -> None:
        """Note what penalties count from the beginning."""
        self.counted[slot] = list(token_ids)

    def copy(self, source: int, target: int) -> None:
        """Give `target` the history of `source`."""
        self._check_device()
        tape = self.slots[source]
        assert tape is not None
        self.slots[target] = list(tape)

    def save(self, slot: int, num_tokens: int, chain: bytes) -> RecurrentState:
        """Return the slot's history; it must be as long as it is said to be."""
        self._check_device()
        if self.saves_break:
            raise DeviceFault("cannot save")
        tape = self.slots[slot]
        assert tape is not None
        assert len(tape) == num_tokens
        return state_of(tape, chain)

    def _check_device(self) -> None:
        if self.broken:
            raise DeviceFault("the device is gone")


def _constrained(output: ChunkOutput, matcher: GrammarMatcher) -> ChunkOutput:
    """Return the output with the lowest allowed token if its own is not allowed."""
    assert output.token_id is not None
    try:
        allowed = matcher.allowed((), may_stop=True)
        if allowed is None:
            return replace(output, token_id=None, logprobs=None, is_complete=True)
        token_id = output.token_id if allowed[output.token_id] else int(allowed.argmax())
        matcher.advance(token_id)
    except InvalidRequest as error:
        return ChunkOutput(grammar_error=str(error))
    return replace(output, token_id=token_id, is_complete=matcher.is_complete)

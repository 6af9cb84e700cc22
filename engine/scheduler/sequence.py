"""The scheduler's record of one running request.

A sequence is a *tape* of tokens and a *cursor*. The tape holds the history that must be replayed, the prompt, and what
was generated; everything left of the cursor has been consumed. At every moment

    state in the slot = the origin's state, then tape[:cursor]

and all else follows from it: a decode is a tape with one token to go, a prefill one with many, and when the sequence
has ended the tape is cut to what was delivered, the cursor put back if it went too far, and the rest consumed.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace

import msgspec

from engine.messages import FinishReason, GenerationRequest, ResumeKind, SequenceOutput, TokenLogprobs
from engine.runner.grammars import GrammarMatcher
from engine.runner.plan import Chunk, ChunkOutput
from engine.scheduler.output_gate import ByteVocabulary, OutputGate, SampledToken, StopMatch
from engine.state.spec import RecurrentState
from engine.token_chain import extend_digest

SequenceKey = tuple[bytes, str]  # client, request id


class Phase(enum.Enum):
    """Where a sequence stands."""

    WAITING = enum.auto()  # for its grammar, for a slot, or for another sequence's state to settle
    LOADING = enum.auto()  # has a slot; its state is being fetched
    RUNNING = enum.auto()  # consumes its prompt, or generates
    SETTLING = enum.auto()  # has ended for its client; its state is being brought to the delivered tokens
    FINISHED = enum.auto()


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A copy of the sequence's state from before it consumed tokens that may not be delivered."""

    slot: int
    cursor: int


@dataclass(frozen=True, slots=True)
class Border:
    """A place in the prompt of a request that has no history, and what names the state there."""

    num_tokens: int
    chain: bytes


@dataclass(frozen=True, slots=True)
class Origin:
    """What the tape begins from."""

    kind: ResumeKind
    state: RecurrentState | None = None  # None: what the history begins from
    replay_ids: SequenceOf[int] = ()  # from there to the state the request names
    num_cached: int = 0  # prompt tokens that the state has consumed already


class Sequence:
    """One request from its arrival to its last state. Moves tokens; takes no slot and calls no device."""

    def __init__(
        self, client: bytes, request: GenerationRequest, vocabulary: ByteVocabulary, arrived_at: float
    ) -> None:
        self.client = client
        self.request = request
        self.arrived_at = arrived_at
        self.admitted_at = arrived_at
        self.phase = Phase.WAITING
        self.slot: int | None = None
        self.matcher: GrammarMatcher | None = None  # of its own, once its grammar is compiled
        self.snapshot: Snapshot | None = None
        self.origin = Origin(ResumeKind.NEW)
        self.borders: SequenceOf[Border] = ()  # where it may begin, or leave a state; ascending
        self.borders_to_keep: list[Border] = []  # where it still is to leave a state; ascending
        self.num_kept = 0  # tokens of the prompt that the longest state it left has consumed
        self.tape: list[int] = []
        self.cursor = 0
        self.num_sampled = 0
        self.num_delivered = 0
        self.num_lost_bytes = 0  # before a stop string, that no token could spell
        self.chain = request.source.chain  # of the source, the consumed prompt and the delivered tokens
        self._tape_start = request.source.num_tokens  # tokens of the history before the tape
        self._prompt_start = self._prompt_end = 0  # where the prompt lies on the tape
        self._num_intact: int | None = None  # where the ended tape departs from what was sampled; None: nowhere
        self._stop = request.stop
        self._may_overshoot = request.keep_state and bool(request.stop.stop_strings)
        self._gate = OutputGate(vocabulary, request.stop.stop_strings)

    @property
    def key(self) -> SequenceKey:
        """What names the sequence in this engine."""
        return self.client, self.request.request_id

    @property
    def num_pending(self) -> int:
        """Tokens on the tape that have not been consumed."""
        return len(self.tape) - self.cursor

    @property
    def num_tokens(self) -> int:
        """Length of the history behind `chain`, once the sequence has ended."""
        return self.request.source.num_tokens + len(self.request.prompt_ids) + self.num_delivered

    @property
    def num_runnable(self) -> int:
        """Tokens that may be consumed in one step: no more than up to the next border that is to be kept."""
        if not self.borders_to_keep:
            return self.num_pending
        return self.borders_to_keep[0].num_tokens - self._tape_start - self.cursor

    @property
    def is_decoding(self) -> bool:
        """Whether it generates: all that is pending is the token sampled last."""
        return self.phase is Phase.RUNNING and self.cursor >= self._prompt_end

    @property
    def has_overshot(self) -> bool:
        """Whether the slot has consumed tokens that were not delivered in the end."""
        return self._num_intact is not None and self.cursor > self._num_intact

    @property
    def needs_snapshot(self) -> bool:
        """Whether the next token to be consumed, and only it, is held back, and the state before it may be wanted."""
        return self._may_overshoot and self.phase is Phase.RUNNING and self._gate.num_held == 1 == self.num_pending

    def goes_on(self, num_tokens: int) -> bool | None:
        """Say whether it consumes the token sampled after those in flight in the very next step, unless that ends it.

        None: that depends on the token, and it must not be left out of that step. The last of `max_tokens` is consumed
        only where the state is kept: so it settles.
        """
        if len(self.tape) - self.cursor > num_tokens or self.phase is Phase.SETTLING:
            return False
        stop = self._stop
        if self.matcher is not None or self._may_overshoot or not stop.max_tokens:
            return None
        if self.num_sampled < stop.min_tokens and stop.stop_token_ids:
            return None  # they are not sampled yet
        return self.request.keep_state or self.num_sampled + 1 < stop.max_tokens

    @property
    def has_stale_snapshot(self) -> bool:
        """Whether there is a snapshot and nothing is held back any more."""
        return self.snapshot is not None and self._gate.num_held == 0

    def begin(self, origin: Origin) -> None:
        """Lay out the tape, now that the slot has the origin's state."""
        # Only a sequence that may overshoot can ever return to its origin; others need not hold on to its memory.
        self.origin = origin if self._may_overshoot else replace(origin, state=None)
        if origin.num_cached:
            assert origin.state is not None, "nothing consumes nothing"
            self.chain = origin.state.chain
        self.tape = [*origin.replay_ids, *self.request.prompt_ids[origin.num_cached :]]
        self._tape_start += origin.num_cached - len(origin.replay_ids)
        self._prompt_start, self._prompt_end = len(origin.replay_ids), len(self.tape)
        self.borders_to_keep = [border for border in self.borders_to_keep if border.num_tokens > origin.num_cached]
        self.phase = Phase.RUNNING

    def next_chunk(self, num_tokens: int) -> Chunk:
        """Return the next pending tokens as a chunk; one that ends a running sequence's tape samples the next token."""
        assert self.slot is not None
        end = self.cursor + num_tokens
        stop = self._stop
        samples = self.phase is Phase.RUNNING and end == len(self.tape) and stop.max_tokens > 0
        targets = self._prompt_targets(end)
        return Chunk(
            slot=self.slot,
            token_ids=self.tape[self.cursor : end],
            sampling=self.request.sampling if samples else None,
            position=self._tape_start + end,
            num_prompt_logprobs=self.request.num_prompt_logprobs if targets else None,
            target_ids=targets,
            num_replayed=max(0, min(end, self._prompt_start) - self.cursor),
            stop_token_ids=stop.stop_token_ids if samples else (),
            may_stop=self.num_sampled >= stop.min_tokens,
            matcher=self.matcher if samples else None,
        )

    def advance(self, chunk: Chunk, output: ChunkOutput) -> SequenceOutput | None:
        """Take note of a consumed chunk and of what it brought; returns what there is to tell the client.

        An output with a finish reason ends the sequence: its tape is then the prompt and what was delivered.
        """
        start, self.cursor = self.cursor, self.cursor + len(chunk.token_ids)
        if self.phase is Phase.SETTLING:
            return None
        prompt_logprobs = self._consume_prompt(start, chunk, output) if start < self._prompt_end else None
        if chunk.sampling is not None:
            if output.token_id is None:
                assert output.is_complete
                return self._output(self._gate.flush(), prompt_logprobs, FinishReason.STOP)
            sampled = SampledToken(output.token_id, output.logprobs)
            return self._take_sample(sampled, prompt_logprobs, output.is_complete)
        if self.num_pending == 0:
            return self._output([], prompt_logprobs, FinishReason.LENGTH)
        return self._output([], prompt_logprobs) if prompt_logprobs else None

    def reach_border(self) -> Border | None:
        """Return, once, the border at which the slot's state is to be kept, if it is there."""
        if not self.borders_to_keep or self.num_runnable:
            return None
        return self.borders_to_keep.pop(0)

    def abort(self) -> SequenceOutput:
        """End the sequence where it is. What is held back is never delivered, and no state is kept."""
        return self._output([], None, FinishReason.ABORT)

    def rewind(self, cursor: int) -> None:
        """Go back to where `tape[:cursor]` was consumed: the slot has that state again."""
        self.cursor = cursor

    def _consume_prompt(self, start: int, chunk: Chunk, output: ChunkOutput) -> list[TokenLogprobs | None] | None:
        """Take note of the prompt tokens right of `start` that were consumed; returns what was asked about them."""
        if self.request.keep_state:
            prompt_ids = self.tape[max(start, self._prompt_start) : min(self.cursor, self._prompt_end)]
            self.chain = extend_digest(self.chain, prompt_ids)
        return self._prompt_logprobs(start, chunk, output)

    def _prompt_targets(self, end: int) -> list[int | None] | None:
        """Return what follows each pending token up to `end` where that is a prompt token, but not the first."""
        if self.request.num_prompt_logprobs is None or self.phase is not Phase.RUNNING:
            return None
        wanted = range(self._prompt_start, self._prompt_end - 1)
        targets = [self.tape[i + 1] if i in wanted else None for i in range(self.cursor, end)]
        return targets if any(target is not None for target in targets) else None

    def _prompt_logprobs(self, start: int, chunk: Chunk, output: ChunkOutput) -> list[TokenLogprobs | None] | None:
        """Return the chunk's share of the list that has an entry for every prompt token, None for the first."""
        if self.request.num_prompt_logprobs is None:
            return None
        first: list[TokenLogprobs | None] = [None] if start <= self._prompt_start < self.cursor else []
        if chunk.target_ids is None:
            return first or None
        assert output.prompt_logprobs is not None
        pairs = zip(chunk.target_ids, output.prompt_logprobs, strict=True)
        return first + [logprobs for target, logprobs in pairs if target is not None]

    def _take_sample(
        self, token: SampledToken, prompt_logprobs: list[TokenLogprobs | None] | None, is_complete: bool
    ) -> SequenceOutput | None:
        """Take the next token; `is_complete` says that the grammar allows none after it."""
        self.num_sampled += 1
        stop = self._stop
        may_stop = self.num_sampled > stop.min_tokens
        if may_stop and token.token_id in stop.stop_token_ids:
            output = self._output(self._gate.flush(), prompt_logprobs, FinishReason.STOP, token.token_id)
            return msgspec.structs.replace(output, stop_logprobs=token.logprobs)
        self.tape.append(token.token_id)
        released, match = self._gate.push(token) if may_stop else ([token], None)
        if match is not None:
            self._cut_tape(num_kept=self.num_delivered + len(released), match=match)
            return self._output(released + match.remnant, prompt_logprobs, FinishReason.STOP, match.stop_string)
        if is_complete:
            return self._output(released + self._gate.flush(), prompt_logprobs, FinishReason.STOP)
        if self.num_sampled == stop.max_tokens:
            return self._output(released + self._gate.flush(), prompt_logprobs, FinishReason.LENGTH)
        return self._output(released, prompt_logprobs) if released or prompt_logprobs else None

    def _cut_tape(self, num_kept: int, match: StopMatch) -> None:
        """Replace what was generated after the first `num_kept` tokens by the match's remnant."""
        self._num_intact = self._prompt_end + num_kept
        self.tape[self._num_intact :] = [token.token_id for token in match.remnant]
        self.num_lost_bytes = match.num_lost_bytes

    def _output(
        self,
        delivered: list[SampledToken],
        prompt_logprobs: list[TokenLogprobs | None] | None,
        finish_reason: FinishReason | None = None,
        stop_reason: int | bytes | None = None,
    ) -> SequenceOutput:
        request = self.request
        token_ids = [token_id for token_id, _ in delivered]
        self.num_delivered += len(token_ids)
        if request.keep_state:
            self.chain = extend_digest(self.chain, token_ids)
        if finish_reason is None and prompt_logprobs is None and request.sampling.num_logprobs is None:
            return SequenceOutput(request_id=request.request_id, token_ids=token_ids)
        logprobs = [token.logprobs for token in delivered if token.logprobs is not None]
        return SequenceOutput(
            request_id=request.request_id,
            token_ids=token_ids,
            logprobs=logprobs if request.sampling.num_logprobs is not None else None,
            prompt_logprobs=prompt_logprobs,
            finish_reason=finish_reason,
            stop_reason=stop_reason,
            num_sampled_tokens=self.num_sampled if finish_reason is not None else 0,
            num_kept_tokens=self._num_kept_tokens(finish_reason) if finish_reason is not None else 0,
        )

    def _num_kept_tokens(self, reason: FinishReason) -> int:
        """Return how many tokens of the prompt were computed here, and a state that has consumed them is kept."""
        keeps_all = self.request.keep_state and reason is not FinishReason.ABORT
        num_kept = len(self.request.prompt_ids) if keeps_all else self.num_kept
        return max(0, num_kept - self.origin.num_cached)


def following(chunk: Chunk) -> Chunk:
    """Return what consumes the token that `chunk` samples: for who takes note of it later, so that it has no id yet."""
    if len(chunk.token_ids) == 1 and chunk.target_ids is None:
        return chunk
    return msgspec.structs.replace(chunk, token_ids=(-1,), num_replayed=0, target_ids=None)

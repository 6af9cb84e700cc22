"""Who runs: which sequences have a slot, and which of their tokens the next step consumes.

Knows sequences, slots and states in memory; fetches checkpoints and compiles grammars through functions that return
futures. Knows nothing of sockets, clients' addresses or stores, and leaves to `engine.scheduler.prefixes` which prompts
begin at a state that others left. Called from the engine's one thread.

What is promised, whatever clients do: no slot has two owners; every sequence that was submitted ends exactly once; a
step never exceeds its token budget; a sequence that generates is in every step; a kept state has consumed exactly the
source, the prompt (up to a border, if it was left there) and the delivered tokens; who waits for another's state waits
for a sequence that runs, and no longer. All of it holds, token for token and bit for bit, where steps are launched
before the tokens of the last one are known.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass

from engine.config import EngineConfig
from engine.errors import (
    CheckpointError,
    CheckpointMissing,
    CheckpointRejected,
    EngineDraining,
    EngineError,
    InitialStateUnavailable,
    InvalidRequest,
    QueueFull,
)
from engine.messages import (
    CheckpointRef,
    FinishReason,
    GenerationRequest,
    Grammar,
    InitialStateRef,
    ResumeKind,
    SequenceFailed,
    SequenceOutput,
    SequenceStarted,
)
from engine.runner.grammars import GrammarMatcher
from engine.runner.plan import Chunk, ChunkOutput, FollowingPlan, ModelRunner, StepOutput, StepPlan
from engine.scheduler.output_gate import ByteVocabulary
from engine.scheduler.prefixes import Prefixes
from engine.scheduler.sequence import Origin, Phase, Sequence, SequenceKey, Snapshot, following
from engine.scheduler.slots import Slots
from engine.scheduler.validation import validate
from engine.state.hot_states import HotStates
from engine.state.spec import RecurrentState

_log = logging.getLogger(__name__)

_FAILURES = {
    "state_unavailable": "rwkv_states_unavailable_total",
    "numerical_error": "rwkv_numerical_errors_total",
    "engine_error": "rwkv_engine_errors_total",
}

# A prompt cut at multiples of it has the same bits as an uncut one on devices too whose operators take several tokens
# at once (`kernels/README.md`, Prompts).
CHUNK_LEN = 32

MAX_COMPILE_SECONDS = 10.0  # for a grammar, with those before it; then its sequence waits no longer

SequenceEvent = SequenceStarted | SequenceOutput | SequenceFailed
Row = tuple[Sequence, Chunk]


@dataclass(slots=True)
class StepTokens:
    """Tokens that the sequences of one step consumed."""

    num_sequences: int = 0
    num_decode: int = 0
    num_prefill: int = 0
    num_settled: int = 0  # by sequences that have ended for their clients

    def count(self, sequence: Sequence, num_tokens: int) -> None:
        """Count what the sequence has consumed, before it takes note of it."""
        self.num_sequences += 1
        if sequence.is_decoding:
            self.num_decode += num_tokens
        elif sequence.phase is Phase.SETTLING:
            self.num_settled += num_tokens
        else:
            self.num_prefill += num_tokens


class Scheduler:
    """Takes requests, plans steps, and turns what steps bring into events."""

    def __init__(
        self,
        config: EngineConfig,
        runner: ModelRunner,
        vocabulary: ByteVocabulary,
        hot_states: HotStates,
        prefixes: Prefixes,
        fetch: Callable[[CheckpointRef], Future[RecurrentState]],
        compile_grammar: Callable[[Grammar], Future[GrammarMatcher]],
        clock: Callable[[], float] = time.monotonic,
        initial_states: Mapping[InitialStateRef, RecurrentState] = {},
    ) -> None:
        if config.max_num_batched_tokens < config.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens ({config.max_num_batched_tokens}) must be at least max_num_seqs"
                f" ({config.max_num_seqs}): every running sequence consumes a token in every step"
            )
        self.draining = False
        self.counters: Counter[str] = Counter()
        self.num_faults_in_a_row = 0  # of the device, since the last step that went well
        self._config = config
        self._runner = runner
        self._vocabulary = vocabulary
        self._hot_states = hot_states
        self._prefixes = prefixes
        self._fetch = fetch
        self._compile_grammar = compile_grammar
        self._clock = clock
        self._initial_states = initial_states
        self._slots = Slots(runner.num_slots - 1)  # the last one is the runner's, for padding
        self._by_key: dict[SequenceKey, Sequence] = {}  # what clients may still hear of
        self._waiting: dict[SequenceKey, Sequence] = {}  # in order of arrival
        self._seated: list[Sequence] = []  # have a slot, in order of admission
        self._compiling: dict[Sequence, Future[GrammarMatcher]] = {}  # of those who wait
        self._loading: dict[Sequence, Future[RecurrentState]] = {}
        self._in_flight: deque[list[Row]] = deque()  # steps that are launched and not read, oldest first
        self._events: list[tuple[bytes, SequenceEvent]] = []

    # -- what there is ------------------------------------------------------------------------------------------------

    @property
    def num_waiting(self) -> int:
        """Sequences without a slot."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences with a slot, those whose state is being fetched or settles included."""
        return len(self._seated)

    @property
    def num_slots(self) -> int:
        """Slots that sequences and snapshots share."""
        return self._slots.num_slots

    @property
    def num_slots_used(self) -> int:
        """Slots in use, snapshots included."""
        return self._slots.num_used

    @property
    def has_work(self) -> bool:
        """Whether `schedule` would plan something now, without waiting for anyone."""
        return any(sequence.phase is not Phase.LOADING for sequence in self._seated) or self._may_admit()

    def is_settling(self, chain: bytes) -> bool:
        """Say whether the state behind `chain` is about to become final."""
        return any(sequence.phase is Phase.SETTLING and sequence.chain == chain for sequence in self._seated)

    def take_events(self) -> list[tuple[bytes, SequenceEvent]]:
        """Return, once, what happened since the last call, and to whose sequence."""
        events, self._events = self._events, []
        return events

    # -- commands -----------------------------------------------------------------------------------------------------

    def submit(self, client: bytes, request: GenerationRequest) -> None:
        """Queue a request, or refuse it with an event."""
        try:
            self._check(client, request)
        except EngineError as refusal:
            self._events.append((client, _refused(request, refusal)))
            return
        sequence = Sequence(client, request, self._vocabulary, self._clock())
        sequence.borders = self._prefixes.borders_of(request)
        self._waiting[sequence.key] = self._by_key[sequence.key] = sequence
        if request.sampling.grammar is not None:
            self._compiling[sequence] = self._compile_grammar(request.sampling.grammar)

    def abort(self, client: bytes, request_id: str) -> None:
        """End a sequence now, if it has not ended yet. It keeps no state."""
        if (sequence := self._by_key.get((client, request_id))) is not None:
            self._emit(sequence, sequence.abort())
            self._end(sequence, FinishReason.ABORT)

    def abort_client(self, client: bytes) -> None:
        """End every sequence of a client."""
        for owner, request_id in list(self._by_key):
            if owner == client:
                self.abort(owner, request_id)

    def abort_all(self) -> None:
        """End every sequence; states that settle go on settling."""
        for key in list(self._by_key):
            self.abort(*key)

    def forget(self, chain: bytes) -> None:
        """Keep the state behind `chain` no longer, or not at all if it still settles."""
        self._hot_states.forget(chain)
        self._prefixes.forget(chain)
        for sequence in [sequence for sequence in self._seated if sequence.phase is Phase.SETTLING]:
            if sequence.chain == chain:
                self._release(sequence)

    def _check(self, client: bytes, request: GenerationRequest) -> None:
        if self.draining:
            raise EngineDraining("the engine finishes what it runs and takes no new work")
        if (client, request.request_id) in self._by_key:
            raise InvalidRequest("request_id", "request_id names a sequence that has not ended")
        validate(request, self._runner.vocab_size, self._config.max_logprobs)
        initial_state = request.source.initial_state
        if initial_state is not None and initial_state not in self._initial_states:
            raise InitialStateUnavailable("the initial state is not here, or its name has another content now")
        if self.num_waiting >= self._num_free_seats + self._config.max_num_queued_reqs:
            raise QueueFull(f"{self.num_waiting} sequences wait already")

    # -- a step -------------------------------------------------------------------------------------------------------

    def schedule(self) -> StepPlan:
        """With no step in flight: give free slots to those who wait, and plan the next; it is empty if nobody can run.

        A plan that is not empty is in flight: `update` or `fail_step` must be told what became of it.
        """
        assert not self._in_flight
        self._prefixes.advance()
        self._seat_arrivals()
        self._take_snapshots()
        if rows := self._pick_rows(self._seated, self._config.max_num_batched_tokens):
            self._in_flight.append(rows)
        return StepPlan([chunk for _, chunk in rows])

    def follow(self) -> FollowingPlan | None:
        """Plan the step after the one in flight before its tokens are known: which of its rows go on, and who joins.

        There is none where what a row does next depends on its token, or where the runner cannot join those who would.
        A row that does not go on for what it sampled, a stop token or none, is the runner's to hold back. The row of a
        sequence that ends otherwise is ignored: nobody wants its state. A prompt that is not at its end, or leaves a
        state, is in every other step only: what it does is known when the step that it is in has been read.
        """
        self._prefixes.advance()
        (rows,) = self._in_flight
        going = []
        for index, (sequence, chunk) in enumerate(rows):
            if sequence.phase is Phase.FINISHED:
                continue
            if (goes_on := sequence.goes_on(len(chunk.token_ids))) is None:
                return None
            if goes_on:
                going.append(index)
        self._seat_arrivals()
        in_flight = {sequence for sequence, _ in rows}
        others = [sequence for sequence in self._seated if sequence not in in_flight]
        joining = self._pick_rows(others, self._config.max_num_batched_tokens - len(going))
        chunks = [chunk for _, chunk in joining]
        if not (going or chunks) or not self._runner.can_follow(going, chunks):
            return None
        self._in_flight.append([(rows[index][0], following(rows[index][1])) for index in going] + joining)
        return FollowingPlan(going, chunks)

    def update(self, output: StepOutput) -> StepTokens:
        """Take note of what the oldest step in flight brought."""
        rows = self._in_flight.popleft()
        self.num_faults_in_a_row = 0
        tokens = StepTokens()
        for (sequence, chunk), chunk_output in zip(rows, output.chunks, strict=True):
            if sequence.phase is Phase.FINISHED:  # since the step was launched
                continue
            try:
                self._advance(sequence, chunk, chunk_output, tokens)
            except Exception as error:  # a fault of one row is that row's alone
                _log.exception("a sequence broke")
                self._fail(sequence, "engine_error", f"the engine could not go on with this sequence: {error}")
        self.counters["rwkv_decode_tokens_total"] += tokens.num_decode
        self.counters["rwkv_prefill_tokens_total"] += tokens.num_prefill
        self.counters["rwkv_settled_tokens_total"] += tokens.num_settled
        return tokens

    def fail_step(self, error: Exception) -> None:
        """A step in flight raised: whoever is in one has a state of unknown contents and has failed."""
        self.num_faults_in_a_row += 1
        steps, self._in_flight = self._in_flight, deque()
        for sequence in dict.fromkeys(sequence for rows in steps for sequence, _ in rows):
            if sequence.phase is not Phase.FINISHED:
                self._fail(sequence, "engine_error", f"the step failed: {error}")

    def _seat_arrivals(self) -> None:
        """Begin whoever can begin now."""
        self._take_matchers()
        self._place_loaded()
        self._admit()

    def _pick_rows(self, sequences: Iterable[Sequence], budget: int) -> list[Row]:
        """Choose one token of everyone who has one to go, then prompts in order of admission while the budget lasts.

        The budget has room for a token a seat, so prompts get at least what their own seats are worth.
        """
        rows: list[Row] = []
        prompts = []
        for sequence in sequences:
            if (num_pending := sequence.num_pending) > 1:
                prompts.append(sequence)
            elif num_pending:
                rows.append((sequence, sequence.next_chunk(1)))
        budget -= len(rows)
        for sequence in prompts:
            if num_tokens := _piece(sequence.num_runnable, budget):
                rows.append((sequence, sequence.next_chunk(num_tokens)))
                budget -= num_tokens
        return rows

    def _advance(self, sequence: Sequence, chunk: Chunk, output: ChunkOutput, tokens: StepTokens) -> None:
        if output.failed is not None:
            self._fail(sequence, "numerical_error", output.failed)
            return
        if output.grammar_error is not None:
            self._refuse(sequence, InvalidRequest("grammar", output.grammar_error))
            return
        tokens.count(sequence, len(chunk.token_ids))
        event = sequence.advance(chunk, output)
        if event is not None:
            self._events.append((sequence.client, event))
            if event.finish_reason is not None:
                self._end(sequence, event.finish_reason)
                return
        if sequence.phase is Phase.SETTLING:
            if sequence.num_pending == 0:
                self._keep(sequence)
        elif sequence.borders_to_keep and (border := sequence.reach_border()) is not None:
            self._prefixes.keep(sequence, self._runner.save(chunk.slot, border.num_tokens, border.chain))
        elif sequence.snapshot is not None and sequence.has_stale_snapshot:
            self._drop_snapshot(sequence)

    # -- admission, and the state before the prompt -------------------------------------------------------------------

    @property
    def _num_free_seats(self) -> int:
        return min(self._config.max_num_seqs - len(self._seated), self._slots.num_free)

    def _take_matchers(self) -> None:
        """Note whose grammar is compiled; refuse those whose grammar cannot be, or takes too long."""
        for sequence, future in list(self._compiling.items()):
            if future.done():
                del self._compiling[sequence]
                self._take_matcher(sequence, future)
        for sequence in self._overdue_compilations():
            complaint = f"grammar was not compiled within {MAX_COMPILE_SECONDS:g} seconds"
            self._refuse(sequence, InvalidRequest("grammar", complaint))

    def _overdue_compilations(self) -> list[Sequence]:
        overdue_since = self._clock() - MAX_COMPILE_SECONDS
        return [sequence for sequence in self._compiling if sequence.arrived_at < overdue_since]

    def _take_matcher(self, sequence: Sequence, future: Future[GrammarMatcher]) -> None:
        try:
            sequence.matcher = future.result()
        except InvalidRequest as refusal:
            self._refuse(sequence, refusal)
        except Exception as error:
            _log.exception("a grammar could not be compiled")
            self._fail(sequence, "engine_error", f"the grammar could not be compiled: {error}")

    def _may_admit(self) -> bool:
        """Say whether there is a seat for somebody who waits."""
        if not self._waiting or self._num_free_seats <= 0:
            return False
        expected = self._expected
        return any(self._is_admissible(sequence, expected) for sequence in self._waiting.values())

    def _admit(self) -> None:
        """Seat those who wait, by priority and then in order of arrival.

        Except whose grammar is not compiled yet, and whose state is going to be hot in a moment.
        """
        if not self._waiting or self._num_free_seats <= 0:
            return
        expected = self._expected
        for sequence in sorted(self._waiting.values(), key=lambda sequence: sequence.request.priority):
            if self._num_free_seats <= 0:
                return
            if self._is_admissible(sequence, expected):
                del self._waiting[sequence.key]
                self._seat(sequence)
                expected.update(border.chain for border in sequence.borders_to_keep)

    @property
    def _expected(self) -> set[bytes]:
        """Chains of the states that sequences with a slot are about to leave in memory.

        Each is known from what such a sequence still is to do, so that nobody waits for one that has ended.
        """
        settling = {sequence.chain for sequence in self._seated if sequence.phase is Phase.SETTLING}
        return settling.union(border.chain for sequence in self._seated for border in sequence.borders_to_keep)

    def _is_admissible(self, sequence: Sequence, expected: set[bytes]) -> bool:
        if sequence in self._compiling:
            return False
        if sequence.request.source.num_tokens > 0:
            return sequence.request.source.chain not in expected
        return not self._prefixes.may_gain(sequence, expected)

    def _seat(self, sequence: Sequence) -> None:
        sequence.slot = self._slots.take()
        sequence.admitted_at = self._clock()
        self._seated.append(sequence)
        sequence.borders_to_keep = self._prefixes.wanted(sequence)
        source = sequence.request.source
        if (origin := self._origin_at_hand(sequence)) is not None:
            self._begin(sequence, origin)
        elif (answer := self._prefixes.ask_store(sequence)) is not None:
            sequence.phase = Phase.LOADING
            self._loading[sequence] = answer
        elif source.num_tokens == 0:
            self._begin(sequence, self._prefixes.miss(sequence))
        elif source.checkpoint is not None:
            sequence.phase = Phase.LOADING
            self._loading[sequence] = self._fetch(source.checkpoint)
        else:
            reason = "its state is not in memory, and neither a checkpoint nor its whole history was given"
            self._fail(sequence, "state_unavailable", reason)

    def _origin_at_hand(self, sequence: Sequence) -> Origin | None:
        """Return where the sequence can begin without asking the state store."""
        source = sequence.request.source
        if source.num_tokens == 0:
            return self._prefixes.find(sequence)
        if (state := self._hot_states.get(source)) is not None:
            return Origin(ResumeKind.HOT, state)
        if source.checkpoint is not None:
            state = self._hot_states.get(source.checkpoint)
            return Origin(ResumeKind.REPLAYED, state, source.replay_ids) if state is not None else None
        return Origin(ResumeKind.REPLAYED, None, source.replay_ids) if source.replay_ids else None

    def _place_loaded(self) -> None:
        """Begin the sequences for which the state store has an answer."""
        for sequence, future in [(sequence, future) for sequence, future in self._loading.items() if future.done()]:
            del self._loading[sequence]
            if sequence.request.source.num_tokens > 0:
                self._place_checkpoint(sequence, future)
            elif (origin := self._prefixes.found(future)) is not None:
                self._begin(sequence, origin, was_loaded=True)
            else:
                self._begin(sequence, self._prefixes.find(sequence) or self._prefixes.miss(sequence))

    def _place_checkpoint(self, sequence: Sequence, future: Future[RecurrentState]) -> None:
        """Begin the sequence from the checkpoint that was fetched; fail it if that cannot be used."""
        replay_ids = sequence.request.source.replay_ids
        try:
            state = future.result()
        except CheckpointError as error:
            self._count_unusable(error)
            self._fail(sequence, "state_unavailable", str(error))
        except Exception as error:
            _log.exception("a checkpoint could not be fetched")
            self._fail(sequence, "state_unavailable", f"the checkpoint could not be fetched: {error}")
        else:
            self.counters["rwkv_state_load_bytes_total"] += state.num_bytes
            kind = ResumeKind.REPLAYED if replay_ids else ResumeKind.RESTORED
            self._begin(sequence, Origin(kind, state, replay_ids), was_loaded=True)

    def _count_unusable(self, error: CheckpointError) -> None:
        match error:
            case CheckpointRejected():
                self.counters["rwkv_checkpoints_rejected_total"] += 1
                self.counters[f"rwkv_checkpoints_rejected_{error.reason}_total"] += 1
            case CheckpointMissing():
                self.counters["rwkv_checkpoints_missing_total"] += 1
            case _:
                self.counters["rwkv_checkpoints_unavailable_total"] += 1

    def _begin(self, sequence: Sequence, origin: Origin, *, was_loaded: bool = False) -> None:
        try:
            self._place(sequence, origin)
        except Exception as error:
            self._fail_on_device(sequence, error)
            return
        sequence.begin(origin)
        started = SequenceStarted(
            request_id=sequence.request.request_id,
            resume=origin.kind,
            num_replayed_tokens=len(origin.replay_ids),
            num_cached_tokens=origin.num_cached,
            queue_seconds=sequence.admitted_at - sequence.arrived_at,
            load_seconds=self._clock() - sequence.admitted_at if was_loaded else 0.0,
        )
        self._emit(sequence, started)

    def _place(self, sequence: Sequence, origin: Origin) -> None:
        assert sequence.slot is not None
        initial_state = sequence.request.source.initial_state
        if origin.state is not None:
            self._runner.load(sequence.slot, origin.state, sequence.request.prompt_ids[: origin.num_cached])
        elif initial_state is not None:
            self._runner.load(sequence.slot, self._initial_states[initial_state])
        else:
            self._runner.start(sequence.slot)
        if sequence.request.counted_ids:
            self._runner.count(sequence.slot, sequence.request.counted_ids, sequence.request.sampling)

    # -- snapshots, and the state after the end -----------------------------------------------------------------------

    def _take_snapshots(self) -> None:
        for sequence in [sequence for sequence in self._seated if sequence.needs_snapshot]:
            slot = sequence.snapshot.slot if sequence.snapshot is not None else self._slots.take()
            if slot is None:  # the sequence goes back to its origin if it must: slower, never wrong
                self.counters["rwkv_snapshots_missed_total"] += 1
                continue
            sequence.snapshot = Snapshot(slot, sequence.cursor)
            assert sequence.slot is not None
            try:
                self._runner.copy(sequence.slot, slot)
            except Exception as error:
                self._fail_on_device(sequence, error)

    def _drop_snapshot(self, sequence: Sequence) -> None:
        if sequence.snapshot is not None:
            self._slots.give_back(sequence.snapshot.slot)
            sequence.snapshot = None

    def _end(self, sequence: Sequence, reason: FinishReason) -> None:
        """The client has heard the last of this sequence; its state may still have some way to go."""
        del self._by_key[sequence.key]
        self.counters["rwkv_stop_bytes_lost_total"] += sequence.num_lost_bytes
        if reason is FinishReason.ABORT or not sequence.request.keep_state:
            self._release(sequence)
            return
        sequence.phase = Phase.SETTLING
        if sequence.has_overshot:
            self._rewind(sequence)
        self._drop_snapshot(sequence)
        if sequence.num_pending == 0:
            self._keep(sequence)

    def _rewind(self, sequence: Sequence) -> None:
        """Go back to before the stop string: to the snapshot, or for want of one to the origin."""
        assert sequence.slot is not None
        if sequence.snapshot is not None:
            self._slots.give_back(sequence.slot)
            sequence.slot = sequence.snapshot.slot
            sequence.rewind(sequence.snapshot.cursor)
            sequence.snapshot = None
        else:
            self.counters["rwkv_state_rebuilds_total"] += 1
            self._place(sequence, sequence.origin)
            sequence.rewind(0)

    def _keep(self, sequence: Sequence) -> None:
        assert sequence.slot is not None
        self._hot_states.put(self._runner.save(sequence.slot, sequence.num_tokens, sequence.chain))
        self._release(sequence)

    # -- ends ---------------------------------------------------------------------------------------------------------

    def _fail_on_device(self, sequence: Sequence, error: Exception) -> None:
        _log.exception("the device failed a sequence")
        self.num_faults_in_a_row += 1
        self._fail(sequence, "engine_error", f"the device failed: {error}")

    def _fail(self, sequence: Sequence, code: str, message: str) -> None:
        """Give the sequence up. Its client hears of it, unless it has already heard the end: then a state is lost."""
        if self._by_key.get(sequence.key) is sequence:
            del self._by_key[sequence.key]
            self.counters[_FAILURES[code]] += 1
            self._emit(sequence, SequenceFailed(request_id=sequence.request.request_id, code=code, message=message))
        else:
            self.counters["rwkv_states_lost_total"] += 1
            _log.warning("the state of a finished sequence was lost: %s", message)
        self._release(sequence)

    def _refuse(self, sequence: Sequence, refusal: InvalidRequest) -> None:
        """Give the sequence up because of what it asks for."""
        del self._by_key[sequence.key]
        self._emit(sequence, _refused(sequence.request, refusal))
        self._release(sequence)

    def _release(self, sequence: Sequence) -> None:
        """Take back everything the sequence has."""
        sequence.phase = Phase.FINISHED
        sequence.borders_to_keep = []
        if self._waiting.get(sequence.key) is sequence:
            del self._waiting[sequence.key]
        if (compiling := self._compiling.pop(sequence, None)) is not None:
            compiling.cancel()
        if (loading := self._loading.pop(sequence, None)) is not None:
            loading.cancel()
        self._drop_snapshot(sequence)
        if sequence.slot is not None:
            self._slots.give_back(sequence.slot)
            self._seated.remove(sequence)
            sequence.slot = None

    def _emit(self, sequence: Sequence, event: SequenceEvent) -> None:
        self._events.append((sequence.client, event))


def _piece(num_tokens: int, budget: int) -> int:
    """Return how many of so many tokens to consume now: if not all, a multiple of what an operator does at once.

    A last token is not left alone where that can be helped: lone tokens are the operators' other way.
    """
    if num_tokens <= budget:
        return num_tokens
    piece = budget - budget % CHUNK_LEN or budget
    return piece - CHUNK_LEN if num_tokens - piece == 1 and piece > CHUNK_LEN else piece


def _refused(request: GenerationRequest, refusal: EngineError) -> SequenceFailed:
    codes = {
        QueueFull: "queue_full",
        EngineDraining: "draining",
        InvalidRequest: "invalid_request",
        InitialStateUnavailable: "initial_state_unavailable",
    }
    field = refusal.field if isinstance(refusal, InvalidRequest) else None
    return SequenceFailed(request_id=request.request_id, code=codes[type(refusal)], message=str(refusal), field=field)

"""A scheduler with a stub device, its clients and its state store, stepped by hand; and what ought to come of it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from engine.config import EngineConfig
from engine.errors import CheckpointMissing, StoreUnavailable
from engine.messages import (
    CheckpointRef,
    CheckpointStored,
    FinishReason,
    GenerationRequest,
    Grammar,
    InitialStateRef,
    SamplingParams,
    SequenceFailed,
    SequenceOutput,
    SequenceStarted,
    StateSource,
    StopRules,
)
from engine.pipeline import Pipeline
from engine.runner.grammars import GrammarMatcher, Grammars
from engine.runner.plan import Chunk
from engine.scheduler.prefixes import Prefixes
from engine.scheduler.scheduler import Scheduler
from engine.scheduler.sequence import Phase
from engine.scheduler.sequence import Sequence as SchedulerSequence
from engine.state.hot_states import HotStates
from engine.state.prefix_store import PrefixStore
from engine.state.spec import RecurrentState
from engine.token_chain import extend_digest, root_digest
from tests.engine.scheduler.test_stop_matcher import first_match
from tests.engine.stub_runner import STUB_SPEC, StubRunner, tokens_of
from tests.engine.stub_vocabulary import LETTERS, StubVocabulary

CLIENT = b"client"
ROOT = root_digest()


def source_of(history: Sequence[int], checkpoint: CheckpointRef | None = None, replay: bool = False) -> StateSource:
    """Return the source of the state behind `history`, to be resumed as the arguments allow."""
    num_saved = checkpoint.num_tokens if checkpoint is not None else 0
    return StateSource(
        num_tokens=len(history),
        chain=extend_digest(ROOT, history),
        checkpoint=checkpoint,
        replay_ids=list(history[num_saved:]) if replay or checkpoint is not None else [],
    )


def request_of(
    request_id: str,
    prompt_ids: Sequence[int],
    history: Sequence[int] = (),
    *,
    source: StateSource | None = None,
    max_tokens: int = 8,
    stop_strings: Sequence[bytes] = (),
    stop_token_ids: Sequence[int] = (),
    keep_state: bool = True,
    num_logprobs: int | None = None,
    num_prompt_logprobs: int | None = None,
    borders: Sequence[int] = (),
    grammar: Grammar | None = None,
    min_tokens: int = 0,
    priority: int = 0,
    counted_ids: Sequence[int] = (),
) -> GenerationRequest:
    """Return a request with everything that tests seldom care about filled in."""
    return GenerationRequest(
        request_id=request_id,
        prompt_ids=list(prompt_ids),
        sampling=SamplingParams(seed=7, num_logprobs=num_logprobs, grammar=grammar),
        stop=StopRules(
            max_tokens=max_tokens,
            stop_token_ids=tuple(stop_token_ids),
            stop_strings=tuple(stop_strings),
            min_tokens=min_tokens,
        ),
        source=source or source_of(history),
        keep_state=keep_state,
        num_prompt_logprobs=num_prompt_logprobs,
        borders=list(borders),
        priority=priority,
        counted_ids=list(counted_ids),
    )


@dataclass
class Client:
    """What one client has heard of one sequence."""

    request: GenerationRequest
    history: list[int]
    started: SequenceStarted | None = None
    token_ids: list[int] = field(default_factory=list)
    outputs: list[SequenceOutput] = field(default_factory=list)
    last: SequenceOutput | None = None
    failed: SequenceFailed | None = None

    @property
    def has_ended(self) -> bool:
        """Whether the client heard the end."""
        return self.last is not None or self.failed is not None

    @property
    def full_history(self) -> list[int]:
        """What the kept state must have consumed."""
        return [*self.history, *self.request.prompt_ids, *self.token_ids]

    def hear(self, event: SequenceStarted | SequenceOutput | SequenceFailed) -> None:
        """Take an event; none may come after the end, or an output before the start."""
        assert not self.has_ended, "an event after the end"
        if isinstance(event, SequenceStarted):
            assert self.started is None
            self.started = event
        elif isinstance(event, SequenceFailed):
            self.failed = event
        else:
            assert self.started is not None or event.finish_reason is FinishReason.ABORT
            self.outputs.append(event)
            self.token_ids += event.token_ids
            if event.finish_reason is not None:
                self.last = event


class Simulation:
    """Everything around a scheduler, in the test's hands; every step checks the scheduler's promises."""

    def __init__(
        self,
        runner: StubRunner | None = None,
        *,
        max_num_seqs: int = 4,
        max_num_batched_tokens: int = 16,
        max_num_queued_reqs: int = 1000,
        hot_state_bytes: int = 1 << 30,
        prefix_min_tokens: int = 2,
        prefix_store_min_tokens: int = 4,
        vocabulary: StubVocabulary = LETTERS,
        initial_states: Mapping[InitialStateRef, RecurrentState] = {},
    ) -> None:
        self.vocabulary = vocabulary
        self.runner = runner or StubRunner(num_slots=2 * max_num_seqs + 1, vocab_size=len(vocabulary.tokens))
        self.config = EngineConfig(
            model_path="",
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_num_queued_reqs=max_num_queued_reqs,
            prefix_min_tokens=prefix_min_tokens,
            prefix_store_min_tokens=prefix_store_min_tokens,
        )
        self.hot_states = HotStates(hot_state_bytes)
        self.checkpoints: dict[str, RecurrentState] = {}
        self.store_fails = False
        self.fetches: list[tuple[Sequence[CheckpointRef], Future[RecurrentState]]] = []
        self.writes: list[tuple[str, RecurrentState, Future[CheckpointStored]]] = []
        self.compilations: list[tuple[Grammar, Future[GrammarMatcher]]] = []
        self.seconds_skipped = 0.0  # by a clock that tests set forward
        self.prefix_store = PrefixStore(self, self.hot_states, STUB_SPEC, "stub", self.clock)
        self.prefixes = Prefixes(self.config, STUB_SPEC.num_bytes, self.hot_states, self.prefix_store)
        self.scheduler = Scheduler(
            self.config,
            self.runner,
            vocabulary,
            self.hot_states,
            self.prefixes,
            lambda ref: self.fetch_first([ref]),
            self._compile,
            self.clock,
            initial_states,
        )
        self.pipeline = Pipeline(self.scheduler, self.runner, self.clock)
        self.clients: dict[str, Client] = {}

    def submit(self, request: GenerationRequest, history: Sequence[int] = ()) -> Client:
        """Submit a request whose source is the state behind `history`."""
        client = self.clients[request.request_id] = Client(request, list(history))
        self.scheduler.submit(CLIENT, request)
        self.deliver()
        return client

    def abort(self, request_id: str) -> None:
        """Abort a sequence."""
        self.scheduler.abort(CLIENT, request_id)
        self.deliver()

    def step(self) -> int:
        """Run one step; returns how many tokens it consumed."""
        num_tokens = sum(len(chunk.token_ids) for _, chunk in self._launch())
        self.pipeline.read()
        self.deliver()
        self._check_slots()
        self._check_penalties()
        return num_tokens

    def _launch(self) -> list[tuple[SchedulerSequence, Chunk]]:
        """Launch what can be launched; returns the rows of the step that is read next."""
        num_in_flight = self.pipeline.num_in_flight
        self.pipeline.launch()
        steps = self.scheduler._in_flight
        assert len(steps) == self.pipeline.num_in_flight <= 2
        for rows in list(steps)[num_in_flight:]:
            self._check_plan(rows, follows=rows is not steps[0])
        return steps[0] if steps else []

    def schedule_only(self) -> None:
        """Seat who can be seated."""
        assert not self.pipeline.num_in_flight
        self.scheduler.schedule()
        self.scheduler._in_flight.clear()
        self.deliver()

    def run(self, answer_fetches: bool = True) -> None:
        """Step until nothing is left to do."""
        for _ in range(10_000):
            if answer_fetches:
                self.answer_fetches()
            if self._is_idle(answer_fetches):
                self.schedule_only()
                if self._is_idle(answer_fetches):
                    return
            self.step()
        raise AssertionError("the scheduler never comes to rest")

    def _is_idle(self, answer_fetches: bool) -> bool:
        if self.pipeline.num_in_flight or self.scheduler.has_work:
            return False
        return not (answer_fetches and (self.fetches or self.writes))

    def save_history(self, history: Sequence[int]) -> CheckpointRef:
        """Put the hot state behind `history` into the state store."""
        state = self.kept(history)
        assert state is not None
        checkpoint_id = f"checkpoint-{len(self.checkpoints)}"
        self.checkpoints[checkpoint_id] = state
        return CheckpointRef(checkpoint_id=checkpoint_id, num_tokens=state.num_tokens, chain=state.chain)

    def kept(self, history: Sequence[int]) -> RecurrentState | None:
        """Return the hot state behind `history`."""
        return self.hot_states.get(source_of(history))

    def forget_everything(self) -> None:
        """Empty the hot states."""
        for chain in list(self.hot_states._entries):
            self.hot_states.forget(chain)

    def answer_fetches(self, *, and_writes: bool = True) -> None:
        """Let the state store answer."""
        fetches, self.fetches = self.fetches, []
        for refs, future in fetches:
            if future.cancelled():
                continue
            there = [ref.checkpoint_id for ref in refs if ref.checkpoint_id in self.checkpoints]
            if self.store_fails:
                future.set_exception(StoreUnavailable("the store is away"))
            elif not there:
                future.set_exception(CheckpointMissing(f"no checkpoint {refs[0].checkpoint_id}"))
            else:
                future.set_result(self.checkpoints[there[0]])
        if and_writes:
            self._answer_writes()

    def _answer_writes(self) -> None:
        writes, self.writes = self.writes, []
        for checkpoint_id, state, stored in writes:
            if self.store_fails:
                stored.set_exception(StoreUnavailable("the store is away"))
                continue
            self.checkpoints[checkpoint_id] = state
            ref = CheckpointRef(checkpoint_id=checkpoint_id, num_tokens=state.num_tokens, chain=state.chain)
            stored.set_result(CheckpointStored(ref=ref))

    def answer_compilations(self, kind: str | None = None) -> None:
        """Let the compiler finish: all that is asked for, or only grammars of one kind."""
        grammars = Grammars(self.vocabulary, len(self.vocabulary.tokens))
        for grammar, future in [each for each in self.compilations if kind in (None, each[0].kind)]:
            self.compilations.remove((grammar, future))
            if future.cancelled():
                continue
            compiled = grammars.compile(grammar)
            if (error := compiled.exception()) is not None:
                future.set_exception(error)
            else:
                future.set_result(compiled.result())
        grammars.close()

    def deliver(self) -> None:
        """Hand the events to the clients."""
        for owner, event in self.scheduler.take_events():
            assert owner == CLIENT
            self.clients[event.request_id].hear(event)

    def check_at_rest(self) -> None:
        """Check that everything ended and everything was given back."""
        assert all(client.has_ended for client in self.clients.values())
        assert self.scheduler.num_slots_used == 0
        assert self.scheduler.num_running == self.scheduler.num_waiting == 0

    def check_states(self) -> None:
        """Check that every hot state has consumed what its chain says."""
        for chain, entry in self.hot_states._entries.items():
            assert entry.state.chain == chain
            assert extend_digest(ROOT, tokens_of(entry.state)) == chain

    # -- what the scheduler and the prefix states ask of the state store ----------------------------------------------

    def fetch_first(self, refs: Sequence[CheckpointRef]) -> Future[RecurrentState]:
        """Take a question that `answer_fetches` will answer."""
        future: Future[RecurrentState] = Future()
        self.fetches.append((refs, future))
        return future

    def save(self, state: RecurrentState, checkpoint_id: str | None = None) -> Future[CheckpointStored]:
        """Take a state that `answer_fetches` will have written."""
        assert checkpoint_id is not None
        stored: Future[CheckpointStored] = Future()
        self.writes.append((checkpoint_id, state, stored))
        return stored

    def delete(self, checkpoint_ids: Iterable[str]) -> None:
        """Remove checkpoints at once."""
        for checkpoint_id in checkpoint_ids:
            self.checkpoints.pop(checkpoint_id, None)

    def clock(self) -> float:
        """Return seconds that tests can skip."""
        return time.monotonic() + self.seconds_skipped

    # -- checks -------------------------------------------------------------------------------------------------------

    def _compile(self, grammar: Grammar) -> Future[GrammarMatcher]:
        future: Future[GrammarMatcher] = Future()
        self.compilations.append((grammar, future))
        return future

    def _check_plan(self, rows: list[tuple[SchedulerSequence, Chunk]], *, follows: bool) -> None:
        assert sum(len(chunk.token_ids) for _, chunk in rows) <= self.config.max_num_batched_tokens
        planned = {sequence for sequence, _ in rows}
        assert len(planned) == len(rows)
        for sequence in self.scheduler._seated:
            if follows and sequence.num_sampled + 1 >= sequence.request.stop.max_tokens:
                continue  # it ends with the step before
            assert not sequence.is_decoding or sequence in planned, "a sequence that generates was left out"
        waiting_for_tokens = [s for s in self.scheduler._seated if s.phase is not Phase.LOADING]
        assert follows or bool(planned) == bool(waiting_for_tokens)

    def _check_slots(self) -> None:
        sequences = self.scheduler._seated
        slots = [s.slot for s in sequences] + [s.snapshot.slot for s in sequences if s.snapshot is not None]
        assert None not in slots
        assert len(set(slots)) == len(slots), "a slot has two owners"
        assert len(slots) == self.scheduler.num_slots_used, "a slot leaked"
        waits_for_a_state = self.scheduler.num_waiting > len(self.scheduler._compiling)
        assert sequences or not waits_for_a_state or self.scheduler.has_work, "who waits, waits for nobody"

    def _check_penalties(self) -> None:
        """Check that a request's penalties see its own tokens, those included that it did not have to consume."""
        for sequence in self.scheduler._seated:
            if sequence.phase is Phase.RUNNING:
                assert sequence.slot is not None
                consumed = self.runner.consumed[sequence.slot]
                assert consumed[: len(sequence.request.prompt_ids)] == sequence.request.prompt_ids[: len(consumed)]


@dataclass(frozen=True)
class Expected:
    """What a sequence must come to, computed the simple way."""

    text: bytes
    token_ids: list[int] | None  # None where a stop string cuts a token: there only the text is determined
    finish_reason: FinishReason
    stop_reason: int | bytes | None
    num_sampled: int


def expected_of(client: Client, runner: StubRunner, vocabulary: StubVocabulary) -> Expected:
    """Generate naively: sample, look at the whole text, decide."""
    request = client.request
    sampled: list[int] = []
    for _ in range(request.stop.max_tokens):
        token_id = runner.model([*client.history, *request.prompt_ids, *sampled], request.sampling)
        if token_id in request.stop.stop_token_ids:
            text = vocabulary.decode(sampled)
            return Expected(text, sampled, FinishReason.STOP, token_id, len(sampled) + 1)
        sampled.append(token_id)
        text = vocabulary.decode(sampled)
        match = first_match(text, list(request.stop.stop_strings))
        if match is not None:
            stop_string, end = match
            delivered = text[: end - len(stop_string)]
            whole = next(
                (sampled[:n] for n in range(len(sampled)) if vocabulary.decode(sampled[:n]) == delivered), None
            )
            whole = None if any(not vocabulary.token_bytes(t) for t in sampled) else whole
            return Expected(delivered, whole, FinishReason.STOP, stop_string, len(sampled))
    return Expected(vocabulary.decode(sampled), sampled, FinishReason.LENGTH, None, len(sampled))


def check_ended_as_expected(client: Client, runner: StubRunner, vocabulary: StubVocabulary) -> None:
    """Check a sequence that ran to its own end against the naive one."""
    expected = expected_of(client, runner, vocabulary)
    assert client.last is not None
    assert vocabulary.decode(client.token_ids) == expected.text
    assert expected.token_ids is None or client.token_ids == expected.token_ids
    assert client.last.finish_reason == expected.finish_reason
    assert client.last.stop_reason == expected.stop_reason
    assert client.last.num_sampled_tokens == expected.num_sampled

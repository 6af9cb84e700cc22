"""A scheduler with a stub device, its clients and its state store, stepped by hand; and what ought to come of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from engine.config import EngineConfig
from engine.errors import CheckpointMissing
from engine.messages import (
    CheckpointRef,
    FinishReason,
    GenerationRequest,
    InitialStateRef,
    SamplingParams,
    SequenceFailed,
    SequenceOutput,
    SequenceStarted,
    StateSource,
    StopRules,
)
from engine.scheduler.scheduler import Scheduler
from engine.scheduler.sequence import Phase
from engine.state.hot_states import HotStates
from engine.state.spec import RecurrentState
from engine.token_chain import extend_digest, root_digest
from tests.engine.scheduler.test_stop_matcher import first_match
from tests.engine.stub_runner import StubRunner, tokens_of
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
) -> GenerationRequest:
    """Return a request with everything that tests seldom care about filled in."""
    return GenerationRequest(
        request_id=request_id,
        prompt_ids=list(prompt_ids),
        sampling=SamplingParams(seed=7, num_logprobs=num_logprobs),
        stop=StopRules(max_tokens=max_tokens, stop_token_ids=tuple(stop_token_ids), stop_strings=tuple(stop_strings)),
        source=source or source_of(history),
        keep_state=keep_state,
        num_prompt_logprobs=num_prompt_logprobs,
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
        )
        self.hot_states = HotStates(hot_state_bytes)
        self.checkpoints: dict[str, RecurrentState] = {}
        self.fetches: list[tuple[CheckpointRef, Future[RecurrentState]]] = []
        self.scheduler = Scheduler(
            self.config, self.runner, vocabulary, self.hot_states, self._fetch, initial_states=initial_states
        )
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
        plan = self.scheduler.schedule()
        self._check_plan(plan.num_tokens)
        if plan.chunks:
            try:
                output = self.runner.step(plan)
            except Exception as error:
                self.scheduler.fail_step(error)
            else:
                self.scheduler.update(output)
        self.deliver()
        self._check_slots()
        return plan.num_tokens

    def run(self, answer_fetches: bool = True) -> None:
        """Step until nothing is left to do."""
        for _ in range(10_000):
            if answer_fetches:
                self.answer_fetches()
            if not self.scheduler.has_work and not (answer_fetches and self.fetches):
                self.scheduler.schedule()
                self.deliver()
                if not self.scheduler.has_work and not (answer_fetches and self.fetches):
                    return
            self.step()
        raise AssertionError("the scheduler never comes to rest")

    def save(self, history: Sequence[int]) -> CheckpointRef:
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

    def answer_fetches(self) -> None:
        """Let the state store answer."""
        fetches, self.fetches = self.fetches, []
        for ref, future in fetches:
            if future.cancelled():
                continue
            state = self.checkpoints.get(ref.checkpoint_id)
            if state is None:
                future.set_exception(CheckpointMissing(f"no checkpoint {ref.checkpoint_id}"))
            else:
                future.set_result(state)

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
            assert extend_digest(ROOT, tokens_of(entry.state)) == chain

    def _fetch(self, ref: CheckpointRef) -> Future[RecurrentState]:
        future: Future[RecurrentState] = Future()
        self.fetches.append((ref, future))
        return future

    def _check_plan(self, num_tokens: int) -> None:
        assert num_tokens <= self.config.max_num_batched_tokens
        planned = {sequence for sequence, _ in self.scheduler._rows}
        for sequence in self.scheduler._seated:
            assert not sequence.is_decoding or sequence in planned, "a sequence that generates was left out"
        waiting_for_tokens = [s for s in self.scheduler._seated if s.phase is not Phase.LOADING]
        assert bool(planned) == bool(waiting_for_tokens)

    def _check_slots(self) -> None:
        sequences = self.scheduler._seated
        slots = [s.slot for s in sequences] + [s.snapshot.slot for s in sequences if s.snapshot is not None]
        assert None not in slots
        assert len(set(slots)) == len(slots), "a slot has two owners"
        assert len(slots) == self.scheduler.num_slots_used, "a slot leaked"


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

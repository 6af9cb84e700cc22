"""Whatever clients, the device and the state store do, the scheduler keeps its promises.

`Simulation` checks after every step that no slot has two owners and none leaks, that the budget is kept and that no
sequence that generates is left out; `Client` that nothing is said after the end.
"""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.messages import CheckpointRef, FinishReason
from tests.engine.scheduler.simulation import (
    LETTERS,
    Client,
    Simulation,
    check_ended_as_expected,
    request_of,
    source_of,
)
from tests.engine.stub_runner import MAX_TOKENS, STUB_SPEC, StubRunner, tokens_of

POISON = LETTERS.tokens.index(b"bcb")
TOKEN_IDS = st.integers(0, len(LETTERS.tokens) - 1)
SHARED = (0, 1, 2, 0, 2, 1, 1)  # what many prompts begin with
STOP_STRINGS = st.lists(st.text(alphabet="abc", min_size=1, max_size=4).map(str.encode), max_size=2)


class SchedulerMachine(RuleBasedStateMachine):
    """Conversations that are continued, aborted, saved and forgotten in any order, on a device with few slots."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = StubRunner(num_slots=5, vocab_size=len(LETTERS.tokens), poisonous=POISON)
        self.simulation = Simulation(self.runner, max_num_seqs=3, max_num_batched_tokens=5, max_num_queued_reqs=3)
        self.prefixes: list[list[int]] = []  # of prompts, up to their borders
        self.histories: list[list[int]] = [[]]  # of states that a client may want to go on from
        self.checkpoints: dict[int, CheckpointRef] = {}  # by index of history
        self.seen: set[str] = set()  # ended and judged

    @initialize(num_hot_states=st.sampled_from([0, 2, 5, 1000]), runs_ahead=st.booleans())
    def begin(self, num_hot_states: int, runs_ahead: bool) -> None:
        """Begin with little memory for states, or much; with a device that must be waited for, or not."""
        self.runner.runs_ahead = runs_ahead
        self.simulation.hot_states.max_bytes = num_hot_states * STUB_SPEC.num_bytes

    @rule(
        base=st.integers(0, 100),
        prompt_ids=st.lists(TOKEN_IDS, min_size=1, max_size=12),
        stop_strings=STOP_STRINGS,
        stop_token_ids=st.lists(TOKEN_IDS, max_size=1),
        max_tokens=st.integers(0, 9),
        keep_state=st.booleans(),
        replay=st.booleans(),
        use_checkpoint=st.booleans(),
        num_shared=st.integers(0, len(SHARED)),
        cuts=st.lists(st.integers(1, 12), max_size=6),
        asks_of_prompt=st.booleans(),
    )
    def submit(
        self,
        base: int,
        prompt_ids: list[int],
        stop_strings: list[bytes],
        stop_token_ids: list[int],
        max_tokens: int,
        keep_state: bool,
        replay: bool,
        use_checkpoint: bool,
        num_shared: int,
        cuts: list[int],
        asks_of_prompt: bool,
    ) -> None:
        """Continue some history, in one of the ways in which a state can be had."""
        index = base % len(self.histories)
        history = self.histories[index]
        if len(history) > MAX_TOKENS - 64:
            return
        older = [i for i in self.checkpoints if history[: len(self.histories[i])] == self.histories[i]]
        checkpoint = self.checkpoints[older[base % len(older)]] if use_checkpoint and older else None
        borders: list[int] = []
        if not history:
            prompt_ids = [*SHARED[:num_shared], *prompt_ids]
            borders = sorted({cut for cut in cuts if cut < len(prompt_ids)})
            self.prefixes += [prompt_ids[:border] for border in borders]
        request = request_of(
            f"request-{len(self.simulation.clients)}",
            prompt_ids,
            source=source_of(history, checkpoint, replay),
            stop_strings=stop_strings,
            stop_token_ids=stop_token_ids,
            max_tokens=max_tokens,
            keep_state=keep_state,
            borders=borders,
            num_prompt_logprobs=0 if asks_of_prompt else None,
        )
        self.simulation.submit(request, history)

    @rule(num_steps=st.integers(1, 5))
    def step(self, num_steps: int) -> None:
        """Let the engine work."""
        for _ in range(num_steps):
            self.simulation.step()

    @rule(which=st.integers(0, 100))
    def abort(self, which: int) -> None:
        """Abort any sequence, ended ones included."""
        if self.simulation.clients:
            ids = list(self.simulation.clients)
            self.simulation.abort(ids[which % len(ids)])

    @rule()
    def answer_fetches(self) -> None:
        """Let the state store answer."""
        self.simulation.answer_fetches()

    @rule(which=st.integers(0, 100))
    def save(self, which: int) -> None:
        """Write a state to the store, if it is still hot."""
        index = which % len(self.histories)
        if self.simulation.kept(self.histories[index]) is not None:
            self.checkpoints[index] = self.simulation.save_history(self.histories[index])

    @rule(which=st.integers(0, 100))
    def forget(self, which: int) -> None:
        """Delete a conversation: its state is in no memory and no store under its chain."""
        history = self.histories[which % len(self.histories)]
        if history:
            self.simulation.scheduler.forget(source_of(history).chain)
            assert self.simulation.kept(history) is None

    @rule(fails=st.booleans(), seconds=st.integers(0, 20))
    def change_store(self, fails: bool, seconds: int) -> None:
        """The store goes away or comes back, and time passes."""
        self.simulation.store_fails = fails
        self.simulation.seconds_skipped += seconds

    @rule()
    def forget_everything(self) -> None:
        """Lose every hot state."""
        self.simulation.forget_everything()

    @precondition(lambda self: self.checkpoints)
    @rule()
    def lose_checkpoints(self) -> None:
        """Lose every checkpoint, while its reference is still known."""
        self.simulation.checkpoints.clear()

    @invariant()
    def ended_sequences_ended_as_they_must(self) -> None:
        """Judge every sequence once, when it has ended."""
        for request_id, client in self.simulation.clients.items():
            if client.has_ended and request_id not in self.seen:
                self.seen.add(request_id)
                self._judge(client)

    def _judge(self, client: Client) -> None:
        if client.failed is not None:
            assert client.failed.code in ("queue_full", "state_unavailable", "numerical_error")
            return
        assert client.last is not None
        if client.last.finish_reason is FinishReason.ABORT:
            return
        check_ended_as_expected(client, self.runner, LETTERS)
        if client.request.num_prompt_logprobs is not None:
            logprobs = [entry for output in client.outputs for entry in output.prompt_logprobs or []]
            assert [entry and -entry.logprob for entry in logprobs] == [None, *client.request.prompt_ids[1:]]
        if client.request.keep_state:
            self.histories.append(client.full_history)

    @invariant()
    def states_are_what_their_chains_say(self) -> None:
        """Every kept state has consumed exactly the tokens it is known by."""
        self.simulation.check_states()

    def teardown(self) -> None:
        """Everything comes to rest, and then nothing is owned any more."""
        self.simulation.run()
        self.ended_sequences_ended_as_they_must()
        self.simulation.check_at_rest()
        self.simulation.check_states()
        for state in self.simulation.hot_states._entries.values():
            assert tokens_of(state.state) in self.histories + self.prefixes


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)

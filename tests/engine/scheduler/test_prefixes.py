"""Prefix states: prompts begin where others have been, and never wait for those who are gone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from engine.messages import ResumeKind, StateSource
from engine.state.prefix_store import MAX_WRITES, REST_SECONDS
from engine.token_chain import root_digest
from tests.engine.scheduler.simulation import (
    LETTERS,
    Client,
    Simulation,
    check_ended_as_expected,
    request_of,
    source_of,
)
from tests.engine.stub_runner import STUB_SPEC, DeviceFault, StubRunner, tokens_of

SYSTEM = [3, 1, 4, 1, 5]
PROMPT = [*SYSTEM, 0, 2, 6, 5, 3, 5]
END = len(PROMPT) - 1


def begin(
    simulation: Simulation,
    name: str,
    prompt_ids: Sequence[int] = PROMPT,
    borders: Sequence[int] = (len(SYSTEM), END),
    keep_state: bool = False,
    num_prompt_logprobs: int | None = None,
    max_tokens: int = 4,
) -> Client:
    """Submit a prompt without history."""
    request = request_of(
        name,
        prompt_ids,
        borders=borders,
        keep_state=keep_state,
        num_prompt_logprobs=num_prompt_logprobs,
        max_tokens=max_tokens,
    )
    return simulation.submit(request)


def num_cached(client: Client) -> int:
    """Return how many prompt tokens the client was told cost nothing."""
    assert client.started is not None
    assert client.started.resume is ResumeKind.NEW
    return client.started.num_cached_tokens


def steps_until(simulation: Simulation, is_true: Callable[[], bool]) -> None:
    """Let the engine work, and the store answer what it is asked to read, until something is so."""
    for _ in range(100):
        simulation.answer_fetches()
        simulation.step()
        if is_true():
            return
    raise AssertionError("it never happened")


def num_prefilled(simulation: Simulation) -> int:
    """Return how many prompt tokens were computed."""
    return simulation.scheduler.counters["rwkv_prefill_tokens_total"]


def counted(simulation: Simulation, name: str) -> dict[str, int]:
    """Return a counter by its label."""
    counters = simulation.prefixes.counters
    return {key.partition(":")[2]: value for key, value in counters.items() if key.startswith(f"rwkv_prefix_{name}")}


def check(simulation: Simulation) -> None:
    """Check that all sequences came to what they would have come to without any prefix state."""
    simulation.check_at_rest()
    simulation.check_states()
    for client in simulation.clients.values():
        check_ended_as_expected(client, simulation.runner, simulation.vocabulary)


# -- what is kept and found -------------------------------------------------------------------------------------------


def test_an_equal_prompt_costs_one_token() -> None:
    """It begins before its last token, which must be consumed to know what follows."""
    simulation = Simulation()
    first = begin(simulation, "first")
    simulation.run()
    second = begin(simulation, "second")
    simulation.run()
    assert (num_cached(first), num_cached(second)) == (0, END)
    assert num_prefilled(simulation) == len(PROMPT) + 1
    assert second.token_ids == first.token_ids
    assert counted(simulation, "lookups_total") == {"miss": 1, "hit_memory": 1}
    assert simulation.prefixes.counters["rwkv_prefix_tokens_reused_total"] == END
    check(simulation)


def test_a_system_prompt_is_paid_once() -> None:
    """Another question behind it costs the question."""
    simulation = Simulation()
    begin(simulation, "first")
    simulation.run()
    other = begin(simulation, "other", [*SYSTEM, 7, 7, 7], [len(SYSTEM), len(SYSTEM) + 2])
    simulation.run()
    assert num_cached(other) == len(SYSTEM)
    check(simulation)


def test_an_answer_that_comes_back_as_history_costs_nothing() -> None:
    """The final state of a stateless chat is the prefix state of its next request."""
    simulation = Simulation()
    first = begin(simulation, "first", keep_state=True)
    simulation.run()
    history = [*PROMPT, *first.token_ids]
    second = begin(simulation, "second", [*history, 1, 2], [len(SYSTEM), len(PROMPT), len(history), len(history) + 1])
    simulation.run()
    assert num_cached(second) == len(history)
    check(simulation)


def test_history_that_comes_back_at_once_waits_for_its_state_to_settle() -> None:
    """The last token is still being consumed when the next request arrives."""
    simulation = Simulation()
    first = begin(simulation, "first", keep_state=True)
    steps_until(simulation, lambda: first.last is not None)
    history = [*PROMPT, *first.token_ids]
    assert simulation.kept(history) is None
    second = begin(simulation, "second", [*history, 1, 2], [len(history)])
    simulation.run()
    assert num_cached(second) == len(history)
    check(simulation)


def test_a_prompt_leaves_at_most_four_states() -> None:
    """At the first border and the last three; not where it is too short."""
    simulation = Simulation(prefix_min_tokens=2)
    begin(simulation, "a", PROMPT, range(1, len(PROMPT)))
    simulation.run()
    left = sorted(entry.state.num_tokens for entry in simulation.hot_states._entries.values())
    assert left == [2, END - 2, END - 1, END]
    assert simulation.clients["a"].last is not None
    assert simulation.clients["a"].last.num_kept_tokens == END
    check(simulation)


def test_a_state_that_is_there_is_not_saved_again() -> None:
    """A hit leaves only what is new, and says so."""
    simulation = Simulation()
    begin(simulation, "first")
    simulation.run()
    saved = []
    save = simulation.runner.save
    simulation.runner.save = lambda slot, n, chain: (saved.append(n), save(slot, n, chain))[1]  # type: ignore[func-returns-value,method-assign]
    again = begin(simulation, "again")
    other = begin(simulation, "other", [*PROMPT, 1], [len(SYSTEM), END, END + 1])
    simulation.run()
    assert saved == [END + 1]
    assert again.last is not None
    assert other.last is not None
    assert (again.last.num_kept_tokens, other.last.num_kept_tokens) == (0, 1)
    check(simulation)


def test_only_the_state_that_is_used_counts_as_used() -> None:
    """The others of the same prompt stay on trial."""
    simulation = Simulation(hot_state_bytes=3 * STUB_SPEC.num_bytes)
    begin(simulation, "first")
    simulation.run()
    begin(simulation, "again")
    simulation.run()
    begin(simulation, "stranger", [7, 7, 7, 7, 7, 7], [4, 5])
    simulation.run()
    assert simulation.kept(PROMPT[:END]) is not None
    assert simulation.kept(SYSTEM) is None
    check(simulation)


def test_who_asks_for_log_probabilities_of_the_prompt_consumes_all_of_it() -> None:
    """But may leave a state."""
    simulation = Simulation()
    first = begin(simulation, "first", num_prompt_logprobs=0)
    simulation.run()
    again = begin(simulation, "again", num_prompt_logprobs=0)
    begin(simulation, "other")
    simulation.run()
    assert num_cached(again) == 0
    assert num_cached(simulation.clients["other"]) == END
    for client in (first, again):
        entries = [entry for output in client.outputs for entry in output.prompt_logprobs or []]
        assert len(entries) == len(PROMPT)
    assert counted(simulation, "misses_total") == {"prompt_logprobs": 2}
    check(simulation)


def test_the_tokens_that_were_skipped_are_penalised_like_the_others() -> None:
    """The repetition penalty looks at the whole prompt, whoever consumed it."""
    simulation = Simulation()
    begin(simulation, "first")
    simulation.run()
    begin(simulation, "again")
    simulation.step()
    (slot,) = [sequence.slot for sequence in simulation.scheduler._seated]
    assert slot is not None
    assert simulation.runner.consumed[slot] == PROMPT
    simulation.run()


def test_a_sequence_that_goes_back_to_its_origin_goes_back_to_the_prefix_state() -> None:
    """A stop string without a spare slot for a snapshot: the state is built again, and is right."""
    simulation = Simulation(StubRunner(num_slots=2, vocab_size=len(LETTERS.tokens)), max_num_seqs=1)
    begin(simulation, "first")
    simulation.run()
    probe = simulation.clients["first"].token_ids
    stop = simulation.vocabulary.decode(probe[1:3])
    request = request_of("stopped", PROMPT, borders=[len(SYSTEM), END], stop_strings=[stop], max_tokens=4)
    client = simulation.submit(request)
    simulation.run()
    assert simulation.scheduler.counters["rwkv_state_rebuilds_total"] == 1
    assert num_cached(client) == END
    state = simulation.kept(client.full_history)
    assert state is not None
    assert tokens_of(state) == [*PROMPT, *client.token_ids]


# -- equal prompts in flight ------------------------------------------------------------------------------------------


def test_equal_prompts_in_flight_are_prefilled_once() -> None:
    """The first runs, the others wait for its state, and cost a token each."""
    simulation = Simulation(max_num_batched_tokens=4)
    clients = [begin(simulation, f"choice-{idx}") for idx in range(4)]
    simulation.run()
    assert [num_cached(client) for client in clients] == [0, END, END, END]
    assert num_prefilled(simulation) == len(PROMPT) + 3
    check(simulation)


def test_prompts_that_only_begin_alike_wait_only_for_what_they_share() -> None:
    """The system prompt is computed once; then they part."""
    simulation = Simulation(max_num_batched_tokens=4)
    begin(simulation, "first", [*SYSTEM, *[1] * 40], [len(SYSTEM), len(SYSTEM) + 39], max_tokens=1)
    other = begin(simulation, "other", [*SYSTEM, 2], [len(SYSTEM)], max_tokens=1)
    steps_until(simulation, lambda: other.has_ended)
    assert num_cached(other) == len(SYSTEM)
    assert not simulation.clients["first"].has_ended
    simulation.run()
    check(simulation)


@pytest.mark.parametrize("num_steps", range(5))
def test_nobody_waits_for_a_sequence_that_was_aborted(num_steps: int) -> None:
    """The next in line takes its place, wherever it was; the others wait for that one."""
    simulation = Simulation(max_num_batched_tokens=4)
    clients = [begin(simulation, f"choice-{idx}") for idx in range(3)]
    for _ in range(num_steps):
        simulation.step()
    simulation.abort("choice-0")
    simulation.run()
    simulation.check_at_rest()
    assert num_cached(clients[2]) == END
    for client in clients[1:]:
        check_ended_as_expected(client, simulation.runner, simulation.vocabulary)


def test_nobody_waits_for_a_sequence_that_failed() -> None:
    """Neither for one whose row broke, nor for one whose state could not be saved."""
    simulation = Simulation(StubRunner(vocab_size=len(LETTERS.tokens), poisonous=9), max_num_batched_tokens=4)
    begin(simulation, "poisoned", [*SYSTEM, 9, *PROMPT], [len(SYSTEM) + 1 + END])
    begin(simulation, "same", [*SYSTEM, 9, *PROMPT], [len(SYSTEM) + 1 + END])
    simulation.run()
    assert [client.failed.code for client in simulation.clients.values() if client.failed] == ["numerical_error"] * 2
    simulation.runner.saves_break = True
    begin(simulation, "unsaved")
    begin(simulation, "unsaved too")
    simulation.run()
    assert all(client.failed for client in simulation.clients.values())
    simulation.check_at_rest()


def test_nobody_waits_where_nothing_can_be_kept() -> None:
    """Without memory for states equal prompts run side by side."""
    simulation = Simulation(hot_state_bytes=0)
    clients = [begin(simulation, f"choice-{idx}") for idx in range(3)]
    simulation.step()
    assert simulation.scheduler.num_running == 3
    simulation.run()
    assert [num_cached(client) for client in clients] == [0, 0, 0]
    assert counted(simulation, "misses_total") == {"new": 1, "not_kept": 2}
    check(simulation)


def test_who_waits_lets_others_pass() -> None:
    """A prompt that shares nothing is seated past one that waits."""
    simulation = Simulation(max_num_batched_tokens=4)
    begin(simulation, "first")
    begin(simulation, "same")
    begin(simulation, "stranger", [7, 7, 7], [2])
    simulation.step()
    assert [sequence.request.request_id for sequence in simulation.scheduler._seated] == ["first", "stranger"]
    simulation.run()
    check(simulation)


# -- misses, by their reason ------------------------------------------------------------------------------------------


def test_a_prompt_nobody_saw_is_new_and_a_short_one_too_short() -> None:
    """What can never hit is told apart from what did not yet."""
    simulation = Simulation(prefix_min_tokens=4)
    begin(simulation, "short", [1, 2, 3], [1, 2])
    begin(simulation, "new")
    simulation.run()
    assert counted(simulation, "misses_total") == {"too_short": 1, "new": 1}
    assert len(simulation.hot_states) == 2


def test_a_state_that_had_to_make_room_is_an_evicted_one() -> None:
    """It was kept once."""
    simulation = Simulation()
    begin(simulation, "first", borders=[3])
    simulation.run()
    simulation.forget_everything()
    begin(simulation, "again", borders=[3])
    simulation.run()
    assert counted(simulation, "misses_total") == {"new": 1, "evicted": 1}


def test_a_border_that_was_passed_but_not_kept_is_told_apart() -> None:
    """The sequence that would have left a state there was aborted before."""
    simulation = Simulation(max_num_batched_tokens=4, prefix_store_min_tokens=100)
    begin(simulation, "first")
    simulation.step()
    simulation.abort("first")
    begin(simulation, "again")
    simulation.run()
    assert counted(simulation, "misses_total") == {"new": 1, "not_kept": 1}


def test_a_request_without_borders_does_not_look() -> None:
    """It asked for nothing, so nothing was missed."""
    simulation = Simulation()
    begin(simulation, "plain", borders=[])
    simulation.run()
    assert not simulation.prefixes.counters


# -- the store behind -------------------------------------------------------------------------------------------------


def test_a_long_system_prompt_goes_to_the_store_and_comes_back() -> None:
    """What ends a prompt does not, before it is used a second time."""
    simulation = Simulation()
    begin(simulation, "first")
    simulation.run()
    assert [state.num_tokens for state in simulation.checkpoints.values()] == [len(SYSTEM)]
    simulation.forget_everything()
    second = begin(simulation, "second", [*SYSTEM, 7, 7], [len(SYSTEM), len(SYSTEM) + 1])
    simulation.run()
    assert num_cached(second) == len(SYSTEM)
    assert second.started is not None
    assert counted(simulation, "lookups_total") == {"miss": 1, "hit_store": 1}
    check(simulation)


def test_what_is_used_twice_goes_to_the_store() -> None:
    """The second use shows that there may be a third."""
    simulation = Simulation()
    for name in "abc":
        begin(simulation, name, borders=[END])
        simulation.run()
        assert len(simulation.checkpoints) == (1 if name == "c" else 0)
    simulation.forget_everything()
    assert num_cached(begin_and_run(simulation, "d")) == END


def begin_and_run(simulation: Simulation, name: str) -> Client:
    """Run a prompt alone."""
    client = begin(simulation, name)
    simulation.run()
    return client


def test_the_longest_state_in_the_store_is_taken() -> None:
    """All borders that are kept are looked for, longest first."""
    simulation = Simulation()
    for name in "abc":
        begin_and_run(simulation, name)
    simulation.forget_everything()
    assert num_cached(begin_and_run(simulation, "d")) == END


def test_short_beginnings_never_trouble_the_store() -> None:
    """Computing them takes less than asking."""
    simulation = Simulation(prefix_store_min_tokens=len(PROMPT))
    begin(simulation, "first")
    simulation.schedule_only()
    assert not simulation.fetches
    simulation.run()
    assert not simulation.checkpoints


def test_equal_prompts_ask_the_store_once() -> None:
    """The others wait for the first one's answer, and take no turn of the engine meanwhile."""
    simulation = Simulation()
    clients = [begin(simulation, f"choice-{idx}") for idx in range(3)]
    simulation.step()
    assert len(simulation.fetches) == 1
    assert not simulation.scheduler.has_work
    simulation.run()
    assert [num_cached(client) for client in clients] == [0, END, END]
    check(simulation)


def test_nobody_waits_for_a_sequence_that_was_aborted_while_the_store_was_asked() -> None:
    """The next one asks for itself."""
    simulation = Simulation()
    begin(simulation, "first")
    second = begin(simulation, "second")
    simulation.step()
    simulation.abort("first")
    assert simulation.scheduler.has_work
    simulation.run()
    assert second.last is not None


def test_a_store_that_does_not_answer_is_a_miss_and_is_left_alone_for_a_while() -> None:
    """No prompt fails for it, and only one waits for its time-out."""
    simulation = Simulation()
    simulation.store_fails = True
    begin(simulation, "first")
    simulation.run()
    begin(simulation, "other", [7, *PROMPT], [1 + END])
    simulation.schedule_only()
    assert not simulation.fetches
    simulation.run()
    assert counted(simulation, "misses_total") == {"store_unavailable": 2}
    simulation.store_fails = False
    simulation.seconds_skipped += REST_SECONDS
    begin(simulation, "later", [8, *PROMPT], [1 + len(SYSTEM), 1 + END])
    simulation.run()
    assert counted(simulation, "misses_total") == {"store_unavailable": 2, "new": 1}
    assert len(simulation.checkpoints) == 1
    check(simulation)


def test_a_state_that_could_not_be_written_is_written_another_time() -> None:
    """It stays in memory; its next uses try again."""
    simulation = Simulation()
    begin(simulation, "first", borders=[len(SYSTEM)])
    steps_until(simulation, lambda: bool(simulation.writes))
    simulation.store_fails = True
    simulation.run()
    assert simulation.prefix_store.num_failed == 1
    simulation.store_fails = False
    simulation.seconds_skipped += REST_SECONDS
    for name in "ab":
        begin(simulation, name, borders=[len(SYSTEM)])
        simulation.run()
    assert len(simulation.checkpoints) == 1


def test_only_so_many_states_are_written_at_once() -> None:
    """A store that takes long holds no more than a few states in memory."""
    simulation = Simulation()
    for name in range(MAX_WRITES + 2):
        begin(simulation, str(name), [name, *PROMPT], [1 + len(SYSTEM), 1 + END])
    for _ in range(30):
        simulation.answer_fetches(and_writes=False)
        simulation.step()
    assert len(simulation.writes) == MAX_WRITES
    simulation.run()
    check(simulation)


def test_a_forgotten_state_is_in_no_memory_and_no_store() -> None:
    """Not even if it was on its way to the store."""
    simulation = Simulation()
    begin(simulation, "first")
    steps_until(simulation, lambda: bool(simulation.writes))
    simulation.scheduler.forget(source_of(SYSTEM).chain)
    simulation.run()
    assert simulation.kept(SYSTEM) is None
    assert not simulation.checkpoints
    begin(simulation, "second", borders=[len(SYSTEM)])
    simulation.run()
    assert len(simulation.checkpoints) == 1
    simulation.scheduler.forget(source_of(SYSTEM).chain)
    assert not simulation.checkpoints


def test_a_device_that_fails_while_a_prefix_state_is_placed_fails_one_sequence() -> None:
    """Like any other state."""
    simulation = Simulation()
    begin(simulation, "first")
    simulation.run()

    def broken(*_: object) -> None:
        raise DeviceFault("no")

    simulation.runner.load = broken  # type: ignore[method-assign]
    second = begin(simulation, "second")
    simulation.run()
    assert second.failed is not None
    assert second.failed.code == "engine_error"


def test_tenants_share_nothing() -> None:
    """Equal tokens after another root are another beginning: nobody can tell what others have asked."""
    simulation = Simulation()
    begin(simulation, "mine")
    simulation.run()
    request = request_of("yours", PROMPT, source=StateSource(num_tokens=0, chain=root_digest("you")), borders=[END])
    client = simulation.submit(request)
    simulation.run()
    assert num_cached(client) == 0
    assert counted(simulation, "misses_total") == {"new": 2}


@pytest.mark.parametrize("prompt_borders", [[0], [2, 2], [3, 2], [len(PROMPT)], [-1]])
def test_borders_that_are_none_are_refused(prompt_borders: list[int]) -> None:
    """They ascend and lie inside the prompt."""
    simulation = Simulation()
    client = begin(simulation, "wrong", borders=prompt_borders)
    assert client.failed is not None
    assert (client.failed.code, client.failed.field) == ("invalid_request", "borders")


def test_a_prompt_with_history_has_no_borders() -> None:
    """What came before it is not in the prompt, so no other prompt begins alike."""
    simulation = Simulation()
    history = begin_and_keep(simulation)
    client = simulation.submit(request_of("later", PROMPT, history, borders=[2]), history)
    assert client.failed is not None
    assert client.failed.field == "borders"


def begin_and_keep(simulation: Simulation) -> list[int]:
    """Run a turn and return the history whose state is kept."""
    client = begin(simulation, "turn", borders=[], keep_state=True)
    simulation.run()
    return client.full_history

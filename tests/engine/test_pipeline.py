"""Steps launched before the last one is read, on a device that looks at nobody's tokens but its own."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from engine.messages import FinishReason, Grammar, SamplingParams
from tests.engine.scheduler.simulation import Client, Simulation, check_ended_as_expected, request_of
from tests.engine.stub_runner import StubRunner, scripted_model, tokens_of

STOP = 5


def simulation_of(*scripts: Sequence[int], **options: int) -> Simulation:
    """Return a simulation where a prompt of one token n is answered with script n."""

    def model(history: Sequence[int], sampling: SamplingParams) -> int:
        return scripted_model(1, scripts[history[0]])(history, sampling)

    return Simulation(StubRunner(vocab_size=12, model=model, runs_ahead=True, **options))


def kept_tokens(simulation: Simulation, client: Client) -> list[int] | None:
    """Return what the kept state behind a client's tokens has consumed."""
    state = simulation.kept(client.full_history)
    return None if state is None else tokens_of(state)


def test_every_decode_but_the_first_is_launched_ahead() -> None:
    """And the step in which the kept state settles."""
    simulation = simulation_of([1])
    client = simulation.submit(request_of("a", [0], max_tokens=6))
    simulation.run()
    assert client.token_ids == [1] * 6
    assert (len(simulation.runner.plans), simulation.runner.num_followed) == (1, 6)
    assert kept_tokens(simulation, client) == client.full_history
    simulation.check_at_rest()


def test_a_sequence_that_ends_by_length_and_keeps_nothing_goes_no_further() -> None:
    """Its end is known beforehand."""
    simulation = simulation_of([1])
    simulation.submit(request_of("a", [0], max_tokens=6, keep_state=False))
    simulation.run()
    assert simulation.runner.num_followed == 5


def test_a_stop_token_is_in_no_state_though_the_next_step_was_on_its_way() -> None:
    """The row does not go on; its neighbour does, and neither sees anything of it."""
    simulation = simulation_of([1, 2, STOP, 7], [3, 4, 6])
    stopped = simulation.submit(request_of("a", [0], stop_token_ids=[STOP]))
    neighbour = simulation.submit(request_of("b", [1], stop_token_ids=[STOP], max_tokens=9))
    simulation.run()
    assert stopped.token_ids == [1, 2]
    assert stopped.last is not None
    assert stopped.last.stop_reason == STOP
    assert kept_tokens(simulation, stopped) == [0, 1, 2]
    assert kept_tokens(simulation, neighbour) == [1, 3, 4] + [6] * 7
    simulation.check_at_rest()


def test_a_stop_token_before_the_minimum_length_ends_nothing() -> None:
    """The device is told the same as the scheduler."""
    simulation = simulation_of([STOP])
    client = simulation.submit(request_of("a", [0], stop_token_ids=[STOP], min_tokens=3))
    simulation.run()
    assert client.token_ids == [STOP] * 3
    assert kept_tokens(simulation, client) == [0, STOP, STOP, STOP]


@pytest.mark.parametrize(
    "options",
    [{"grammar": Grammar(kind="regex", text="a*")}, {"stop_strings": [b"zz"]}, {"max_tokens": 0}],
    ids=["grammar", "stop string and a kept state", "nothing sampled"],
)
def test_what_depends_on_the_token_waits_for_it(options: dict[str, object]) -> None:
    """Nothing is launched ahead of a token that decides what comes next."""
    simulation = simulation_of([0])
    simulation.submit(request_of("a", [0], **options))  # type: ignore[arg-type]
    simulation.answer_compilations()
    simulation.run()
    assert simulation.runner.num_followed == 0
    simulation.check_at_rest()


def test_stop_strings_without_a_state_to_keep_need_not_be_waited_for() -> None:
    """What is consumed beyond the match is lost with the slot."""
    simulation = simulation_of([0, 1, 2, 0])
    client = simulation.submit(request_of("a", [0], stop_strings=[b"bc"], keep_state=False))
    simulation.run()
    assert client.token_ids == [0]
    assert simulation.runner.num_followed > 0
    simulation.check_at_rest()


def test_who_can_be_seated_is_not_kept_waiting() -> None:
    """An arrival joins the next step that is launched, and the others go on ahead; so they do without a free seat."""
    simulation = simulation_of([1])
    for name in "abc":
        simulation.submit(request_of(name, [0], max_tokens=50))
    for _ in range(5):
        simulation.step()
    assert simulation.pipeline.num_in_flight == 1
    arrived = simulation.submit(request_of("d", [0], max_tokens=50))
    simulation.step()  # what was in flight is read, and the arrival is in what follows it
    simulation.step()
    assert arrived.token_ids == [1]
    assert len(simulation.runner.plans) == 1
    num_followed = simulation.runner.num_followed
    simulation.submit(request_of("e", [0]))
    simulation.step()
    assert simulation.runner.num_followed == num_followed + 1
    simulation.run()
    simulation.check_at_rest()


def test_who_asks_for_more_than_a_token_joins_when_nothing_is_in_flight() -> None:
    """It has its seat at once, and is in the next step that is planned from what is known."""
    simulation = simulation_of([1])
    neighbour = simulation.submit(request_of("a", [0], max_tokens=9))
    for _ in range(3):
        simulation.step()
    asking = simulation.submit(request_of("b", [0, 1, 1], max_tokens=2, num_prompt_logprobs=0))
    num_followed = simulation.runner.num_followed
    simulation.step()
    assert (simulation.runner.num_followed, simulation.pipeline.num_in_flight) == (num_followed, 0)
    simulation.step()
    assert (len(asking.token_ids), len(simulation.runner.plans)) == (1, 2)
    simulation.run()
    assert neighbour.token_ids == [1] * 9
    simulation.check_at_rest()


def test_a_prompt_that_takes_several_steps_lets_nobody_wait() -> None:
    """Who generates is in every step, the prompt in every other one, and nothing is planned anew."""
    simulation = simulation_of([1], [2])
    neighbour = simulation.submit(request_of("a", [0], max_tokens=20))
    for _ in range(3):
        simulation.step()
    arrived = simulation.submit(request_of("b", [1] + [0] * 39, max_tokens=3))
    num_tokens = [simulation.step() for _ in range(7)]
    assert num_tokens == [1, 16, 1, 16, 1, 11, 2]
    simulation.run()
    assert len(simulation.runner.plans) == 1
    assert kept_tokens(simulation, neighbour) == [0] + [1] * 20
    assert kept_tokens(simulation, arrived) == arrived.full_history
    simulation.check_at_rest()


def test_a_state_on_the_way_through_a_prompt_is_kept_before_more_is_consumed() -> None:
    """The step after the one that reaches it is the neighbour's alone."""
    simulation = simulation_of([1, 2, 3], [4])
    neighbour = simulation.submit(request_of("a", [1], max_tokens=9))
    for _ in range(2):
        simulation.step()
    leaving = simulation.submit(request_of("b", [0, 9, 9, 9], max_tokens=4, borders=[3]))
    assert [simulation.step() for _ in range(5)] == [1, 4, 1, 2, 2]
    simulation.run()
    assert simulation.kept([0, 9, 9]) is not None
    assert len(simulation.runner.plans) == 1
    assert kept_tokens(simulation, leaving) == leaving.full_history
    assert kept_tokens(simulation, neighbour) == [1] + [4] * 9
    simulation.check_at_rest()


def test_an_abort_reaches_a_sequence_whose_step_is_in_flight() -> None:
    """It hears no more, its slot goes to the next one, and what was on its way is nobody's."""
    simulation = simulation_of([1], [2])
    aborted = simulation.submit(request_of("a", [0], max_tokens=50))
    neighbour = simulation.submit(request_of("b", [1], max_tokens=9))
    for _ in range(3):
        simulation.step()
    assert simulation.pipeline.num_in_flight == 1
    simulation.abort("a")
    next_one = simulation.submit(request_of("c", [1], max_tokens=9))
    simulation.run()
    assert aborted.last is not None
    assert aborted.last.finish_reason is FinishReason.ABORT
    for client in (neighbour, next_one):
        check_ended_as_expected(client, simulation.runner, simulation.vocabulary)
        assert kept_tokens(simulation, client) == client.full_history
    simulation.check_at_rest()


def test_a_state_forgotten_while_it_settles_in_flight_is_not_kept() -> None:
    """The row in flight is ignored."""
    simulation = simulation_of([1])
    client = simulation.submit(request_of("a", [0], max_tokens=3))
    while client.last is None:
        simulation.step()
    assert simulation.pipeline.num_in_flight == 1
    simulation.scheduler.forget((client.started and simulation.scheduler._seated[0].chain) or b"")
    simulation.run()
    assert kept_tokens(simulation, client) is None
    simulation.check_at_rest()


def test_a_fault_fails_everybody_in_flight_once() -> None:
    """Also those who only settle; who waits is seated afterwards."""
    simulation = simulation_of([1, 9, 1], [2], [3], explosive=9)
    clients = [simulation.submit(request_of(name, [n], max_tokens=20)) for n, name in enumerate("ab")]
    for _ in range(2):
        simulation.step()
    simulation.run()
    assert [client.failed.code for client in clients if client.failed] == ["engine_error"] * 2
    assert simulation.scheduler.num_faults_in_a_row == 1
    assert simulation.pipeline.num_in_flight == 0
    later = simulation.submit(request_of("c", [2], max_tokens=3))
    simulation.run()
    assert later.token_ids == [3, 3, 3]
    simulation.check_at_rest()


def test_a_launch_that_raises_fails_the_step_before_it_too() -> None:
    """What the device did of either nobody knows."""
    simulation = simulation_of([1])
    client = simulation.submit(request_of("a", [0], max_tokens=20))
    for _ in range(3):
        simulation.step()
    simulation.runner.broken = True
    simulation.step()
    assert client.failed is not None
    assert simulation.pipeline.num_in_flight == 0
    simulation.runner.broken = False
    simulation.runner.last = None
    again = simulation.submit(request_of("b", [0], max_tokens=2))
    simulation.run()
    assert again.token_ids == [1, 1]
    simulation.check_at_rest()


def test_a_row_that_is_not_a_number_fails_alone_and_goes_no_further() -> None:
    """Its neighbour is in the step that was on its way, and in all later ones."""
    simulation = simulation_of([1, 9, 1], [2], poisonous=9)
    broken = simulation.submit(request_of("a", [0], max_tokens=20))
    neighbour = simulation.submit(request_of("b", [1], max_tokens=6))
    simulation.run()
    assert broken.failed is not None
    assert broken.failed.code == "numerical_error"
    assert kept_tokens(simulation, neighbour) == [1] + [2] * 6
    simulation.check_at_rest()


def test_a_step_is_measured_from_the_end_of_the_one_before() -> None:
    """Steps that overlap share no time: together they take what passed."""
    simulation = simulation_of([1])
    now = [100.0]
    simulation.pipeline._clock = lambda: now[0]
    simulation.submit(request_of("a", [0], max_tokens=20))
    seconds = []
    for _ in range(6):
        simulation.pipeline.launch()
        now[0] += 1.0
        step = simulation.pipeline.read()
        assert step is not None
        assert (step.num_sequences, step.num_decode_tokens + step.num_prefill_tokens) == (1, 1)
        seconds.append(step.step_seconds)
    assert seconds == [1.0] * 6

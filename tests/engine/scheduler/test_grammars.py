"""Sequences with a grammar: how they wait for it, how they end, and that nobody else notices."""

from __future__ import annotations

from engine.messages import FinishReason, Grammar
from engine.scheduler.scheduler import MAX_COMPILE_SECONDS
from engine.scheduler.sequence import Phase
from tests.engine.runner.test_grammars import GROWING
from tests.engine.scheduler.simulation import Simulation, request_of
from tests.engine.scheduler.test_scheduler import BYTES, PROMPT, ids, kept_tokens, saying, token

WORD = Grammar(kind="regex", text="[a-z]{3,9}!")


def compiling(*script: int | bytes) -> Simulation:
    """Return a simulation whose model would say `script`, byte by byte or by token."""
    return saying(*script)


def step_until_compiled(simulation: Simulation) -> None:
    """Let every grammar be compiled, and everything run to its end."""
    simulation.answer_compilations()
    simulation.run()


def test_a_sequence_waits_for_its_grammar_without_a_slot() -> None:
    """Meanwhile others run, also those that came later, and the engine has nothing to do for it."""
    simulation = compiling(b"hello world")
    slow = simulation.submit(request_of("slow", PROMPT, grammar=WORD))
    assert not simulation.scheduler.has_work
    free = simulation.submit(request_of("free", PROMPT, max_tokens=5))
    simulation.run()
    assert free.last is not None
    assert not slow.has_ended
    assert slow.started is None
    assert simulation.scheduler.num_slots_used == 0
    assert not simulation.scheduler.has_work
    step_until_compiled(simulation)
    assert slow.last is not None
    simulation.check_at_rest()


def test_a_slow_grammar_does_not_hold_up_a_quick_one() -> None:
    """Each waits for its own."""
    simulation = compiling(b"hello")
    slow = simulation.submit(request_of("slow", PROMPT, grammar=Grammar(kind="lark", text='start: "x"')))
    quick = simulation.submit(request_of("quick", PROMPT, grammar=WORD, max_tokens=3))
    simulation.answer_compilations("regex")
    simulation.run()
    assert quick.last is not None
    assert not slow.has_ended
    step_until_compiled(simulation)
    assert slow.token_ids == ids(b"x")
    simulation.check_at_rest()


def test_a_complete_text_ends_its_sequence_and_is_kept_whole() -> None:
    """Nothing may follow: the last token is part of the output, nothing stands for the end, the state has it all."""
    simulation = compiling(b"abc! and more")
    client = simulation.submit(request_of("a", PROMPT, grammar=WORD, max_tokens=30))
    step_until_compiled(simulation)
    assert client.token_ids == ids(b"abc!")
    assert client.last is not None
    assert client.last.finish_reason is FinishReason.STOP
    assert client.last.stop_reason is None
    assert client.last.num_sampled_tokens == 4
    assert kept_tokens(simulation, PROMPT + ids(b"abc!")) == PROMPT + ids(b"abc!")
    simulation.check_at_rest()


def test_a_sequence_to_which_nothing_may_be_added_ends_empty() -> None:
    """The prompt is consumed and kept."""
    simulation = compiling(b"abc")
    client = simulation.submit(request_of("a", PROMPT, grammar=Grammar(kind="lark", text='start: ""')))
    step_until_compiled(simulation)
    assert client.token_ids == []
    assert client.last is not None
    assert (client.last.finish_reason, client.last.num_sampled_tokens) == (FinishReason.STOP, 0)
    assert kept_tokens(simulation, PROMPT) == PROMPT


def test_a_grammar_follows_what_was_sampled_and_not_what_is_delivered() -> None:
    """Tokens are held back for a stop string that never comes; the last of them completes the text and releases all."""
    simulation = compiling(b"a", token(b"hello E"), b"N!")
    grammar = Grammar(kind="regex", text="ahello EN!")
    client = simulation.submit(request_of("a", PROMPT, grammar=grammar, stop_strings=[b"END"], max_tokens=30))
    step_until_compiled(simulation)
    assert BYTES.decode(client.token_ids) == b"ahello EN!"
    assert kept_tokens(simulation, PROMPT + client.token_ids) == PROMPT + client.token_ids
    simulation.check_at_rest()


def test_a_stop_string_still_ends_a_sequence_with_a_grammar() -> None:
    """It is cut as ever, and the kept state is of what was delivered."""
    simulation = compiling(b"so END!")
    grammar = Grammar(kind="regex", text="[a-zA-Z ]*!")
    client = simulation.submit(request_of("a", PROMPT, grammar=grammar, stop_strings=[b"END"], max_tokens=30))
    step_until_compiled(simulation)
    assert client.token_ids == ids(b"so ")
    assert client.last is not None
    assert client.last.stop_reason == b"END"
    assert kept_tokens(simulation, PROMPT + ids(b"so ")) == PROMPT + ids(b"so ")


def test_the_limit_cuts_a_text_that_is_not_complete() -> None:
    """`length`, as without a grammar."""
    simulation = compiling(b"abcdef")
    client = simulation.submit(request_of("a", PROMPT, grammar=WORD, max_tokens=2))
    step_until_compiled(simulation)
    assert client.token_ids == ids(b"ab")
    assert client.last is not None
    assert client.last.finish_reason is FinishReason.LENGTH


def test_a_text_that_is_complete_at_the_limit_is_complete() -> None:
    """Its last token is the last that may come: that it may end counts more."""
    simulation = compiling(b"abc!")
    client = simulation.submit(request_of("a", PROMPT, grammar=WORD, max_tokens=4))
    step_until_compiled(simulation)
    assert client.last is not None
    assert client.last.finish_reason is FinishReason.STOP


def test_what_is_no_grammar_is_refused_by_name() -> None:
    """Before it has had a slot; others go on."""
    simulation = compiling(b"hello")
    client = simulation.submit(request_of("a", PROMPT, grammar=Grammar(kind="regex", text="(")))
    free = simulation.submit(request_of("free", PROMPT))
    step_until_compiled(simulation)
    assert client.started is None
    assert client.failed is not None
    assert (client.failed.code, client.failed.field) == ("invalid_request", "grammar")
    assert free.last is not None
    simulation.check_at_rest()


def test_a_grammar_that_cannot_be_followed_fails_its_sequence_alone() -> None:
    """The others in the step do not notice."""
    simulation = compiling(b"sx and more")
    broken = simulation.submit(request_of("broken", PROMPT, grammar=GROWING))
    free = simulation.submit(request_of("free", PROMPT))
    step_until_compiled(simulation)
    assert broken.token_ids == []
    assert broken.failed is not None
    assert (broken.failed.code, broken.failed.field) == ("invalid_request", "grammar")
    assert free.token_ids == ids(b"sx and m")
    simulation.check_at_rest()


def test_a_grammar_that_takes_too_long_is_given_up() -> None:
    """The sequence is refused; what is still compiled for it is not waited for."""
    simulation = compiling(b"hello")
    client = simulation.submit(request_of("a", PROMPT, grammar=WORD))
    ((_, future),) = simulation.compilations
    simulation.seconds_skipped += MAX_COMPILE_SECONDS + 1
    simulation.run()
    assert client.failed is not None
    assert (client.failed.code, client.failed.field) == ("invalid_request", "grammar")
    assert future.cancelled()
    simulation.check_at_rest()


def test_a_fault_of_the_compiler_is_the_engines() -> None:
    """Not the request's: it may be sent again."""
    simulation = compiling(b"hello")
    client = simulation.submit(request_of("a", PROMPT, grammar=WORD))
    ((_, future),) = simulation.compilations
    future.set_exception(OSError("no memory"))
    simulation.run()
    assert client.failed is not None
    assert client.failed.code == "engine_error"
    simulation.check_at_rest()


def test_an_aborted_sequence_does_not_wait_for_its_grammar() -> None:
    """Its place in the compiler's line is given up."""
    simulation = compiling(b"hello")
    client = simulation.submit(request_of("a", PROMPT, grammar=WORD))
    ((_, future),) = simulation.compilations
    simulation.abort("a")
    assert client.last is not None
    assert client.last.finish_reason is FinishReason.ABORT
    assert future.cancelled()
    step_until_compiled(simulation)
    simulation.check_at_rest()


# -- a minimum length, priority, counted tokens -----------------------------------------------------------------------


def test_nothing_ends_a_sequence_before_its_minimum() -> None:
    """Neither a stop token nor a stop string among its first tokens; the runner is told what not to sample."""
    simulation = compiling(b"xEND.xEND")
    stops = {"stop_strings": [b"END"], "stop_token_ids": [ord("x")]}
    client = simulation.submit(request_of("a", PROMPT, max_tokens=30, min_tokens=5, **stops))
    simulation.run()
    assert client.token_ids == ids(b"xEND.")
    assert client.last is not None
    assert client.last.stop_reason == ord("x")
    may_stop = [chunk.may_stop for plan in simulation.runner.plans for chunk in plan.chunks if chunk.sampling]
    assert may_stop == [False] * 5 + [True]
    assert kept_tokens(simulation, PROMPT + ids(b"xEND.")) == PROMPT + ids(b"xEND.")


def test_a_stop_string_may_not_begin_before_the_minimum() -> None:
    """Its first byte is out already: only one that lies wholly behind ends the sequence."""
    simulation = compiling(b"abENDcEND")
    client = simulation.submit(request_of("a", PROMPT, max_tokens=30, min_tokens=3, stop_strings=[b"END"]))
    simulation.run()
    assert client.token_ids == ids(b"abENDc")


def test_lower_priorities_are_admitted_first() -> None:
    """Those that run are not disturbed; among equals, first come, first served."""
    simulation = Simulation(max_num_seqs=1, max_num_batched_tokens=8)
    clients = {"running": simulation.submit(request_of("running", [1], max_tokens=3, priority=9))}
    simulation.step()
    for name, priority in {"late": 1, "first": 0, "second": 0, "urgent": -1}.items():
        clients[name] = simulation.submit(request_of(name, [1], max_tokens=2, priority=priority))
    order = ["running"]
    while not all(client.has_ended for client in clients.values()):
        simulation.step()
        order += [name for name, client in clients.items() if client.started is not None and name not in order]
    assert order == ["running", "urgent", "first", "second", "late"]


def test_counted_tokens_reach_the_runner_when_the_sequence_begins() -> None:
    """Once, and only where there are any."""
    simulation = compiling(b"hello")
    simulation.submit(request_of("a", PROMPT, counted_ids=[3, 4, 3]))
    simulation.submit(request_of("b", PROMPT))
    simulation.step()
    slots = {s.request.request_id: s.slot for s in simulation.scheduler._seated if s.phase is Phase.RUNNING}
    assert simulation.runner.counted == {slots["a"]: [3, 4, 3]}

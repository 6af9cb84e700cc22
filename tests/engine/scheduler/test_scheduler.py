import msgspec
import pytest

from engine.messages import (
    CheckpointRef,
    FinishReason,
    GenerationRequest,
    InitialStateRef,
    ResumeKind,
    StateSource,
    TokenLogprobs,
)
from engine.scheduler.sequence import Phase
from engine.token_chain import extend_digest, root_digest
from tests.engine.scheduler.simulation import CLIENT, Simulation, request_of, source_of
from tests.engine.stub_runner import StubRunner, scripted_model, state_of, tokens_of
from tests.engine.stub_vocabulary import StubVocabulary

BYTES = StubVocabulary([*(bytes([byte]) for byte in range(256)), b"END", b"hello E", b"ND.", b"\n\n"])
PROMPT = list(b"hi")


def ids(text: bytes) -> list[int]:
    """Return one token a byte."""
    return list(text)


def saying(*script: int | bytes, num_slots: int = 9, max_num_seqs: int = 4) -> Simulation:
    """Return a simulation whose model answers `PROMPT` with `script`: bytes, or a token by its bytes in a list."""
    token_ids: list[int] = []
    for part in script:
        token_ids += [part] if isinstance(part, int) else ids(part)
    model = scripted_model(len(PROMPT), token_ids)
    runner = StubRunner(num_slots=num_slots, vocab_size=len(BYTES.tokens), model=model)
    return Simulation(runner, vocabulary=BYTES, max_num_seqs=max_num_seqs)


def token(data: bytes) -> int:
    """Return the id of the token with these bytes."""
    return BYTES.tokens.index(data)


def kept_tokens(simulation: Simulation, history: list[int]) -> list[int]:
    """Return what the kept state behind `history` has consumed."""
    state = simulation.kept(history)
    assert state is not None, "the state was not kept"
    return tokens_of(state)


# -- stop strings and the state that is kept --------------------------------------------------------------------------


def test_a_stop_string_is_neither_delivered_nor_consumed() -> None:
    """The kept state has seen the prompt and the text before the stop string, though the device had gone on."""
    simulation = saying(b"so. END more")
    client = simulation.submit(request_of("a", PROMPT, stop_strings=[b"END"], max_tokens=30))
    simulation.run()
    assert client.token_ids == ids(b"so. ")
    assert client.last is not None
    assert client.last.stop_reason == b"END"
    assert client.last.num_sampled_tokens == len(b"so. END")
    assert kept_tokens(simulation, PROMPT + ids(b"so. ")) == PROMPT + ids(b"so. ")
    assert simulation.scheduler.counters["rwkv_state_rebuilds_total"] == 0
    simulation.check_at_rest()


def test_a_stop_string_inside_one_token_needs_no_snapshot() -> None:
    """A token that completes a match is never consumed, so there is nothing to undo."""
    simulation = saying(b"ok", token(b"END"))
    simulation.runner.copy = None  # type: ignore[assignment,method-assign]  # a call would raise
    client = simulation.submit(request_of("a", PROMPT, stop_strings=[b"END"]))
    simulation.run()
    assert client.token_ids == ids(b"ok")
    assert kept_tokens(simulation, PROMPT + ids(b"ok")) == PROMPT + ids(b"ok")


def test_the_text_before_a_stop_string_inside_a_token_becomes_tokens_of_its_own() -> None:
    """Where the stop string begins and ends inside tokens, the rest of the first one is delivered and consumed."""
    simulation = saying(token(b"hello E"), token(b"ND."))
    client = simulation.submit(request_of("a", PROMPT, stop_strings=[b"END"], num_logprobs=0))
    simulation.run()
    assert client.token_ids == ids(b"hello ")
    assert client.last is not None
    assert client.last.logprobs == [TokenLogprobs(-float(token(b"hello E")))] * len(b"hello ")
    assert kept_tokens(simulation, PROMPT + ids(b"hello ")) == PROMPT + ids(b"hello ")


def test_a_match_that_dies_gives_its_snapshot_back() -> None:
    """The spare slot is only used while something is held."""
    simulation = saying(b"xEx.......")
    simulation.submit(request_of("a", PROMPT, stop_strings=[b"END"], max_tokens=30))
    slots_used = []
    for _ in range(5):
        simulation.step()
        slots_used.append(simulation.scheduler.num_slots_used)
    # Prompt (x sampled), x (E sampled), E consumed behind a snapshot (x sampled: dead), x, ...
    assert slots_used == [1, 1, 1, 1, 1]
    assert simulation.clients["a"].token_ids == ids(b"xEx..")


def test_a_match_that_lives_keeps_its_snapshot() -> None:
    """One spare slot from the first held token on, however many follow."""
    simulation = saying(b"xENx......")
    simulation.submit(request_of("a", PROMPT, stop_strings=[b"END"], max_tokens=30))
    slots_used = []
    for _ in range(5):
        simulation.step()
        slots_used.append(simulation.scheduler.num_slots_used)
    assert slots_used == [1, 1, 2, 1, 1]


def test_a_match_that_begins_anew_moves_its_snapshot() -> None:
    """When one hold ends in the token in which the next begins, the state before that token is the one to have."""
    simulation = saying(b"EEEEND")
    client = simulation.submit(request_of("a", PROMPT, stop_strings=[b"END"], max_tokens=30))
    simulation.run()
    assert client.token_ids == ids(b"EEE")
    assert kept_tokens(simulation, PROMPT + ids(b"EEE")) == PROMPT + ids(b"EEE")
    assert simulation.scheduler.counters["rwkv_settled_tokens_total"] == 0


def test_without_a_spare_slot_the_state_is_rebuilt_from_its_source() -> None:
    """No snapshot: the prompt and the delivered tokens are consumed again. Slower, never wrong."""
    simulation = saying(b"so. END", num_slots=2, max_num_seqs=1)
    simulation.submit(request_of("a", PROMPT, stop_strings=[b"END"], max_tokens=30))
    simulation.run()
    assert kept_tokens(simulation, PROMPT + ids(b"so. ")) == PROMPT + ids(b"so. ")
    assert simulation.scheduler.counters["rwkv_state_rebuilds_total"] == 1
    assert simulation.scheduler.counters["rwkv_settled_tokens_total"] == len(PROMPT + ids(b"so. "))


def test_a_rebuilt_state_begins_from_the_hot_state_even_if_that_was_forgotten_meanwhile() -> None:
    """A sequence that may have to go back holds on to where it came from."""
    simulation = saying(b"so. END", num_slots=2, max_num_seqs=1)
    simulation.submit(request_of("a", PROMPT[:1], max_tokens=0))
    simulation.run()
    simulation.submit(request_of("b", PROMPT[1:], PROMPT[:1], stop_strings=[b"END"], max_tokens=30), PROMPT[:1])
    simulation.step()
    simulation.forget_everything()
    simulation.run()
    assert simulation.clients["b"].started is not None
    assert simulation.clients["b"].started.resume is ResumeKind.HOT
    assert kept_tokens(simulation, PROMPT + ids(b"so. ")) == PROMPT + ids(b"so. ")


def test_without_keep_state_nothing_is_copied_and_nothing_kept() -> None:
    """A sequence whose state nobody wants costs nothing after its last token."""
    simulation = saying(b"so. END")
    simulation.runner.copy = simulation.runner.save = None  # type: ignore[assignment,method-assign]
    simulation.submit(request_of("a", PROMPT, stop_strings=[b"END"], max_tokens=30, keep_state=False))
    simulation.run()
    assert simulation.clients["a"].token_ids == ids(b"so. ")
    assert len(simulation.hot_states) == 0
    simulation.check_at_rest()


def test_bytes_that_no_token_can_spell_are_lost_and_counted() -> None:
    """The state follows what was delivered, even where the vocabulary cannot say it all."""
    vocabulary = StubVocabulary([b"a", b"??a"], spellable=[b"a"])
    runner = StubRunner(vocab_size=2, model=scripted_model(1, [0, 1]))
    simulation = Simulation(runner, vocabulary=vocabulary)
    client = simulation.submit(request_of("x", [0], stop_strings=[b"?a"]))
    simulation.run()
    assert client.token_ids == [0]
    assert kept_tokens(simulation, [0, 0]) == [0, 0]
    assert simulation.scheduler.counters["rwkv_stop_bytes_lost_total"] == 1


def test_a_stop_token_is_neither_delivered_nor_consumed() -> None:
    """The sequence ends before the stop token, and what was held back for a stop string is delivered."""
    simulation = saying(b"EN", 0)
    client = simulation.submit(request_of("a", PROMPT, stop_strings=[b"END"], stop_token_ids=[0]))
    simulation.run()
    assert client.last is not None
    assert (client.token_ids, client.last.finish_reason, client.last.stop_reason) == (ids(b"EN"), "stop", 0)
    assert kept_tokens(simulation, PROMPT + ids(b"EN")) == PROMPT + ids(b"EN")


def test_the_last_token_of_a_sequence_that_ran_to_its_limit_is_consumed() -> None:
    """The token sampled last is delivered, so the kept state must have seen it."""
    simulation = saying(b"abcdef")
    client = simulation.submit(request_of("a", PROMPT, max_tokens=3))
    simulation.run()
    assert client.last is not None
    assert (client.token_ids, client.last.finish_reason) == (ids(b"abc"), "length")
    assert kept_tokens(simulation, PROMPT + ids(b"abc")) == PROMPT + ids(b"abc")


def test_no_tokens_wanted_means_the_prompt_is_consumed() -> None:
    """With max_tokens 0 nothing is sampled, and the state is kept."""
    simulation = saying(b"x")
    client = simulation.submit(request_of("a", PROMPT, max_tokens=0))
    simulation.run()
    assert client.last is not None
    assert (client.token_ids, client.last.finish_reason, client.last.num_sampled_tokens) == ([], "length", 0)
    assert kept_tokens(simulation, PROMPT) == PROMPT


# -- where states come from -------------------------------------------------------------------------------------------


def first_turn(simulation: Simulation) -> list[int]:
    """Run a turn and return the history its kept state has consumed."""
    client = simulation.submit(request_of("first", [0, 1, 2], max_tokens=3))
    simulation.run()
    return client.full_history


def resume(simulation: Simulation, request: GenerationRequest, history: list[int]) -> tuple[ResumeKind, int]:
    """Run the next turn; returns how its state was had and how many tokens were replayed."""
    client = simulation.submit(request, history)
    simulation.run()
    assert client.started is not None, client.failed
    assert kept_tokens(simulation, client.full_history) == client.full_history
    return client.started.resume, client.started.num_replayed_tokens


def test_a_first_turn_begins_from_nothing() -> None:
    """No history, no state to look for."""
    simulation = Simulation()
    assert resume(simulation, request_of("a", [1, 2]), []) == (ResumeKind.NEW, 0)


def test_a_state_in_memory_is_hot() -> None:
    """The state kept by one turn is where the next begins."""
    simulation = Simulation()
    history = first_turn(simulation)
    assert resume(simulation, request_of("b", [1], history), history) == (ResumeKind.HOT, 0)


def test_a_state_that_left_memory_is_restored_from_its_checkpoint() -> None:
    """The checkpoint is fetched while the sequence has its slot and others run."""
    simulation = Simulation()
    history = first_turn(simulation)
    ref = simulation.save_history(history)
    simulation.forget_everything()
    request = request_of("b", [1], source=source_of(history, ref))
    assert resume(simulation, request, history) == (ResumeKind.RESTORED, 0)


def test_only_a_fetched_state_takes_time_to_load() -> None:
    """Zero means that no checkpoint was needed."""
    simulation = Simulation()
    history = first_turn(simulation)
    ref = simulation.save_history(history)
    simulation.submit(request_of("hot", [1], history), history)
    simulation.run()
    simulation.forget_everything()
    simulation.submit(request_of("restored", [1], source=source_of(history, ref)), history)
    simulation.run()
    started = {name: client.started for name, client in simulation.clients.items()}
    assert [name for name, event in started.items() if event is not None and event.load_seconds > 0] == ["restored"]


def test_an_older_checkpoint_is_brought_up_to_date_by_replay() -> None:
    """The tokens after the checkpoint are consumed before the prompt, and it is said so."""
    simulation = Simulation()
    history = first_turn(simulation)
    ref = simulation.save_history(history)
    longer = [*history, 4, 5]
    simulation.forget_everything()
    request = request_of("b", [1], source=source_of(longer, ref))
    assert resume(simulation, request, longer) == (ResumeKind.REPLAYED, 2)


def test_an_older_state_in_memory_spares_the_fetch() -> None:
    """Replay starts from the checkpoint's state where that is still hot."""
    simulation = Simulation()
    history = first_turn(simulation)
    ref = simulation.save_history(history)
    simulation.checkpoints.clear()
    request = request_of("b", [1], source=source_of([*history, 4, 5], ref))
    assert resume(simulation, request, [*history, 4, 5]) == (ResumeKind.REPLAYED, 2)


def test_without_any_state_the_whole_history_is_replayed() -> None:
    """The log is the truth: a state can always be computed again."""
    simulation = Simulation()
    history = [3, 1, 4, 1, 5]
    request = request_of("b", [1], source=source_of(history, replay=True))
    assert resume(simulation, request, history) == (ResumeKind.REPLAYED, 5)


def test_replayed_tokens_are_marked_for_the_sampler() -> None:
    """Penalties count the request's own tokens, however its state was had."""
    simulation = Simulation(max_num_batched_tokens=4)
    history = [3, 1, 4, 1, 5]
    simulation.submit(request_of("b", [1, 2, 3], source=source_of(history, replay=True), max_tokens=1), history)
    simulation.run()
    chunks = [(len(plan.chunks[0].token_ids), plan.chunks[0].num_replayed) for plan in simulation.runner.plans]
    assert chunks == [(4, 4), (4, 1), (1, 0)]


def test_a_state_that_cannot_be_had_fails_the_request() -> None:
    """Neither memory, nor a checkpoint, nor tokens: nothing is resumed from anywhere else."""
    simulation = Simulation()
    client = simulation.submit(request_of("b", [1], [3, 1, 4]))
    simulation.run()
    assert client.failed is not None
    assert client.failed.code == "state_unavailable"
    simulation.check_at_rest()


def test_a_missing_checkpoint_fails_the_request_and_is_counted() -> None:
    """The client is told, and can submit again with the whole history."""
    simulation = Simulation()
    ref = CheckpointRef(checkpoint_id="gone", num_tokens=3, chain=source_of([3, 1, 4]).chain)
    client = simulation.submit(request_of("b", [1], source=source_of([3, 1, 4], ref)))
    simulation.run()
    assert client.failed is not None
    assert client.failed.code == "state_unavailable"
    assert simulation.scheduler.counters["rwkv_checkpoints_missing_total"] == 1
    simulation.check_at_rest()


def test_a_turn_waits_for_the_state_of_the_one_before_to_settle() -> None:
    """The last output is sent before the state is final; a client that is quick finds the state hot all the same."""
    simulation = Simulation()
    first = simulation.submit(request_of("first", [0, 1, 2], max_tokens=3))
    while first.last is None:
        simulation.step()
    assert simulation.scheduler.is_settling(source_of(first.full_history).chain)
    assert len(simulation.hot_states) == 0
    history = first.full_history
    assert resume(simulation, request_of("b", [1], history), history) == (ResumeKind.HOT, 0)


def test_a_sequence_that_waits_for_a_state_does_not_hold_up_others() -> None:
    """Who comes later and can run, runs."""
    simulation = Simulation()
    first = simulation.submit(request_of("first", [0, 1, 2], max_tokens=3))
    while first.last is None:
        simulation.step()
    waiting = simulation.submit(request_of("b", [1], first.full_history), first.full_history)
    other = simulation.submit(request_of("c", [1]))
    simulation.scheduler.schedule()
    simulation.deliver()
    assert waiting.started is None
    assert other.started is not None


def test_a_state_that_is_forgotten_while_it_settles_is_never_kept() -> None:
    """A conversation that is deleted right after its turn leaves nothing in memory."""
    simulation = Simulation()
    client = simulation.submit(request_of("a", [0, 1, 2], max_tokens=3))
    while client.last is None:
        simulation.step()
    chain = source_of(client.full_history).chain
    assert simulation.scheduler.is_settling(chain)
    simulation.scheduler.forget(chain)
    simulation.run()
    assert len(simulation.hot_states) == 0
    simulation.check_at_rest()


# -- who runs ---------------------------------------------------------------------------------------------------------


def test_a_long_prompt_never_makes_others_wait() -> None:
    """While a prompt of many budgets streams in, every sequence that generates gets a token in every step."""
    simulation = Simulation(max_num_batched_tokens=8)
    talking = [simulation.submit(request_of(f"talk-{i}", [i], max_tokens=40)) for i in range(3)]
    simulation.step()
    simulation.submit(request_of("long", [1] * 60, max_tokens=1))
    for num_steps in range(2, 12):
        assert simulation.step() == 8
        assert [len(client.token_ids) for client in talking] == [num_steps] * 3


def test_a_prompt_is_cut_where_operators_end_a_chunk() -> None:
    """In multiples of their chunks while it is cut at all, whoever else takes from the budget."""
    simulation = Simulation(max_num_batched_tokens=70)
    talking = simulation.submit(request_of("talk", [1], max_tokens=40))
    simulation.step()
    simulation.submit(request_of("long", [1] * 170, max_tokens=1))
    assert [simulation.step() for _ in range(3)] == [1 + 64, 1 + 64, 1 + 42]
    assert len(talking.token_ids) == 4


def test_a_prompts_last_token_is_not_left_alone() -> None:
    """Lone tokens are another way of the operators, with other bits: a piece gives up a chunk so that none is left."""
    simulation = Simulation(max_num_batched_tokens=64)
    simulation.submit(request_of("long", [1] * 129, max_tokens=1))
    assert [simulation.step() for _ in range(3)] == [64, 32, 33]


def test_a_single_token_overtakes_a_long_prompt() -> None:
    """What costs one token never waits for what costs many, even if that came first."""
    simulation = Simulation(max_num_batched_tokens=8)
    simulation.submit(request_of("long", [1] * 60, max_tokens=1))
    simulation.step()
    short = simulation.submit(request_of("short", [1], max_tokens=40))
    for num_steps in range(1, 5):
        assert simulation.step() == 8
        assert len(short.token_ids) == num_steps


def test_a_prompt_moves_on_even_when_the_budget_is_full_of_others() -> None:
    """The budget has a token for every seat, so the smallest one allowed still lets a prompt through."""
    simulation = Simulation(max_num_batched_tokens=4)
    for i in range(3):
        simulation.submit(request_of(f"talk-{i}", [i], max_tokens=40))
    simulation.step()
    late = simulation.submit(request_of("late", [1, 2, 3], max_tokens=1))
    for _ in range(3):
        simulation.step()
    assert len(late.token_ids) == 1


def test_a_budget_smaller_than_the_batch_is_refused() -> None:
    """Some sequence would starve."""
    with pytest.raises(ValueError, match="max_num_batched_tokens"):
        Simulation(max_num_seqs=8, max_num_batched_tokens=7)


def test_sequences_are_admitted_in_order_of_arrival() -> None:
    """First come, first served."""
    simulation = Simulation(max_num_seqs=1, max_num_batched_tokens=8)
    clients = [simulation.submit(request_of(f"{i}", [i], max_tokens=2)) for i in range(3)]
    order: list[str] = []
    while not all(client.has_ended for client in clients):
        simulation.step()
        order += [c.request.request_id for c in clients if c.has_ended and c.request.request_id not in order]
    assert order == ["0", "1", "2"]


def test_more_than_may_wait_are_refused() -> None:
    """Free seats and the queue are filled, and the next one is told so at once."""
    simulation = Simulation(max_num_seqs=2, max_num_queued_reqs=1)
    clients = [simulation.submit(request_of(f"{i}", [i])) for i in range(4)]
    assert [client.failed and client.failed.code for client in clients] == [None, None, None, "queue_full"]
    simulation.run()
    simulation.check_at_rest()


def test_a_draining_engine_finishes_what_it_has_and_takes_nothing_new() -> None:
    """Work that was accepted is done, new work refused."""
    simulation = Simulation(max_num_seqs=1)
    accepted = [simulation.submit(request_of(f"{i}", [i])) for i in range(2)]
    simulation.scheduler.draining = True
    refused = simulation.submit(request_of("late", [1]))
    simulation.run()
    assert [client.last is not None for client in accepted] == [True, True]
    assert refused.failed is not None
    assert refused.failed.code == "draining"


def test_an_impossible_request_is_refused_by_field() -> None:
    """It never reaches a batch."""
    simulation = Simulation()
    client = simulation.submit(request_of("a", [len(simulation.vocabulary.tokens)]))
    assert client.failed is not None
    assert (client.failed.code, client.failed.field) == ("invalid_request", "prompt_ids")


def test_a_request_id_in_use_is_refused() -> None:
    """Two sequences of a client that could not be told apart never run at once."""
    simulation = Simulation()
    request = request_of("a", [1])
    simulation.submit(request)
    simulation.scheduler.submit(CLIENT, request)
    [(_, event)] = simulation.scheduler.take_events()
    assert msgspec.structs.asdict(event)["field"] == "request_id"


def test_a_request_id_may_be_used_again_while_the_last_state_settles() -> None:
    """Two sequences with one id, the older one already over for its client, do not get in each other's way."""
    simulation = Simulation(max_num_seqs=1)
    first = simulation.submit(request_of("a", [1], max_tokens=2))
    while first.last is None:
        simulation.step()
    again = simulation.submit(request_of("a", [2], max_tokens=2))
    simulation.run()
    assert again.last is not None
    assert len(simulation.hot_states) == 2
    simulation.check_at_rest()


# -- log-probabilities ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [4, 5, 100])
@pytest.mark.parametrize("history", [[], [5, 6, 7]])
def test_every_prompt_token_but_the_first_has_log_probabilities(budget: int, history: list[int]) -> None:
    """However the prompt is cut and whatever was replayed before it."""
    simulation = Simulation(max_num_batched_tokens=budget)
    prompt = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    source = source_of(history, replay=True)
    simulation.submit(request_of("a", prompt, source=source, max_tokens=1, num_prompt_logprobs=0), history)
    simulation.run()
    entries = [entry for output in simulation.clients["a"].outputs for entry in output.prompt_logprobs or []]
    assert entries == [None, *(TokenLogprobs(-float(token_id)) for token_id in prompt[1:])]


def test_a_prompt_of_one_token_has_one_empty_entry() -> None:
    """Nothing comes before the only token."""
    simulation = Simulation()
    simulation.submit(request_of("a", [3], max_tokens=1, num_prompt_logprobs=2))
    simulation.run()
    assert simulation.clients["a"].outputs[0].prompt_logprobs == [None]


def test_every_delivered_token_has_log_probabilities() -> None:
    """Held tokens keep theirs until they are delivered."""
    simulation = saying(b"xENx")
    simulation.submit(request_of("a", PROMPT, stop_strings=[b"END"], max_tokens=4, num_logprobs=0))
    simulation.run()
    entries = [entry for output in simulation.clients["a"].outputs for entry in output.logprobs or []]
    assert entries == [TokenLogprobs(-float(byte)) for byte in b"xENx"]


# -- ends that nobody wanted ------------------------------------------------------------------------------------------


def loading(simulation: Simulation) -> None:
    """Bring a sequence to where its checkpoint is being fetched."""
    ref = CheckpointRef(checkpoint_id="slow", num_tokens=3, chain=source_of([3, 1, 4]).chain)
    simulation.submit(request_of("a", PROMPT, source=source_of([3, 1, 4], ref)))
    simulation.scheduler.schedule()


def waiting(simulation: Simulation) -> None:
    """Bring a sequence to where it waits for a slot."""
    simulation.submit(request_of("a", PROMPT))


def prefilling(simulation: Simulation) -> None:
    """Bring a sequence into the middle of its prompt."""
    simulation.submit(request_of("a", PROMPT * 20))
    simulation.step()


def decoding(simulation: Simulation) -> None:
    """Bring a sequence to where it has generated a token."""
    simulation.submit(request_of("a", PROMPT, stop_strings=[b"END"]))
    simulation.step()
    simulation.step()


def holding(simulation: Simulation) -> None:
    """Bring a sequence to where tokens are held back behind a snapshot."""
    decoding(simulation)
    simulation.step()
    assert simulation.scheduler.num_slots_used == 2


@pytest.mark.parametrize("reach", [waiting, loading, prefilling, decoding, holding])
def test_an_abort_ends_a_sequence_in_any_phase(reach) -> None:  # type: ignore[no-untyped-def]
    """It is over at once, holds nothing any more, delivers nothing that was held, and keeps no state."""
    simulation = saying(b"xEND" * 9)
    reach(simulation)
    simulation.abort("a")
    simulation.deliver()
    client = simulation.clients["a"]
    assert client.last is not None
    assert client.last.finish_reason is FinishReason.ABORT
    assert b"E" not in bytes(client.token_ids)
    simulation.check_at_rest()
    simulation.answer_fetches()
    simulation.run()
    assert len(simulation.hot_states) == 0


def test_an_abort_calls_off_the_fetch() -> None:
    """A checkpoint that nobody waits for any more need not be read."""
    simulation = saying(b"x")
    loading(simulation)
    simulation.abort("a")
    [(_, future)] = simulation.fetches
    assert future.cancelled()


def test_an_abort_after_the_end_changes_nothing() -> None:
    """A client that heard the end hears nothing more, and the state settles."""
    simulation = Simulation()
    client = simulation.submit(request_of("a", [1], max_tokens=2))
    while client.last is None:
        simulation.step()
    assert [s.phase for s in simulation.scheduler._seated] == [Phase.SETTLING]
    simulation.abort("a")
    simulation.abort("never heard of")
    simulation.run()
    assert kept_tokens(simulation, client.full_history) == client.full_history


def test_a_client_that_is_gone_takes_its_sequences_along_and_no_others() -> None:
    """What one client leaves behind is freed; another's work goes on."""
    simulation = Simulation(max_num_seqs=2)
    mine = simulation.submit(request_of("mine", [1], max_tokens=3))
    simulation.scheduler.submit(b"gone", request_of("running", [1]))
    simulation.scheduler.submit(b"gone", request_of("waiting", [1]))
    simulation.scheduler.update(simulation.runner.step(simulation.scheduler.schedule()))
    simulation.scheduler.abort_client(b"gone")
    for owner, event in simulation.scheduler.take_events():
        if owner == CLIENT:
            mine.hear(event)
    simulation.run()
    assert mine.last is not None
    simulation.check_at_rest()


def test_a_poisoned_row_fails_alone() -> None:
    """One row is not a number; the rest of the batch does not notice, and the slot is used again."""
    runner = StubRunner(num_slots=9, vocab_size=12, poisonous=11, model=lambda history, sampling: 1)
    simulation = Simulation(runner)
    poisoned = simulation.submit(request_of("poisoned", [11]))
    healthy = simulation.submit(request_of("healthy", [1], max_tokens=3))
    simulation.run()
    later = simulation.submit(request_of("later", [2], max_tokens=3))
    simulation.run()
    assert poisoned.failed is not None
    assert poisoned.failed.code == "numerical_error"
    assert healthy.token_ids == later.token_ids == [1, 1, 1]
    simulation.check_at_rest()


def test_a_state_that_breaks_while_it_settles_is_not_kept() -> None:
    """The client has its answer; the state is lost, counted, and never offered."""
    runner = StubRunner(num_slots=9, vocab_size=12, poisonous=11, model=lambda history, sampling: 11)
    simulation = Simulation(runner)
    client = simulation.submit(request_of("a", [1], max_tokens=1))
    simulation.run()
    assert client.last is not None
    assert len(simulation.hot_states) == 0
    assert simulation.scheduler.counters["rwkv_states_lost_total"] == 1
    simulation.check_at_rest()


def test_a_step_that_raises_fails_those_in_it_and_nobody_else() -> None:
    """Who waited for a slot then runs in one that begins afresh."""
    runner = StubRunner(num_slots=9, vocab_size=12, explosive=11, model=lambda history, sampling: 1)
    simulation = Simulation(runner, max_num_seqs=2)
    in_step = [simulation.submit(request_of("a", [11])), simulation.submit(request_of("b", [1]))]
    waited = simulation.submit(request_of("c", [1], max_tokens=3))
    simulation.run()
    assert [client.failed and client.failed.code for client in in_step] == ["engine_error"] * 2
    assert waited.token_ids == [1, 1, 1]
    assert simulation.scheduler.num_faults_in_a_row == 0
    simulation.check_at_rest()


def test_a_device_that_cannot_begin_fails_the_sequence_and_is_noticed() -> None:
    """Every call that raises counts, so that a device that is gone for good can be told from a bad moment."""
    simulation = Simulation()
    simulation.runner.broken = True
    clients = [simulation.submit(request_of(f"{i}", [1])) for i in range(3)]
    simulation.run()
    assert [client.failed and client.failed.code for client in clients] == ["engine_error"] * 3
    assert simulation.scheduler.num_faults_in_a_row == 3
    simulation.check_at_rest()


def test_a_device_that_cannot_copy_fails_the_sequence() -> None:
    """A state that might have to be taken back must not go on without a way back."""
    simulation = saying(b"xEND")
    decoding(simulation)
    simulation.runner.broken = True
    simulation.scheduler.schedule()
    simulation.deliver()
    assert simulation.clients["a"].failed is not None
    simulation.check_at_rest()


def test_a_state_that_cannot_be_saved_is_lost_and_counted() -> None:
    """The slot comes back even so."""
    simulation = Simulation()
    simulation.runner.saves_break = True
    client = simulation.submit(request_of("a", [1], max_tokens=1))
    simulation.run()
    assert client.last is not None
    assert simulation.scheduler.counters["rwkv_states_lost_total"] == 1
    simulation.check_at_rest()


def test_a_token_the_vocabulary_does_not_know_fails_its_row_alone() -> None:
    """A fault in the engine's own bookkeeping for one row is that row's."""
    runner = StubRunner(num_slots=9, vocab_size=13, model=lambda history, sampling: 12 if history[0] == 1 else 2)
    simulation = Simulation(runner)
    broken = simulation.submit(request_of("a", [1]))
    healthy = simulation.submit(request_of("b", [2], max_tokens=3))
    simulation.run()
    assert broken.failed is not None
    assert broken.failed.code == "engine_error"
    assert healthy.token_ids == [2, 2, 2]
    simulation.check_at_rest()


def test_what_happened_is_counted() -> None:
    """Every consumed token is one of a prompt, of a generation, or of a state that settles."""
    simulation = Simulation()
    history = first_turn(simulation)
    simulation.submit(request_of("b", [1, 2], history, max_tokens=4), history)
    simulation.run()
    assert simulation.scheduler.counters == {
        "rwkv_prefill_tokens_total": 5,
        "rwkv_decode_tokens_total": 5,
        "rwkv_settled_tokens_total": 2,
        "rwkv_stop_bytes_lost_total": 0,
    }


# -- initial states ---------------------------------------------------------------------------------------------------

TUNED = InitialStateRef("tuned", "00ff")
TUNED_ROOT = root_digest(initial_state="00ff")


def tuned_source(history: list[int], initial_state: InitialStateRef = TUNED) -> StateSource:
    """Return the source of the state behind a history that begins from the tuned state, to be replayed."""
    chain = extend_digest(TUNED_ROOT, history)
    return StateSource(num_tokens=len(history), chain=chain, replay_ids=history, initial_state=initial_state)


@pytest.mark.parametrize("history", [[], [5, 6]], ids=["new", "replayed"])
def test_a_history_begins_from_its_initial_state(history: list[int]) -> None:
    """A first turn and a replay both have the tuned state in their slot first; the kept state has its chain."""
    runner, tuned = StubRunner(vocab_size=len(BYTES.tokens)), state_of([], TUNED_ROOT)
    simulation = Simulation(runner, vocabulary=BYTES, initial_states={TUNED: tuned})
    client = simulation.submit(request_of("a", PROMPT, source=tuned_source(history)), history)
    simulation.run()
    assert client.started is not None
    assert client.started.resume is (ResumeKind.REPLAYED if history else ResumeKind.NEW)
    chain = extend_digest(TUNED_ROOT, client.full_history)
    state = simulation.hot_states.get(StateSource(num_tokens=len(client.full_history), chain=chain))
    assert state is not None
    assert tokens_of(state) == client.full_history
    assert runner.loaded == [tuned]
    assert simulation.kept(client.full_history) is None  # that is the name of what begins from the zero state


@pytest.mark.parametrize(
    "ref", [InitialStateRef("tuned", "00fe"), InitialStateRef("other", "00ff")], ids=["content", "name"]
)
def test_an_initial_state_that_is_not_here_is_refused(ref: InitialStateRef) -> None:
    """Another content under the name, or another name, is never replaced by anything."""
    simulation = Simulation(vocabulary=BYTES, initial_states={TUNED: state_of([], TUNED_ROOT)})
    for number, history in enumerate(([], [5])):
        client = simulation.submit(request_of(str(number), PROMPT, source=tuned_source(history, ref)), history)
        assert client.failed is not None
        assert client.failed.code == "initial_state_unavailable"
    simulation.check_at_rest()

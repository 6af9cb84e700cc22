"""Decode by recorded steps, with the recording left out: on a card it is CUDA's, here a step just runs again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from msgspec import structs

from engine.messages import SamplingParams
from engine.models.load import load_model
from engine.models.rwkv7 import RWKV7
from engine.runner.cuda_graphs import DecodeGraphs, DecodeRow, buckets_for, mixed_sizes_for
from engine.runner.model_runner import TorchModelRunner
from engine.runner.plan import Chunk, ChunkOutput, StepPlan
from engine.state.pool import StatePool
from engine.weights.synthetic import SyntheticShape, save_synthetic
from tests.engine.runner.host_graphs import CPU, HostGraphRunner, RunAgain, host_step
from tests.poisoned_memory import poisoned_memory

__all__ = ["poisoned_memory"]

V = 100


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> RWKV7:
    """A small random model."""
    shape = SyntheticShape(num_layers=2, width=32, head_size=8, vocab_size=V)
    path: Path = save_synthetic(tmp_path_factory.mktemp("model") / "m.pth", shape, seed=8, dtype=torch.float32)
    return load_model(path, CPU, "float32")


def params(i: int) -> SamplingParams:
    """Sampling that is each slot's own."""
    return SamplingParams(seed=i, temperature=(0.0, 1.0, 0.7)[i % 3], top_p=0.9, top_k=20, min_p=0.01)


def expected_tokens(model: RWKV7, slot: int, first: int, num_steps: int, first_position: int = 0) -> list[int]:
    """What the runner generates for a sequence by itself."""
    runner = TorchModelRunner(model, 8)
    runner.start(slot)
    token_id, generated = first, []
    for n in range(num_steps):
        plan = StepPlan([Chunk(slot, [token_id], sampling=params(slot), position=first_position + n)])
        sampled = runner.step(plan).chunks[0].token_id
        assert sampled is not None
        token_id = sampled
        generated.append(token_id)
    return generated


@pytest.mark.parametrize("is_read_late", [False, True], ids=["each step read", "read one step behind"])
def test_tokens_are_those_of_plain_steps(model: RWKV7, is_read_late: bool) -> None:
    """Rows that change places, batches that grow and shrink; ids from the host, or left on the device."""
    pool = StatePool(model.config.state_spec, 8, CPU)
    graphs = DecodeGraphs(host_step(model, pool), 5, CPU, RunAgain())
    order = [[1, 2, 3, 4, 5], [3, 1, 5], [5, 3, 1], [3]]
    launches, rows_before, last_ids = [], {}, {slot: slot for slot in range(1, 6)}
    for n, slots in enumerate(order):
        rows = [
            DecodeRow(slot, params(slot), n, source=rows_before[slot])
            if is_read_late and rows_before
            else DecodeRow(slot, params(slot), n, token_id=last_ids[slot])
            for slot in slots
        ]
        launches.append(graphs.launch(rows))
        rows_before = {slot: i for i, slot in enumerate(slots)}
        if not is_read_late:
            last_ids |= dict(zip(slots, launches[-1].token_ids(), strict=True))
    seen: dict[int, list[int]] = {slot: [] for slot in range(1, 6)}
    for slots, launch in zip(order, launches, strict=True):
        for slot, token_id in zip(slots, launch.token_ids(), strict=True):
            seen[slot].append(token_id)
    for slot, tokens in seen.items():
        assert tokens == expected_tokens(model, slot, slot, len(tokens))


def test_recording_and_padding_touch_no_state(model: RWKV7) -> None:
    """Only the slots of rows change."""
    pool = StatePool(model.config.state_spec, 8, CPU)
    pool.wkv.normal_()
    before = pool.wkv.clone()
    graphs = DecodeGraphs(host_step(model, pool), 7, CPU, RunAgain())
    assert torch.equal(pool.wkv[:7], before[:7])
    graphs.launch([DecodeRow(slot, params(slot), 0) for slot in (2, 4, 5)]).token_ids()
    changed = [slot for slot in range(7) if not torch.equal(pool.wkv[slot], before[slot])]
    assert changed == [2, 4, 5]


def test_what_an_earlier_larger_batch_left_is_not_read(model: RWKV7) -> None:
    """Stale rows of the table are padding again when a smaller batch follows in the same bucket."""
    pool = StatePool(model.config.state_spec, 8, CPU)
    graphs = DecodeGraphs(host_step(model, pool), 4, CPU, RunAgain())
    graphs.launch([DecodeRow(slot, params(slot), 0) for slot in (1, 2, 3, 4)]).token_ids()
    before = pool.wkv.clone()
    graphs.launch([DecodeRow(slot, params(slot), 1) for slot in (1, 2, 3)]).token_ids()
    assert torch.equal(pool.wkv[4], before[4])


def test_every_bucket_is_recorded_once(model: RWKV7) -> None:
    """Buffers are reused: no launch records."""
    recorder = RunAgain()
    pool = StatePool(model.config.state_spec, 8, CPU)
    graphs = DecodeGraphs(host_step(model, pool), 6, CPU, recorder)
    for num_rows in (1, 2, 5, 6):
        graphs.launch([DecodeRow(slot, params(slot), 0) for slot in range(num_rows)])
    assert recorder.num_recorded == len(graphs.buckets) == 4


def test_the_runner_replays_what_it_can_and_runs_the_rest(model: RWKV7) -> None:
    """The same outputs and states as without graphs, for prompts, decodes, and decodes that need more than a graph."""
    runners = TorchModelRunner(model, 9), HostGraphRunner(model, 9)
    outputs = []
    for runner in runners:
        for slot in range(4):
            runner.start(slot)
        plans = [
            StepPlan([Chunk(0, [1, 2, 3], sampling=params(0), position=3), Chunk(1, [4])]),
            StepPlan([Chunk(slot, [slot + 5], sampling=params(slot), position=4) for slot in range(4)]),
            StepPlan([Chunk(0, [7], sampling=params(0), position=5), Chunk(1, [V], sampling=params(1), position=5)]),
            StepPlan([Chunk(2, [8], sampling=structs.replace(params(1), num_logprobs=2), position=6)]),
        ]
        outputs.append([runner.step(plan).chunks for plan in plans])
    assert outputs[0] == outputs[1]
    assert torch.equal(runners[0].pool.wkv[:4], runners[1].pool.wkv[:4])


def test_a_broken_row_fails_alone_in_a_graph(model: RWKV7) -> None:
    """A state that is not finite is reported, its neighbour decodes on."""
    runner = HostGraphRunner(model, 9)
    for slot in range(2):
        runner.start(slot)
    runner.pool.wkv[1].fill_(torch.nan)
    plan = StepPlan([Chunk(slot, [5], sampling=params(slot), position=1) for slot in range(2)])
    sound, broken = runner.step(plan).chunks
    assert sound.token_id == expected_tokens(model, 0, 5, 1, first_position=1)[0]
    assert broken.failed == "the row became NaN or infinite"


@pytest.mark.parametrize(
    "changes",
    [
        {"logit_bias": {1: 1.0}},
        {"num_logprobs": 0},
        {"presence_penalty": 0.1},
        {"frequency_penalty": 0.1},
        {"repetition_penalty": 1.1},
        {"top_n_sigma": 1.0},
        {"typical_p": 0.9},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_sampling_that_a_graph_does_not_know_is_no_plain_decode(changes: dict[str, object]) -> None:
    """Such steps run as they do everywhere."""
    assert Chunk(0, [1], sampling=params(1)).is_plain
    assert not Chunk(0, [1], sampling=structs.replace(params(1), **changes)).is_plain


def test_chunks_that_ask_for_more_than_a_token_are_not_plain() -> None:
    """Prompts are, but not what is asked about them, nor ids that may not come yet."""
    assert Chunk(0, [1, 2], sampling=params(1)).is_plain
    assert not Chunk(0, [1, 2], num_prompt_logprobs=0, target_ids=[2, None]).is_plain
    assert not Chunk(0, [1], sampling=params(1), stop_token_ids=(3,), may_stop=False).is_plain


@pytest.mark.parametrize(("max_rows", "most"), [(1, 1), (3, 4), (64, 64), (65, 96), (5000, 1024)])
def test_buckets_hold_as_many_rows_as_may_come(max_rows: int, most: int) -> None:
    """Up to the ladder's end."""
    assert buckets_for(max_rows)[-1] == most


def test_the_smallest_size_that_fits_is_taken(model: RWKV7) -> None:
    """As many tokens as rows is a step that decodes; others have a row to spare, and rows of several tokens are few."""
    pool = StatePool(model.config.state_spec, 8, CPU)
    graphs = DecodeGraphs(host_step(model, pool), 20, CPU, RunAgain(), max_tokens=130)
    sizes = [graphs.size_of(n, n) for n in (1, 2, 3, 9, 24)]
    assert sizes == [(1, 1), (2, 2), (4, 4), (12, 12), (24, 24)]
    assert graphs.size_of(25, 25) is graphs.size_of(0, 0) is None
    mixed = [(2, 1), (128, 15), (128, 16), (129, 1), (256, 31)]
    assert [graphs.size_of(*each) for each in mixed] == [(128, 16), (128, 16), (128, 32), (256, 16), (256, 32)]
    assert graphs.size_of(257, 1) is graphs.size_of(40, 32) is None
    assert [graphs.size_of(40, 9, num_long) for num_long in (3, 4, 7, 8)] == [(128, 16), (256, 16), (256, 16), None]
    with pytest.raises(ValueError, match="no graph has 25 tokens of 25 rows"):
        graphs.launch([DecodeRow(slot, params(slot), 0) for slot in range(25)])


@pytest.mark.parametrize("max_rows", [1, 15, 16, 127, 384, 1024])
@pytest.mark.parametrize("max_tokens", [2, 512, 2048])
def test_mixed_sizes_hold_what_may_come(max_rows: int, max_tokens: int) -> None:
    """Never as many rows as tokens, which would be taken for a step that decodes."""
    sizes = mixed_sizes_for(max_rows, max_tokens)
    assert any(size.num_tokens >= max_tokens and size.num_rows > max_rows for size in sizes)
    assert all(size.num_tokens > size.num_rows for size in sizes)
    assert sizes == sorted(set(sizes))


# -- steps that follow one that nobody has read -----------------------------------------------------------------------


def rows_from(slots: list[int], **fields: object) -> list[DecodeRow]:
    """Return a row for each slot, its first token the slot's number."""
    return [DecodeRow(slot, params(slot), 0, token_id=slot, **fields) for slot in slots]  # type: ignore[arg-type]


def test_steps_that_follow_are_those_of_plain_steps(model: RWKV7) -> None:
    """Rows that leave and rows that change places keep their sampling, and their numbers go on."""
    graphs = DecodeGraphs(host_step(model, StatePool(model.config.state_spec, 8, CPU)), 5, CPU, RunAgain())
    seen: dict[int, list[int]] = {slot: [] for slot in range(1, 6)}
    slots = [1, 2, 3, 4, 5]
    launches = [(slots, graphs.launch(rows_from(slots)))]
    for going in ([0, 1, 2, 3, 4], [4, 2, 0], [0, 1, 2], [1]):
        slots = [slots[row] for row in going]
        launches.append((slots, graphs.follow(going)))
        read_slots, launch = launches[-2]
        for slot, token_id in zip(read_slots, launch.token_ids(), strict=True):
            seen[slot].append(token_id)
    for slot, tokens in seen.items():
        assert tokens == expected_tokens(model, slot, slot, len(tokens))
        assert len(tokens) >= 2


def test_a_row_that_sampled_a_stop_id_goes_no_further(model: RWKV7) -> None:
    """Its state is that of the step before, bit for bit, in every later step; its neighbour's goes on."""
    pool = StatePool(model.config.state_spec, 8, CPU)
    graphs = DecodeGraphs(host_step(model, pool), 2, CPU, RunAgain())
    (stop_id,) = expected_tokens(model, 1, 1, 1)
    stops = tuple(sorted({stop_id, 90, 91, 92, 93, 94, 95, 96}))
    (neighbour,) = rows_from([2])
    first = graphs.launch([DecodeRow(1, params(1), 0, token_id=1, stop_token_ids=stops), neighbour])
    before = pool.save(1, 0, b"")
    launches = [first, *(graphs.follow([0, 1]) for _ in range(3))]
    tokens = [launch.token_ids() for launch in launches[2:]]
    assert [row[0] for row in tokens] == [-1, -1]
    assert [row[1] for row in tokens] == expected_tokens(model, 2, 2, 4)[2:]
    assert all(torch.equal(before.tensors[name], pool.save(1, 0, b"").tensors[name]) for name in before.tensors)


def test_an_id_that_stops_one_row_stops_no_other(model: RWKV7) -> None:
    """And what a row stops at is not what its first token came from: only what was sampled is looked at."""
    graphs = DecodeGraphs(host_step(model, StatePool(model.config.state_spec, 8, CPU)), 2, CPU, RunAgain())
    (first_of_two,) = expected_tokens(model, 2, 2, 1)
    graphs.launch(
        [
            DecodeRow(1, params(1), 0, token_id=1, stop_token_ids=(1, first_of_two)),
            DecodeRow(2, params(2), 0, token_id=2),
        ]
    )
    assert graphs.follow([0, 1]).token_ids() == [expected_tokens(model, slot, slot, 2)[1] for slot in (1, 2)]


def test_a_slot_can_be_given_away_while_a_row_of_its_last_owner_is_in_flight(model: RWKV7) -> None:
    """Device order protects the new owner, whether the old row goes on or not."""
    for stop_token_ids in ((), tuple(expected_tokens(model, 1, 1, 1))):
        runner = HostGraphRunner(model, 9)
        runner.start(1)
        last = Chunk(1, [1], sampling=params(1), stop_token_ids=stop_token_ids)
        launches = [runner.launch(StepPlan([last])), runner.follow([0])]
        runner.start(1)
        owner = runner.launch(StepPlan([Chunk(1, [7], sampling=params(1), position=3)]))
        for launch in launches:
            launch.output()
        (output,) = owner.output().chunks
        assert [output.token_id] == expected_tokens(model, 1, 7, 1, first_position=3)


def test_a_row_that_breaks_goes_no_further(model: RWKV7) -> None:
    """Both steps report it, and its neighbour goes on."""
    runner = HostGraphRunner(model, 9)
    for slot in range(2):
        runner.start(slot)
    runner.pool.wkv[1].fill_(torch.nan)
    first = runner.launch(StepPlan([Chunk(slot, [5], sampling=params(slot), position=1) for slot in range(2)]))
    second = runner.follow([0, 1])
    for launch in (first, second):
        sound, broken = launch.output().chunks
        assert broken.failed == "the row became NaN or infinite"
        assert sound.token_id is not None
    assert second.output().chunks[0].token_id == expected_tokens(model, 0, 5, 2, first_position=1)[1]


def test_a_row_with_more_stop_ids_than_fit_is_not_followed(model: RWKV7) -> None:
    """It is read, like a step that no graph was recorded for."""
    runner = HostGraphRunner(model, 9)
    runner.start(0)

    def can_be_followed(**fields: object) -> bool:
        chunk = Chunk(0, [5], sampling=params(0), **fields)  # type: ignore[arg-type]
        launch = runner.launch(StepPlan([chunk]))
        launch.output()
        return launch.can_be_followed

    assert can_be_followed(stop_token_ids=tuple(range(8)))
    assert not can_be_followed(stop_token_ids=tuple(range(9)))
    assert not can_be_followed(stop_token_ids=(1,), may_stop=False)
    with pytest.raises(ValueError, match="cannot go on"):
        runner.follow([0])


def test_a_row_that_samples_nothing_settles_in_a_graph(model: RWKV7) -> None:
    """Its state consumes the token, its output has none, and it is not followed."""
    graph_runner, plain = HostGraphRunner(model, 9), TorchModelRunner(model, 9)
    for runner in (graph_runner, plain):
        runner.start(0)
        runner.start(1)
        plan = StepPlan([Chunk(0, [5]), Chunk(1, [6], sampling=params(1), position=1)])
        settled, decoded = runner.launch(plan).output().chunks
        assert settled == ChunkOutput()
        assert decoded.token_id is not None
    assert torch.equal(graph_runner.save(0, 1, b"").tensors["wkv"], plain.save(0, 1, b"").tensors["wkv"])
    with pytest.raises(ValueError, match="cannot go on"):
        graph_runner.follow([0])
    graph_runner.follow([1])


# -- steps of prompts beside decodes ----------------------------------------------------------------------------------


def chunks_of(lengths: dict[int, int], seed: int) -> list[Chunk]:
    """Return chunks of so many tokens for each slot, with sampling of its own; of slot 5 nothing is sampled."""
    random = torch.Generator().manual_seed(seed)
    return [
        Chunk(
            slot,
            torch.randint(V, (length,), generator=random).tolist(),
            sampling=params(slot) if slot != 5 else None,
            position=length,
        )
        for slot, length in lengths.items()
    ]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("longest", [9, 97, 98, 300], ids=["padding", "one token of padding", "none", "a larger size"])
def test_mixed_steps_and_those_that_follow_them_are_plain_steps(model: RWKV7, longest: int) -> None:
    """Outputs and all states: prompts and decodes, decodes of both with new prompts beside them, then decodes alone."""
    ahead, plain = HostGraphRunner(model, 9), TorchModelRunner(model, 9)
    first, joining = chunks_of({0: 1, 3: longest, 1: 1, 2: 20, 5: 8}, seed=1), chunks_of({4: 30, 6: 1}, seed=2)
    for runner in (ahead, plain):
        for slot in range(8):
            runner.start(slot)
    launches = [ahead.launch(StepPlan(first))]
    assert launches[0].can_be_followed
    launches.append(ahead.follow([3, 0, 1], joining))
    outputs = [launches[0].output().chunks]
    launches.append(ahead.follow([4, 1, 0, 2]))
    outputs += [launch.output().chunks for launch in launches[1:]]

    expected, chunks = [plain.step(StepPlan(first)).chunks], list(first)
    for rows, new in (([3, 0, 1], joining), ([4, 1, 0, 2], [])):
        going = []
        for row in rows:
            token_id = expected[-1][row].token_id
            assert token_id is not None
            going.append(structs.replace(chunks[row], token_ids=[token_id], position=chunks[row].position + 1))
        chunks = [*going, *new]
        expected.append(plain.step(StepPlan(chunks)).chunks)
    assert outputs == expected
    assert torch.equal(ahead.pool.wkv[:8], plain.pool.wkv[:8])
    assert torch.equal(ahead.pool.shift[:8], plain.pool.shift[:8])


def test_a_row_that_sampled_a_stop_id_goes_no_further_in_a_mixed_step(model: RWKV7) -> None:
    """Be it a prompt's: its state is that at the prompt's end, and a prompt that joined is none the worse."""
    runner = HostGraphRunner(model, 9)
    for slot in (1, 2):
        runner.start(slot)
    prompt, joining = [3, 1, 4, 1, 5], chunks_of({2: 7}, seed=3)
    plain = TorchModelRunner(model, 9)
    for slot in (1, 2):
        plain.start(slot)
    (stopped,) = plain.step(StepPlan([Chunk(1, prompt, sampling=params(1))])).chunks
    assert stopped.token_id is not None
    launch = runner.launch(StepPlan([Chunk(1, prompt, sampling=params(1), stop_token_ids=(stopped.token_id,))]))
    after = runner.follow([0], joining)
    assert launch.output().chunks == [stopped]
    assert after.output().chunks[1:] == plain.step(StepPlan(joining)).chunks
    assert torch.equal(runner.pool.wkv[:3], plain.pool.wkv[:3])


def test_a_prompt_that_is_not_at_its_end_does_not_go_on(model: RWKV7) -> None:
    """It has no token to go on with; who was beside it has, and prompts that ask for more than a token do not join."""
    runner = HostGraphRunner(model, 9)
    for slot in range(9):
        runner.start(slot)
    runner.launch(StepPlan(chunks_of({5: 3, 1: 2}, seed=1)))
    assert not runner.can_follow([0], [])
    assert runner.can_follow([1], [])
    assert runner.can_follow([1], chunks_of({2: 3}, seed=2))
    assert not runner.can_follow([1], [Chunk(2, [1, 2], num_prompt_logprobs=0, target_ids=[2, None])])
    assert not runner.can_follow([1], [Chunk(2, [1, V])])
    assert not runner.can_follow([1], [Chunk(2, [1] * 3000)])


def test_recording_and_padding_of_mixed_steps_touch_no_state(model: RWKV7) -> None:
    """Only the slots of rows change."""
    runner = HostGraphRunner(model, 9)
    runner.pool.wkv.normal_()
    before = runner.pool.wkv.clone()
    runner._record(4, 512)
    assert torch.equal(runner.pool.wkv[:8], before[:8])
    runner.launch(StepPlan(chunks_of({2: 1, 6: 3}, seed=1))).output()
    assert [slot for slot in range(8) if not torch.equal(runner.pool.wkv[slot], before[slot])] == [2, 6]

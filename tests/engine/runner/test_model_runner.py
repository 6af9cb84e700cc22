"""The runner: what a step does to slots, and what it reports."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.config import EngineConfig
from engine.messages import SamplingParams
from engine.models.load import load_model
from engine.models.rwkv7 import RWKV7
from engine.runner import model_runner
from engine.runner.model_runner import TorchModelRunner, load_runner
from engine.runner.plan import Chunk, ChunkOutput, ModelRunner, StepPlan
from engine.weights.synthetic import SyntheticShape, save_synthetic
from tests.implementations import IMPLEMENTATIONS, running_on

V = 100
GREEDY = SamplingParams(seed=0, temperature=0)


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model."""
    shape = SyntheticShape(num_layers=2, width=32, head_size=8, vocab_size=V)
    return save_synthetic(tmp_path_factory.mktemp("model") / "m.pth", shape, seed=8, dtype=torch.float32)


@pytest.fixture(scope="module")
def model(model_file: Path) -> RWKV7:
    """That model, loaded."""
    return load_model(model_file, torch.device("cpu"), "float32")


@pytest.fixture
def runner(model: RWKV7) -> TorchModelRunner:
    """A runner with six slots to use, all started."""
    runner = TorchModelRunner(model, 7)
    for slot in range(6):
        runner.start(slot)
    return runner


def step(runner: TorchModelRunner, *chunks: Chunk) -> list[ChunkOutput]:
    """Run one step."""
    return list(runner.step(StepPlan(chunks)).chunks)


def generate(runner: TorchModelRunner, slot: int, prompt: list[int], num: int, params: SamplingParams) -> list[int]:
    """Consume `prompt` and generate, one step a token."""
    ids, generated = prompt, []
    for n in range(num):
        (output,) = step(runner, Chunk(slot, ids, sampling=params, position=len(prompt) + n))
        assert output.token_id is not None
        generated.append(output.token_id)
        ids = [output.token_id]
    return generated


def test_it_is_a_model_runner(runner: TorchModelRunner) -> None:
    """It fits the protocol the scheduler is written against."""
    protocol: ModelRunner = runner
    assert (protocol.num_slots, protocol.vocab_size) == (7, V)
    assert protocol.spec == runner.model.config.state_spec


def test_a_chunk_without_sampling_brings_nothing(runner: TorchModelRunner) -> None:
    """The middle of a prompt only moves the state."""
    assert step(runner, Chunk(0, [1, 2, 3])) == [ChunkOutput()]


def test_outputs_come_in_the_plans_order(runner: TorchModelRunner) -> None:
    """Whoever samples, reports or fails, each chunk's output stands at its place."""
    alone = [step(runner, Chunk(slot, [slot + 1], sampling=GREEDY))[0] for slot in (0, 1)]
    runner.start(0)
    runner.start(1)
    together = step(
        runner,
        Chunk(2, [50]),
        Chunk(1, [2], sampling=GREEDY),
        Chunk(3, [V]),
        Chunk(0, [1], sampling=GREEDY),
        Chunk(4, [1, 2], num_prompt_logprobs=0, target_ids=[2, None]),
    )
    assert [together[1], together[3]] == [alone[1], alone[0]]
    assert together[0] == ChunkOutput()
    assert together[2].failed is not None
    assert [row is None for row in together[4].prompt_logprobs or []] == [False, True]


def test_the_last_prompt_token_is_consumed_once(runner: TorchModelRunner) -> None:
    """Sampling leaves the state of exactly the prompt: its last token is not fed again to get logits."""
    prompt = [5, 6, 7]
    step(runner, Chunk(0, prompt, sampling=GREEDY))
    step(runner, Chunk(1, prompt))
    sampled, silent = runner.save(0, 3, b""), runner.save(1, 3, b"")
    for name, tensor in sampled.tensors.items():
        assert torch.equal(tensor, silent.tensors[name])


def test_a_sampled_token_is_not_consumed_by_itself(runner: TorchModelRunner) -> None:
    """The state moves by what chunks feed and by nothing else: what becomes of a sampled token is decided elsewhere."""
    (output,) = step(runner, Chunk(0, [5], sampling=GREEDY))
    assert output.token_id is not None
    before = runner.save(0, 1, b"")
    step(runner, Chunk(0, [output.token_id]))
    assert not torch.equal(before.tensors["wkv"], runner.save(0, 2, b"").tensors["wkv"])


def test_a_started_slot_has_forgotten_its_last_owner(runner: TorchModelRunner) -> None:
    """State and penalty counters of whoever had the slot before are gone."""
    params = SamplingParams(seed=3, repetition_penalty=1.5, presence_penalty=1.0, frequency_penalty=0.5)
    first = generate(runner, 0, [1, 2, 3], 12, params)
    runner.start(0)
    assert generate(runner, 0, [1, 2, 3], 12, params) == first


def test_a_loaded_slot_has_forgotten_its_last_owner(runner: TorchModelRunner) -> None:
    """As for a started one."""
    params = SamplingParams(seed=3, temperature=0, repetition_penalty=5.0, presence_penalty=3.0)
    step(runner, Chunk(0, [9, 8]))
    state = runner.save(0, 2, b"")
    runner.load(1, state)
    first = generate(runner, 1, [1], 10, params)
    runner.load(1, state)
    assert generate(runner, 1, [1], 10, params) == first


def test_replayed_tokens_are_not_penalised(runner: TorchModelRunner) -> None:
    """A conversation whose state was recomputed draws the same tokens as one whose state was at hand."""
    history, prompt = [10, 11, 12, 13], [1, 2]
    params = SamplingParams(seed=1, temperature=0, repetition_penalty=50.0)
    step(runner, Chunk(0, history))
    runner.load(1, runner.save(0, 4, b""))
    step(runner, Chunk(2, history[:3], num_replayed=3))
    (hot,) = step(runner, Chunk(1, prompt, sampling=params))
    (replayed,) = step(runner, Chunk(2, [*history[3:], *prompt], sampling=params, num_replayed=1))
    assert hot.token_id == replayed.token_id
    assert runner._penalties._consumed[1].tokens == runner._penalties._consumed[2].tokens == prompt


def test_repetition_looks_at_the_prompt_in_whatever_chunks_it_came(runner: TorchModelRunner) -> None:
    """A strong penalty keeps every consumed token away, from first chunk to last sampled token."""
    (plain,) = step(runner, Chunk(0, [1, 2, 3, 4], sampling=GREEDY))
    assert plain.token_id is not None
    favourites = [plain.token_id, 2, 3, 4]
    params = SamplingParams(seed=1, temperature=0, repetition_penalty=1e9, logit_bias=dict.fromkeys(favourites, 50.0))
    step(runner, Chunk(1, favourites[:3]))
    generated = generate(runner, 1, favourites[3:], 6, params)
    assert not set(generated) & set(favourites)
    assert len(set(generated)) == len(generated)


def test_sampling_is_keyed_by_seed_and_position(runner: TorchModelRunner) -> None:
    """The same position of the same history draws the same token in any slot and company; other seeds draw others."""
    params = SamplingParams(seed=11)
    first = generate(runner, 0, [1, 2, 3], 20, params)
    chunks = [Chunk(slot, [1, 2, 3], sampling=params, position=3) for slot in (2, 3)]
    assert {output.token_id for output in step(runner, *chunks)} == {first[0]}
    runner.start(4)
    assert generate(runner, 4, [1, 2, 3], 20, SamplingParams(seed=12)) != first


def test_forbidden_ids_are_never_sampled(model: RWKV7) -> None:
    """Ids without bytes do not come out, not even greedily with a bias for them."""
    runner = TorchModelRunner(model, 2, forbidden_ids=range(1, V))
    assert generate(runner, 0, [1, 2], 5, SamplingParams(seed=1, logit_bias={5: 100.0})) == [0] * 5


def test_reported_logprobs_are_of_the_raw_logits(runner: TorchModelRunner) -> None:
    """Bias, penalties, temperature and truncation change what is drawn and nothing that is reported."""
    plain = SamplingParams(seed=1, temperature=0, num_logprobs=V)
    shaped = SamplingParams(
        seed=1, temperature=0.3, top_k=3, repetition_penalty=3.0, presence_penalty=1, logit_bias={4: 9}, num_logprobs=V
    )
    outputs = step(runner, Chunk(0, [3, 4], sampling=plain), Chunk(1, [3, 4], sampling=shaped))
    one, other = (output.logprobs for output in outputs)
    assert one is not None
    assert other is not None
    assert (one.top_ids, one.top_logprobs) == (other.top_ids, other.top_logprobs)
    assert other.logprob == one.top_logprobs[one.top_ids.index(outputs[1].token_id or 0)]


def test_prompt_logprobs_agree_with_stepping_through_the_prompt(
    runner: TorchModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reduced in small tiles, several chunks at once, each target has the value a step-by-step run reports."""
    monkeypatch.setattr(model_runner, "LOGITS_TILE_BYTES", 3 * 4 * V)
    prompt, params = [5, 9, 2, 7, 7, 1, 3], SamplingParams(seed=0, temperature=0, num_logprobs=V)
    targets = [*prompt[1:], None]
    first, second = step(
        runner,
        Chunk(0, prompt, num_prompt_logprobs=V, target_ids=targets),
        Chunk(1, prompt[:4], num_prompt_logprobs=2, target_ids=prompt[1:5]),
    )
    assert first.prompt_logprobs is not None
    assert second.prompt_logprobs is not None
    assert first.prompt_logprobs[-1] is None
    assert len(second.prompt_logprobs) == 4
    for i, target in enumerate(prompt[1:]):
        (output,) = step(runner, Chunk(2, [prompt[i]], sampling=params))
        reported = first.prompt_logprobs[i]
        assert output.logprobs is not None
        assert reported is not None
        assert reported.logprob == reported.top_logprobs[reported.top_ids.index(target)]
        assert reported.top_logprobs == pytest.approx(output.logprobs.top_logprobs, abs=1e-5)


def test_no_tile_of_logits_is_larger_than_allowed(runner: TorchModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long prompt's logits never exist all at once."""
    monkeypatch.setattr(model_runner, "LOGITS_TILE_BYTES", 8 * 4 * V)
    seen: list[int] = []
    logits = runner.model.logits
    monkeypatch.setattr(runner.model, "logits", lambda hidden: seen.append(len(hidden)) or logits(hidden))
    step(runner, Chunk(0, [1] * 30, num_prompt_logprobs=1, target_ids=[2] * 30))
    assert seen == [8, 8, 8, 6]


def test_a_step_in_one_call_draws_what_its_parts_draw(runner: TorchModelRunner) -> None:
    """Rows that want nothing but a token take a way of their own, unless one beside them wants more."""
    plain = [
        Chunk(slot, [slot + 1, 7][: 1 + slot % 2], sampling=SamplingParams(seed=slot, **params), position=50 + slot)
        for slot, params in enumerate(
            [{"temperature": 0.0}, {"temperature": 0.7, "top_p": 0.9}, {"top_k": 5}, {"temperature": 2.0, "min_p": 0.1}]
        )
    ]
    more = Chunk(4, [3], sampling=SamplingParams(seed=4, num_logprobs=1))
    for _ in range(3):
        alone = step(runner, *plain)
        for chunk in plain:
            runner.copy(chunk.slot, 5)  # what it left
            runner.start(chunk.slot)
            assert step(runner, chunk) == [alone[chunk.slot]]
            assert torch.equal(runner.pool.wkv[5], runner.pool.wkv[chunk.slot])
            runner.start(chunk.slot)
        assert step(runner, *plain, more)[:-1] == alone
        for chunk in plain:
            runner.start(chunk.slot)


def test_no_step_in_one_call_draws_a_forbidden_id(model: RWKV7) -> None:
    """Not even if it is the most likely one."""
    chunk = Chunk(0, [1, 2], sampling=GREEDY)
    likeliest: list[int] = []
    for _ in range(3):
        runner = TorchModelRunner(model, 2, likeliest)
        (output,) = step(runner, chunk)
        assert output.token_id is not None
        assert output.token_id not in likeliest
        likeliest.append(output.token_id)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_poisoned_slot_fails_alone(runner: TorchModelRunner, poison: float) -> None:
    """NaN or infinity in one state fails that chunk, sampling or not, and the slot is good again after `start`."""
    expected = step(runner, Chunk(0, [1, 2], sampling=GREEDY))
    runner.start(0)
    runner.pool.wkv[1, 0, 0, 0, 0] = poison
    runner.pool.shift[2, 0, 0, 0] = poison
    outputs = step(runner, Chunk(1, [1, 2], sampling=GREEDY), Chunk(0, [1, 2], sampling=GREEDY), Chunk(2, [1, 2]))
    assert [output.failed is not None for output in outputs] == [True, False, True]
    assert outputs[1] == expected[0]
    runner.start(3)
    outputs = step(runner, Chunk(1, [1, 2], sampling=GREEDY), Chunk(3, [1, 2], sampling=GREEDY))
    assert [output.failed is not None for output in outputs] == [True, False]
    assert outputs[1] == expected[0]
    runner.start(1)
    assert step(runner, Chunk(1, [1, 2], sampling=GREEDY)) == expected


def test_logits_that_are_not_finite_fail_their_row_alone(
    runner: TorchModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head that overflows for one row fails that chunk; its neighbour draws what it draws alone."""
    not_plain = SamplingParams(seed=0, temperature=0, repetition_penalty=1.1)
    expected = step(runner, Chunk(3, [1, 2], sampling=GREEDY))
    logits = runner.model.logits

    def overflow(hidden: torch.Tensor) -> torch.Tensor:
        result = logits(hidden)
        result[0, 5] = torch.inf
        return result

    monkeypatch.setattr(runner.model, "logits", overflow)
    broken, sound = step(runner, Chunk(0, [3], sampling=not_plain), Chunk(1, [1, 2], sampling=GREEDY))
    assert broken.failed is not None
    assert sound == expected[0]
    assert step(runner, Chunk(2, [3], sampling=not_plain))[0].failed is not None


@pytest.mark.parametrize(
    "chunk",
    [
        Chunk(1, [1, V]),
        Chunk(1, [-1]),
        Chunk(1, [1], num_prompt_logprobs=1, target_ids=[V + 5]),
        Chunk(1, [1], sampling=SamplingParams(seed=0, logit_bias={V: 1.0})),
    ],
    ids=["too large", "negative", "target", "bias"],
)
def test_an_impossible_token_id_fails_its_chunk_alone(runner: TorchModelRunner, chunk: Chunk) -> None:
    """The chunk is not run, its slot not touched, and the others are served."""
    before = runner.save(1, 0, b"")
    failed, sound = step(runner, chunk, Chunk(0, [1], sampling=GREEDY))
    assert failed.failed is not None
    assert f"[0, {V})" in failed.failed
    assert sound.token_id is not None
    assert torch.equal(before.tensors["wkv"], runner.save(1, 0, b"").tensors["wkv"])


@pytest.mark.parametrize(
    "plan",
    [[Chunk(0, [1]), Chunk(0, [2])], [Chunk(6, [1])], [Chunk(-1, [1])], [Chunk(0, [])]],
    ids=["a slot twice", "the scratch slot", "no slot", "no tokens"],
)
def test_an_impossible_plan_is_a_fault_of_the_caller(runner: TorchModelRunner, plan: list[Chunk]) -> None:
    """Two chunks of one slot would mix two conversations: such a plan raises and runs nothing."""
    before = runner.save(0, 0, b"")
    with pytest.raises(ValueError, match=r"a step needs distinct slots|without tokens"):
        step(runner, *plan)
    assert torch.equal(before.tensors["wkv"], runner.save(0, 0, b"").tensors["wkv"])


def test_an_empty_plan_brings_an_empty_output(runner: TorchModelRunner) -> None:
    """Nothing to do is not an error."""
    assert step(runner) == []


def test_a_runner_is_made_from_the_engines_configuration(model_file: Path) -> None:
    """Two slots a sequence and one for padding; the caller names the ids without bytes once it knows the vocabulary."""
    config = EngineConfig(model_path=str(model_file), device="cpu", max_num_seqs=3, head_norm_eps=0.01)
    runner = load_runner(config, lambda model: range(model.config.vocab_size - 1))
    assert runner.num_slots == 7
    assert runner.model.config.head_norm_eps == 0.01
    assert generate(runner, 0, [1], 2, SamplingParams(seed=1)) == [V - 1] * 2


@pytest.mark.parametrize("name", ["bfloat16", "half"])
def test_a_state_dtype_that_no_operator_keeps_is_refused_by_name(name: str) -> None:
    """Before anything is loaded: there is no file here."""
    with pytest.raises(ValueError, match=f"state_dtype is '{name}', not one of float32, float16"):
        load_runner(EngineConfig(model_path="", device="cpu", state_dtype=name), lambda _: ())


def test_float16_states_are_half_as_large(model_file: Path) -> None:
    """The matrices, that is: what token shift remembers stays float32."""
    config = EngineConfig(model_path=str(model_file), device="cpu", state_dtype="float16")
    runner = load_runner(config, lambda _: ())
    assert (runner.pool.wkv.dtype, runner.pool.shift.dtype) == (torch.float16, torch.float32)
    assert runner.spec.num_bytes == 2 * (2 * 4 * 8 * 8) + 4 * (2 * 2 * 32)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_state_beyond_float16_fails_alone(model_file: Path, implementation: str) -> None:
    """What is too large becomes infinite, and is reported in the step in which it does; float32 has room for it."""
    with running_on(implementation):
        model = load_model(model_file, torch.device("cpu"), "float32")
        failed = {}
        for dtype in (torch.float32, torch.float16):
            runner = TorchModelRunner(model, 4, state_spec=model.config.state_spec_in(dtype))
            for slot in (0, 1, 2):
                runner.start(slot)
            runner.pool.wkv[1] = 65504.0  # half a unit in the last place more, and it is infinite
            loud, sound = step(runner, Chunk(1, [1, 2, 3], sampling=GREEDY), Chunk(0, [1, 2, 3], sampling=GREEDY))
            assert [sound] == step(runner, Chunk(2, [1, 2, 3], sampling=GREEDY))
            failed[dtype] = loud.failed is not None
            assert bool(runner.pool.wkv[1].isinf().any() or runner.pool.wkv[1].isnan().any()) == failed[dtype]
        assert failed == {torch.float32: False, torch.float16: True}

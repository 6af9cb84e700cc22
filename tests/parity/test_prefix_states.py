"""A run from a prefix state is the cold run, bit for bit: tokens, log-probabilities and the bytes of the state."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import torch

from engine.messages import (
    GenerationRequest,
    SamplingParams,
    StateSource,
    StopRules,
)
from engine.models.load import load_model
from engine.models.rwkv7 import RWKV7
from engine.runner.model_runner import TorchModelRunner
from engine.state.file_store import FileStore
from engine.state.memory_store import MemoryStore
from engine.state.redis_store import RedisStateStore
from engine.state.store import StateStore
from engine.token_chain import root_digest
from tests.parity.slots import prompt
from tests.parity.stepped_engine import VOCABULARY, Engine, Run
from tests.redis_server import RedisServer

PROMPT = prompt(53, seed=1)
BORDERS = [20, 33, 52]
SAMPLINGS = {
    "greedy": SamplingParams(seed=1, temperature=0, num_logprobs=131),
    "drawn": SamplingParams(seed=2, num_logprobs=131),
    "penalised": SamplingParams(
        seed=3,
        repetition_penalty=1.4,
        presence_penalty=0.5,
        frequency_penalty=0.5,
        penalty_decay=0.9,
        num_logprobs=131,
    ),
}


def request(
    name: str,
    sampling: SamplingParams,
    prompt_ids: Sequence[int] = PROMPT,
    borders: Sequence[int] = BORDERS,
    stop_strings: tuple[bytes, ...] = (),
) -> GenerationRequest:
    """Return a request without history whose state is kept."""
    return GenerationRequest(
        request_id=name,
        prompt_ids=list(prompt_ids),
        sampling=sampling,
        stop=StopRules(max_tokens=12, stop_strings=stop_strings),
        source=StateSource(num_tokens=0, chain=root_digest()),
        keep_state=True,
        borders=list(borders),
    )


def cold(model: RWKV7, wanted: GenerationRequest) -> Run:
    """Run a request alone, in an engine that has seen nothing, from the zero state."""
    with closing(Engine(model, MemoryStore(), budget=512)) as engine:
        plain = request("cold", wanted.sampling, wanted.prompt_ids, (), wanted.stop.stop_strings)
        return engine.run(plain)[0]


@pytest.mark.parametrize(
    ("num_shared", "sampling"), [(20, SAMPLINGS["penalised"]), (33, SAMPLINGS["greedy"]), (52, SAMPLINGS["drawn"])]
)
def test_a_run_from_a_prefix_state_equals_a_cold_run(model: RWKV7, num_shared: int, sampling: SamplingParams) -> None:
    """From whichever border, with another prompt behind it, penalties and random numbers included."""
    with closing(Engine(model, MemoryStore())) as engine:
        engine.run(request("first", SAMPLINGS["drawn"]))
        other = [*PROMPT[:num_shared], *prompt(9, seed=num_shared)]
        wanted = request("other", sampling, other, [num_shared, len(other) - 1])
        (run,) = engine.run(wanted)
    assert run.num_cached == num_shared
    assert run.outcome == cold(model, wanted).outcome


def test_choices_that_share_a_prefill_equal_cold_runs(model: RWKV7) -> None:
    """Four at once with their own seeds, penalties on two of them, and steps that cut the prompt anywhere."""
    samplings = [*SAMPLINGS.values(), SamplingParams(seed=9, repetition_penalty=0.7, num_logprobs=131)]
    wanted = [request(str(idx), sampling) for idx, sampling in enumerate(samplings)]
    with closing(Engine(model, MemoryStore(), budget=7)) as engine:
        runs = engine.run(*wanted)
    assert [run.num_cached for run in runs] == [0, 52, 52, 52]
    for run, each in zip(runs, wanted, strict=True):
        assert run.outcome == cold(model, each).outcome


def test_a_stop_string_after_a_prefix_state_leaves_the_cold_run_s_state(model: RWKV7) -> None:
    """What is rewound is rewound to the same tokens."""
    sampling = SAMPLINGS["drawn"]
    said = VOCABULARY.decode(cold(model, request("said", sampling)).token_ids)
    wanted = request("stopped", sampling, stop_strings=(said[5:8],))
    with closing(Engine(model, MemoryStore())) as engine:
        engine.run(request("first", sampling))
        (run,) = engine.run(wanted)
    assert run.num_cached == 52
    assert len(run.token_ids) < 12
    assert run.outcome == cold(model, wanted).outcome


def test_a_resent_history_goes_on_as_if_it_had_never_stopped(model: RWKV7) -> None:
    """The state after the answer is the state of the longer prompt."""
    with closing(Engine(model, MemoryStore())) as engine:
        (first,) = engine.run(request("first", SAMPLINGS["penalised"]))
        history = [*PROMPT, *first.token_ids]
        wanted = request(
            "second", SAMPLINGS["penalised"], [*history, 5, 6, 7], [20, 53, len(history), len(history) + 2]
        )
        (second,) = engine.run(wanted)
    assert second.num_cached == len(history)
    assert second.outcome == cold(model, wanted).outcome


def test_states_that_come_and_go_change_nothing(model: RWKV7) -> None:
    """Memory for four states: some prompts hit, some miss, all say what they must."""
    size = TorchModelRunner(model, 2).spec.num_bytes
    num_hits = 0
    with closing(Engine(model, MemoryStore(), hot_state_bytes=4 * size)) as engine:
        for number in range(10):
            ids = [*PROMPT[: 20 + number % 3], *prompt(6, seed=number % 4)]
            wanted = request(str(number), SAMPLINGS["penalised"], ids, [20 + number % 3, len(ids) - 1])
            (run,) = engine.run(wanted)
            assert run.outcome == cold(model, wanted).outcome
            num_hits += run.num_cached > 0
    assert 0 < num_hits < 10


@contextmanager
def opened(kind: str, directory: Path) -> Iterator[list[StateStore]]:
    """Open one store twice, as two engines would."""
    if kind == "file":
        yield [FileStore(directory), FileStore(directory)]
        return
    with RedisServer(directory) as redis:
        yield [RedisStateStore(redis.url), RedisStateStore(redis.url)]


@pytest.mark.parametrize("kind", ["file", "redis"])
def test_two_engines_share_one_store(synthetic_file: Path, tmp_path: Path, kind: str) -> None:
    """What one computed the other loads, verified, and goes on from bit for bit."""
    model = load_model(synthetic_file, torch.device("cpu"), "float32")
    wanted = request("other", SAMPLINGS["penalised"], [*PROMPT[:20], 1, 2, 3], [20, 22])
    with opened(kind, tmp_path) as (mine, yours):
        with closing(Engine(model, mine)) as one:
            one.run(request("first", SAMPLINGS["drawn"]))
            one.settle()
        with closing(Engine(model, yours)) as other:
            (run,) = other.run(wanted)
            assert other.prefixes.counters["rwkv_prefix_lookups_total:hit_store"] == 1
    assert run.num_cached == 20
    assert run.outcome == cold(model, wanted).outcome

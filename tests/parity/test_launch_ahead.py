"""Steps launched before the last one was read: every request has the tokens and the state that it has without."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import kernels
from engine.messages import GenerationRequest, SamplingParams, StateSource, StopRules
from engine.models.load import load_model
from engine.models.rwkv7 import RWKV7
from engine.runner.graph_runner import GraphModelRunner
from engine.runner.plan import Chunk, Launch, StepOutput, StepPlan
from engine.state.memory_store import MemoryStore
from engine.token_chain import root_digest
from engine.weights.synthetic import SyntheticShape, save_synthetic
from tests.engine.runner.host_graphs import HostGraphRunner
from tests.parity.slots import prompt
from tests.parity.stepped_engine import Engine, Run


class CountingRunner(HostGraphRunner):
    """Says how many steps were launched ahead, and who joined them."""

    num_followed = 0
    num_joined = 0  # chunks that did not go on from the step before

    def follow(self, rows: Sequence[int], chunks: Sequence[Chunk] = ()) -> Launch:
        """Count, and follow."""
        self.num_followed += 1
        self.num_joined += len(chunks)
        return super().follow(rows, chunks)


def requests() -> list[GenerationRequest]:
    """Return more than there are seats, of all lengths, that end in every way."""
    return [
        GenerationRequest(
            request_id=f"{n}",
            prompt_ids=prompt(1 + 5 * n % 17, seed=n),
            sampling=SamplingParams(seed=n, temperature=(1.0, 0.0)[n % 5 == 0], top_p=0.95, top_k=(0, 40)[n % 2]),
            # One token in twenty ends a sequence, or never one, or more than a row of a graph can know.
            stop=StopRules(
                max_tokens=(3, 12, 40, 25)[n % 4],
                stop_token_ids=((), tuple(prompt(7, seed=100 + n)), tuple(range(12)))[(1, 1, 0, 1, 2)[n % 5]],
            ),
            source=StateSource(num_tokens=0, chain=root_digest()),
            borders=[4] if 5 * n % 17 > 3 and n % 3 == 0 else [],  # where a state is left on the way
            keep_state=n % 3 != 0,
        )
        for n in range(20)
    ]


def run(engine: Engine) -> list[Run]:
    """Run all requests: so many at once that most must wait for a seat, and from time to time one alone."""
    everything = requests()
    try:
        return [
            ended for begin in (0, 10) for part in (slice(begin, begin + 9), slice(begin + 9, begin + 10))
            for ended in engine.run(*everything[part])
        ]  # fmt: skip
    finally:
        engine.close()


@pytest.mark.usefixtures("poisoned_memory")
def test_tokens_and_states_are_those_of_steps_read_one_by_one(model: RWKV7) -> None:
    """Bit for bit; the states of sequences that a stop token ended, too, though a step was on its way."""
    ahead = Engine(model, MemoryStore(), make_runner=CountingRunner)
    one_by_one = Engine(model, MemoryStore())
    runs, expected = run(ahead), run(one_by_one)
    assert [each.outcome for each in runs] == [each.outcome for each in expected]
    assert isinstance(ahead.runner, CountingRunner)
    assert ahead.runner.num_followed > 40
    assert ahead.runner.num_joined >= 8
    stopped = [r for r in runs if r.state and len(r.token_ids) < r.request.stop.max_tokens and r.token_ids]
    assert len(stopped) >= 3, "no state here was kept after a stop token"


class OneByOneRunner(GraphModelRunner):
    """Replays graphs, and lets nobody follow."""

    def launch(self, plan: StepPlan) -> Launch:
        """Launch, and wait."""
        output = super().launch(plan).output()
        return Done(output)


@dataclass
class Done:
    """A step that is over."""

    result: StepOutput
    can_be_followed: bool = False

    def output(self) -> StepOutput:
        """Return what it brought."""
        return self.result


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a card")
def test_a_card_gives_the_same_ahead_and_one_by_one(tmp_path: Path) -> None:
    """Real graphs, real streams; states are saved beside the steps."""
    device = torch.device("cuda", torch.cuda.current_device())
    assert kernels.select_backend(device) != kernels.PYTORCH
    shape = SyntheticShape(num_layers=3, width=256, head_size=64, vocab_size=131)
    path = save_synthetic(tmp_path / "m.pth", shape, seed=5, dtype=torch.bfloat16)
    model = load_model(path, device, "bfloat16")
    ahead, one_by_one = (
        run(Engine(model, MemoryStore(), budget=128, make_runner=make_runner))  # cuts no prompt: its bits would differ
        for make_runner in (GraphModelRunner, OneByOneRunner)
    )
    assert [each.outcome for each in ahead] == [each.outcome for each in one_by_one]

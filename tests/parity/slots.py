"""Running token lists through a runner, cut and batched in any way, and comparing what comes of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.messages import SamplingParams
from engine.models.rwkv7 import RWKV7
from engine.runner.model_runner import TorchModelRunner
from engine.runner.plan import Chunk, ChunkOutput, StepPlan
from engine.state.spec import RecurrentState

NUM_SLOTS = 10


def new_runner(model: RWKV7, state_dtype: torch.dtype = torch.float32) -> TorchModelRunner:
    """Return a runner whose every slot holds rubbish: a slot is only good after `start` or `load`."""
    runner = TorchModelRunner(model, NUM_SLOTS, state_spec=model.config.state_spec_in(state_dtype))
    runner.pool.wkv.fill_(7.0)
    runner.pool.shift.fill_(-3.0)
    return runner


def prompt(length: int, seed: int, vocab_size: int = 131) -> list[int]:
    """Return tokens that look random and are always the same."""
    random = torch.Generator().manual_seed(seed)
    ids: list[int] = torch.randint(vocab_size, (length,), generator=random).tolist()
    return ids


def everything(model: RWKV7) -> SamplingParams:
    """Return parameters that report the whole distribution, so that comparing outputs compares logits."""
    return SamplingParams(seed=1, temperature=0, num_logprobs=model.config.vocab_size)


def consume(runner: TorchModelRunner, slot: int, token_ids: Sequence[int], lengths: Sequence[int]) -> ChunkOutput:
    """Feed `token_ids` in chunks of `lengths`; returns what the last chunk brought, its whole distribution included."""
    assert sum(lengths) == len(token_ids)
    begin, output = 0, ChunkOutput()
    for length in lengths:
        chunk = Chunk(slot, token_ids[begin : begin + length], sampling=everything(runner.model))
        (output,) = runner.step(StepPlan([chunk])).chunks
        begin += length
    return output


def assert_same_state(one: RecurrentState, other: RecurrentState) -> None:
    """Compare bit for bit."""
    assert one.tensors.keys() == other.tensors.keys()
    for name, tensor in one.tensors.items():
        assert torch.isfinite(tensor).all(), f"{name} is not finite"
        assert torch.equal(tensor, other.tensors[name]), f"{name} differs"


def state_of(runner: TorchModelRunner, slot: int) -> RecurrentState:
    """Return a slot's state under a name that means nothing."""
    return runner.save(slot, 0, b"")

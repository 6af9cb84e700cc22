"""Equal on purpose: what a slot computes depends on its tokens alone.

All comparisons here are bitwise, for float32 and bfloat16 on the CPU. The compiled operators promise it without
exception. PyTorch's keep it where oneDNN packs weights, whose products' rows do not depend on how many there are
(`kernels.eager.pack_linear`); without it, in float16 and on CUDA they are only equal within rounding.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.messages import CheckpointRef
from engine.models.rwkv7 import RWKV7
from engine.runner.plan import Chunk, StepPlan
from engine.state.checkpoint import decode_state, encode_state
from kernels import eager
from tests.parity.slots import assert_same_state, consume, everything, new_runner, prompt, state_of

pytestmark = pytest.mark.usefixtures("poisoned_memory", "_row_stable")


@pytest.fixture
def _row_stable(implementation: str) -> None:
    """Skip what nobody promises."""
    if implementation == "pytorch" and not eager._onednn_packs(torch.float32):
        pytest.skip("PyTorch here lacks oneDNN's row-stable products")


@pytest.fixture(params=[torch.float32, torch.float16], ids=["float32 states", "float16 states"])
def state_dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """What a pool keeps its matrices in: rounded after every token, so that cuts leave no trace either."""
    dtype: torch.dtype = request.param
    return dtype


LENGTHS = [37, 1, 5, 64, 2, 1, 18]


def test_a_batch_equals_single_runs(model: RWKV7, state_dtype: torch.dtype) -> None:
    """Sequences of mixed lengths give the same distributions and states together as alone."""
    prompts = [prompt(length, seed=length) for length in LENGTHS]
    together, alone = new_runner(model, state_dtype), new_runner(model, state_dtype)
    slots = [5, 0, 3, 8, 1, 7, 2]
    for slot in slots:
        together.start(slot)
    chunks = [Chunk(slot, ids, sampling=everything(model)) for slot, ids in zip(slots, prompts, strict=True)]
    outputs = together.step(StepPlan(chunks)).chunks
    for slot, ids, output in zip(slots, prompts, outputs, strict=True):
        alone.start(4)
        assert consume(alone, 4, ids, [len(ids)]) == output
        assert_same_state(state_of(alone, 4), state_of(together, slot))


def test_batched_decoding_equals_single_decoding(model: RWKV7, state_dtype: torch.dtype) -> None:
    """One-token steps of eight conversations at once, the everyday case, mix nothing between them."""
    prompts = [prompt(9, seed=100 + n) for n in range(8)]
    together, alone = new_runner(model, state_dtype), new_runner(model, state_dtype)
    for slot in range(8):
        together.start(slot)
    outputs = []
    for t in range(9):
        chunks = [Chunk(slot, [prompts[slot][t]], sampling=everything(model)) for slot in range(8)]
        outputs = together.step(StepPlan(chunks)).chunks
    for slot in range(8):
        alone.start(0)
        assert consume(alone, 0, prompts[slot], [9]) == outputs[slot]
        assert_same_state(state_of(alone, 0), state_of(together, slot))


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.sets(st.integers(1, 39)))
def test_any_chunking_equals_the_whole(model: RWKV7, state_dtype: torch.dtype, cuts: set[int]) -> None:
    """However a prompt is cut, down to single tokens, the last distribution and the state are the same."""
    token_ids = prompt(40, seed=11)
    borders = [0, *sorted(cuts), 40]
    runner = new_runner(model, state_dtype)
    runner.start(0)
    runner.start(1)
    whole = consume(runner, 0, token_ids, [40])
    cut = consume(runner, 1, token_ids, [end - begin for begin, end in pairwise(borders)])
    assert whole == cut
    assert_same_state(state_of(runner, 0), state_of(runner, 1))


def test_saved_and_restored_equals_uninterrupted(model: RWKV7, state_dtype: torch.dtype) -> None:
    """A state that went through checkpoint bytes into another slot of another runner goes on as if nothing happened."""
    token_ids = prompt(90, seed=12)
    runner, other = new_runner(model, state_dtype), new_runner(model, state_dtype)
    runner.start(2)
    consume(runner, 2, token_ids[:50], [50])
    blob = encode_state(runner.save(2, 50, b"c" * 16), runner.spec)
    ref = CheckpointRef(checkpoint_id="id", num_tokens=50, chain=b"c" * 16)
    other.load(6, decode_state(bytes(blob), other.spec, ref))
    assert consume(runner, 2, token_ids[50:], [40]) == consume(other, 6, token_ids[50:], [1] * 40)
    assert_same_state(state_of(runner, 2), state_of(other, 6))


def test_a_fork_leaves_its_origin_alone(model: RWKV7, state_dtype: torch.dtype) -> None:
    """After a copy, what one slot consumes does not touch the other, and both equal runs without the fork."""
    trunk, left, right = prompt(20, seed=13), prompt(7, seed=14), prompt(9, seed=15)
    runner = new_runner(model, state_dtype)
    runner.start(0)
    consume(runner, 0, trunk, [20])
    before = state_of(runner, 0)
    runner.copy(0, 1)
    forked = consume(runner, 1, right, [9])
    assert_same_state(before, state_of(runner, 0))
    went_on = consume(runner, 0, left, [7])
    for slot, token_ids, output in ((2, trunk + left, went_on), (3, trunk + right, forked)):
        runner.start(slot)
        assert consume(runner, slot, token_ids, [len(token_ids)]) == output


def test_idle_slots_keep_their_bytes(model: RWKV7, state_dtype: torch.dtype) -> None:
    """A step changes the slots it names and no other."""
    runner = new_runner(model, state_dtype)
    for slot in (3, 4, 5):
        runner.start(slot)
        consume(runner, slot, prompt(6, seed=slot), [6])
    before = [state_of(runner, slot) for slot in (3, 5)]
    consume(runner, 4, prompt(30, seed=9), [30])
    for slot, state in zip((3, 5), before, strict=True):
        assert_same_state(state, state_of(runner, slot))


def test_a_broken_neighbour_changes_nothing(model: RWKV7, state_dtype: torch.dtype) -> None:
    """A row that is NaN fails alone: the others' distributions and states are those of a step without it."""
    token_ids = prompt(15, seed=21)
    runner = new_runner(model, state_dtype)
    for slot in (0, 1, 2):
        runner.start(slot)
    runner.pool.wkv[1].fill_(torch.nan)
    params = everything(model)
    chunks = [Chunk(0, token_ids, params), Chunk(1, token_ids, params)]
    sound, broken = runner.step(StepPlan(chunks)).chunks
    assert broken.failed is not None
    assert broken.token_id is None
    assert sound == consume(runner, 2, token_ids, [15])
    assert_same_state(state_of(runner, 0), state_of(runner, 2))


def test_the_second_token_depends_on_the_first(model: RWKV7, state_dtype: torch.dtype) -> None:
    """Information flows between tokens, so equality of chunkings is not the equality of forgetting everything."""
    runner = new_runner(model, state_dtype)
    outputs = []
    for slot, first in enumerate((17, 18)):
        runner.start(slot)
        outputs.append(consume(runner, slot, [first, 40, 41], [1, 2]))
    assert outputs[0] != outputs[1]

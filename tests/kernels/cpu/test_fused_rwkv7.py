"""A model in one or two calls: the same numbers as one operator after the other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

import kernels
from kernels import Linear, LowRank, cpu
from kernels.rwkv7 import (
    ChannelMixing,
    Layer,
    Norm,
    OperatorByOperator,
    Rwkv7,
    TimeMixing,
    Weights,
    runnable,
)
from tests.implementations import running_on

L, H, N, S = 3, 3, 16, 6
C, F, V = H * N, 101, 77
BROKEN = V - 1  # the id of a token whose embedding is NaN
LENGTHS, SLOTS = [5, 1, 9], [4, 0, 2]


def bfloat16(weight: torch.Tensor) -> torch.Tensor:
    """Return what is left of `weight` in bfloat16."""
    return weight.bfloat16().float()


class Model:
    """Random weights, states and tokens: the same numbers for any dtype of the weights."""

    def __init__(self, dtype: torch.dtype, int8: bool = False) -> None:
        random = torch.Generator().manual_seed(5)

        def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
            return torch.randn(*shape, generator=random) * scale

        def linear(out: int, inner: int) -> Linear:
            return Linear(bfloat16(normal(out, inner, scale=inner**-0.5)).to(dtype), int8)

        def low_rank(rank: int, dtype: torch.dtype, **activations: str) -> LowRank:
            down, up = normal(rank, C, scale=C**-0.5), normal(C, rank, scale=rank**-0.5)
            return LowRank(bfloat16(down).to(dtype), bfloat16(up).to(dtype), normal(C), dtype, **activations)  # type: ignore[arg-type]

        def norm(eps: float) -> Norm:
            return Norm(normal(C, scale=0.1) + 1, normal(C, scale=0.1), eps)

        def time_mixing(layer: int) -> TimeMixing:
            return TimeMixing(
                norm(1e-5),
                torch.rand(6, C, generator=random),
                *(linear(C, C) for _ in range(4)),
                low_rank(8 + layer, torch.float32, activation="tanh"),
                low_rank(7 + layer, dtype, output_activation="sigmoid"),
                low_rank(9, dtype, activation="sigmoid"),
                low_rank(5, dtype, output_activation="sigmoid") if layer else None,
                normal(C, scale=0.1) + 0.7,
                normal(C, scale=0.1) + 1,
                normal(H, N, scale=0.1),
                norm(1e-3),
            )

        def channel_mixing() -> ChannelMixing:
            return ChannelMixing(norm(1e-5), torch.rand(1, C, generator=random), linear(F, C), linear(C, F))

        embedding = bfloat16(normal(V, C)).to(dtype)
        embedding[BROKEN] = torch.nan
        layers = [Layer(time_mixing(i), channel_mixing()) for i in range(L)]
        self.weights = Weights(embedding, norm(1e-5), layers, norm(1e-5), linear(V, C))
        fused = cpu.fuse_rwkv7(self.weights)
        assert fused is not None
        self.ways: dict[str, Rwkv7] = {"fused": fused, "single": OperatorByOperator(self.weights, dtype)}
        self.poison = fused._operators.team.poison
        self.pool = normal(S, L * (H * N * N + 2 * C), scale=0.3)
        self.token_ids = torch.randint(BROKEN, (sum(LENGTHS),), generator=random)

    def run(
        self, way: str, pool: torch.Tensor, token_ids: torch.Tensor | None = None, slots: list[int] = SLOTS
    ) -> torch.Tensor:
        """Advance `pool`, and return hidden rows and logits of all tokens side by side."""
        rwkv7, rows = self.ways[way], torch.arange(sum(LENGTHS))
        self.poison()
        hidden = rwkv7.forward(
            self.token_ids if token_ids is None else token_ids,
            pool[:, : L * H * N * N].view(S, L, H, N, N),
            pool[:, L * H * N * N :].view(S, L, 2, C),
            torch.tensor(slots),
            torch.tensor([0, *LENGTHS]).cumsum(0),
            rows,
        )
        self.poison()
        return torch.cat([hidden, rwkv7.logits(hidden)], dim=1)

    def step(self, pool: torch.Tensor, forbidden_ids: list[int], rules: torch.Tensor) -> torch.Tensor:
        """Advance `pool`, and return what is drawn after each sequence."""
        self.poison()
        return self.ways["fused"].step(
            self.token_ids,
            pool[:, : L * H * N * N].view(S, L, H, N, N),
            pool[:, L * H * N * N :].view(S, L, 2, C),
            torch.tensor(SLOTS),
            torch.tensor([0, *LENGTHS]).cumsum(0),
            torch.tensor(forbidden_ids, dtype=torch.int64),
            rules,
        )


@pytest.fixture(autouse=True)
def _compiled() -> Iterator[None]:
    """Nothing to test where nothing can be compiled."""
    with running_on("compiled"):
        yield


def test_in_float32_fused_equals_single_operators() -> None:
    """Fusing changes where numbers lie, not what they are; slots that are not named keep their bytes."""
    model = Model(torch.float32)
    fused_pool, single_pool = model.pool.clone(), model.pool.clone()
    torch.testing.assert_close(model.run("fused", fused_pool), model.run("single", single_pool), rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(fused_pool, single_pool, rtol=1e-5, atol=2e-5)
    untouched = [slot for slot in range(S) if slot not in SLOTS]
    assert torch.equal(fused_pool[untouched], model.pool[untouched])
    assert not torch.equal(fused_pool[SLOTS], model.pool[SLOTS])


def test_in_bfloat16_fusing_rounds_less() -> None:
    """Against the same weights in float32, bfloat16's rounding of activations shows, and fusing saves some of it."""
    exact, rounded = Model(torch.float32), Model(torch.bfloat16)
    expected = exact.run("fused", exact.pool.clone())
    fused, single = (rounded.run(way, rounded.pool.clone()) - expected for way in ("fused", "single"))
    assert 0 < fused.norm() < single.norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_weights_move_results_by_their_own_rounding(dtype: torch.dtype) -> None:
    """About one part in a hundred, fused or not."""
    exact, rounded = Model(torch.float32), Model(dtype, int8=True)
    expected = exact.run("fused", exact.pool.clone())
    for way in ("fused", "single"):
        difference = rounded.run(way, rounded.pool.clone()) - expected
        assert 1e-3 * expected.norm() < difference.norm() < 3e-2 * expected.norm()


@pytest.mark.parametrize("int8", [False, True], ids=["", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_broken_sequence_stays_alone(dtype: torch.dtype, int8: bool) -> None:
    """NaN in one sequence reaches its own rows and its own slot, and nothing else."""
    model = Model(dtype, int8)
    whole_pool, broken_pool, token_ids = model.pool.clone(), model.pool.clone(), model.token_ids.clone()
    whole = model.run("fused", whole_pool)
    token_ids[5] = BROKEN  # the second sequence's only token
    broken = model.run("fused", broken_pool, token_ids)
    others = [row for row in range(len(token_ids)) if row != 5]
    assert broken[5].isnan().all()
    assert torch.equal(broken[others], whole[others])
    assert torch.equal(broken_pool[[4, 2]], whole_pool[[4, 2]])


@pytest.mark.parametrize(("token_id", "slot"), [(V, 0), (-1, 0), (3, S), (3, -1)])
def test_an_index_out_of_range_changes_nothing(token_id: int, slot: int) -> None:
    """Neither memory before nor beyond the tables is touched, and the caller hears of it."""
    model = Model(torch.float32)
    pool, token_ids = model.pool.clone(), model.token_ids.clone()
    token_ids[7] = token_id
    with pytest.raises(IndexError):
        model.run("fused", pool, token_ids, [4, slot, 2])
    assert torch.equal(pool, model.pool)


@pytest.mark.parametrize("int8", [False, True], ids=["", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_step_draws_what_its_parts_draw(dtype: torch.dtype, int8: bool, temperature: float) -> None:
    """Bit for bit, states and tokens, without what is forbidden: here what would have been drawn before."""
    model = Model(dtype, int8)
    rules = torch.tensor([[temperature, 0, 0.9, 0.0, uniform] for uniform in (0.1, 0.5, 0.9)], dtype=torch.float64)
    expected_pool, forbidden_ids = model.pool.clone(), list[int]()
    last = torch.tensor(LENGTHS).cumsum(0) - 1
    logits = model.run("fused", expected_pool)[last, C:].contiguous()
    for _ in range(3):
        logits[:, forbidden_ids] = -torch.inf
        expected, pool = kernels.sample(logits, rules), model.pool.clone()
        assert torch.equal(model.step(pool, forbidden_ids, rules), expected)
        assert torch.equal(pool, expected_pool)
        forbidden_ids += [token_id for token_id in expected.tolist() if token_id not in forbidden_ids]


@pytest.mark.parametrize("forbidden_id", [V, -1])
def test_a_step_that_forbids_what_is_not_there_changes_nothing(forbidden_id: int) -> None:
    """The caller hears of it."""
    model = Model(torch.float32)
    pool = model.pool.clone()
    with pytest.raises(IndexError, match="forbidden id"):
        model.step(pool, [forbidden_id], torch.ones(len(SLOTS), 5, dtype=torch.float64))
    assert torch.equal(pool, model.pool)


def test_what_another_implementation_packed_is_not_fused() -> None:
    """A layer with foreign weights runs operator by operator."""
    weights = Model(torch.float32).weights
    with cpu.eager():
        foreign = Linear(torch.eye(C))
    first = weights.layers[0]
    layers = [replace(first, time_mixing=replace(first.time_mixing, output=foreign)), *weights.layers[1:]]
    assert isinstance(runnable(replace(weights, layers=layers), torch.float32), OperatorByOperator)
    assert not isinstance(runnable(weights, torch.float32), OperatorByOperator)


def test_logits_keep_their_bytes_while_they_or_a_view_of_them_are_held() -> None:
    """Their memory is used again once nobody holds it, and not before."""
    logits = Model(torch.float32).ways["fused"].logits
    hidden = torch.randn(3, 4, C)
    whole, row = logits(hidden[0]), logits(hidden[1])[2]
    kept_whole, kept_row = whole.clone(), row.clone()
    logits(hidden[2])
    assert whole.equal(kept_whole)
    assert row.equal(kept_row)
    last = logits(hidden[2])
    address = last.data_ptr()
    del last
    assert logits(hidden[1]).data_ptr() == address
    assert logits(hidden[1]).data_ptr() == address
    assert logits(hidden[0, :0]).shape == (0, V)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", [128, 120])
def test_logits_of_many_rows_are_those_of_few(dtype: torch.dtype, vocab_size: int) -> None:
    """Whether they go to memory past the caches or, where rows do not fill lines, through them."""
    random = torch.Generator().manual_seed(1)
    embedding, head = torch.randn(2, vocab_size, C, generator=random)
    weights = replace(Model(dtype).weights, embedding=embedding.to(dtype), head=Linear(head.to(dtype)))
    fused = cpu.fuse_rwkv7(weights)
    assert fused is not None
    hidden = torch.randn((2 << 20) // vocab_size + 1, C, generator=random)
    few = [fused.logits(rows).clone() for rows in hidden.split(2000)]
    assert fused.logits(hidden).equal(torch.cat(few))

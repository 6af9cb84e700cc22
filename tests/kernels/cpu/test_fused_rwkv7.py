"""All layers in one call: the same numbers as one operator after the other."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kernels import Linear, LowRank, cpu
from kernels.rwkv7 import ChannelMixing, Layer, Layers, Norm, TimeMixing
from tests.implementations import running_on

L, H, N, S = 3, 3, 16, 6
C, F = H * N, 101
LENGTHS, SLOTS = [5, 1, 9], [4, 0, 2]


def bfloat16(weight: torch.Tensor) -> torch.Tensor:
    """Return what is left of `weight` in bfloat16."""
    return weight.bfloat16().float()


class Model:
    """Random layers, states and tokens: the same numbers for any dtype of the weights."""

    def __init__(self, dtype: torch.dtype) -> None:
        random = torch.Generator().manual_seed(5)

        def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
            return torch.randn(*shape, generator=random) * scale

        def linear(out: int, inner: int) -> Linear:
            return Linear(bfloat16(normal(out, inner, scale=inner**-0.5)).to(dtype))

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

        self.layers = Layers([Layer(time_mixing(i), channel_mixing()) for i in range(L)], dtype)
        self.pool = normal(S, L * (H * N * N + 2 * C), scale=0.3)
        self.x = normal(sum(LENGTHS), C)

    def run(self, fused: bool, pool: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Advance `pool`, and return the residual stream that `x` becomes."""
        layers = self.layers
        advance = layers._fused
        assert advance is not None
        if not fused:
            layers._fused = None
        x = x.clone()
        wkv = pool[:, : L * H * N * N].view(S, L, H, N, N)
        shift = pool[:, L * H * N * N :].view(S, L, 2, C)
        advance._operators.team.poison()  # type: ignore[attr-defined]
        layers(x, wkv, shift, torch.tensor(SLOTS), torch.tensor([0, *LENGTHS]).cumsum(0))
        layers._fused = advance
        return x


@pytest.fixture
def _compiled() -> None:
    """Nothing to test where nothing can be compiled."""
    with running_on("compiled"):
        pass


@pytest.mark.usefixtures("_compiled")
def test_in_float32_fused_layers_have_the_bits_of_single_operators() -> None:
    """Fusing changes where numbers lie, not how they are computed."""
    model = Model(torch.float32)
    pools = [model.pool.clone() for _ in range(2)]
    fused, single = model.run(True, pools[0], model.x), model.run(False, pools[1], model.x)
    assert torch.equal(fused, single)
    assert torch.equal(*pools)
    untouched = [slot for slot in range(S) if slot not in SLOTS]
    assert torch.equal(pools[0][untouched], model.pool[untouched])
    assert not torch.equal(pools[0][SLOTS], model.pool[SLOTS])


@pytest.mark.usefixtures("_compiled")
def test_in_bfloat16_fused_layers_round_less_than_single_operators() -> None:
    """Against the same weights in float32, bfloat16's rounding of activations shows, and fusing saves some of it."""
    exact, rounded = Model(torch.float32), Model(torch.bfloat16)
    expected = exact.run(True, exact.pool.clone(), exact.x)
    fused, single = (rounded.run(fused, rounded.pool.clone(), rounded.x) - expected for fused in (True, False))
    assert 0 < fused.norm() < single.norm() < 0.02 * expected.norm()


@pytest.mark.usefixtures("_compiled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_broken_sequence_stays_alone(dtype: torch.dtype) -> None:
    """NaN in one sequence reaches its own rows and its own slot, and nothing else."""
    model = Model(dtype)
    whole_pool, broken_pool, x = model.pool.clone(), model.pool.clone(), model.x.clone()
    whole = model.run(True, whole_pool, x)
    x[5] = torch.nan  # the second sequence's only token
    broken = model.run(True, broken_pool, x)
    others = [row for row in range(len(x)) if row != 5]
    assert broken[5].isnan().all()
    assert torch.equal(broken[others], whole[others])
    assert torch.equal(broken_pool[[4, 2]], whole_pool[[4, 2]])


@pytest.mark.usefixtures("_compiled")
def test_what_another_implementation_packed_is_not_fused() -> None:
    """A layer with foreign weights runs operator by operator."""
    model = Model(torch.float32)
    first = model.layers._layers[0]
    with cpu.eager():
        foreign = Linear(torch.eye(C))
    layers = [Layer(replace(first.time_mixing, output=foreign), first.channel_mixing), *model.layers._layers[1:]]
    assert cpu.fuse_rwkv7(layers) is None
    assert cpu.fuse_rwkv7(model.layers._layers) is not None

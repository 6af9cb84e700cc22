"""The compiled operators: right against float64, and every bit independent of batch, cut and threads."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from kernels import reference
from kernels.cpu.library import Team
from kernels.cpu.operators import Operators

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture
def random() -> torch.Generator:
    """Numbers that are the same in every run."""
    return torch.Generator().manual_seed(11)


def with_threads(operators: Operators, num_threads: int) -> Operators:
    """Return the same operators on another team, whose scratch memory is full of NaN."""
    return Operators(Team(operators.team.library, num_threads))


def starts_of(lengths: list[int]) -> torch.Tensor:
    """Return the packed offsets of `lengths`."""
    return torch.tensor([0, *lengths]).cumsum(0)


def assert_exact_products(result: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
    """Fail unless `result` is the product of what was given, within float32's error of the sums."""
    expected = x.double() @ weight.double().T
    scale = x.double().abs() @ weight.double().abs().T
    assert ((result.double() - expected).abs() <= 1e-6 * scale).all()


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("out_features", "in_features"), [(64, 64), (200, 256), (53, 37), (1, 3), (80, 4001)])
def test_linear_is_exact_but_for_the_rounding_of_sums(
    operators: Operators, random: torch.Generator, dtype: torch.dtype, out_features: int, in_features: int
) -> None:
    """Products of what the weights' dtype holds, summed in float32, whatever the sizes; never of unwritten memory."""
    weight = torch.randn(out_features, in_features, generator=random).to(dtype)
    x = torch.randn(19, in_features, generator=random).to(dtype)
    packed = operators.pack_linear(weight)
    operators.team.poison()
    assert_exact_products(operators.linear(x.float(), packed, out_features), x, weight)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
def test_a_row_of_a_product_does_not_depend_on_the_others(
    operators: Operators, random: torch.Generator, dtype: torch.dtype
) -> None:
    """Any number of rows, any place among them, any number of threads: the same bits."""
    weight, x = torch.randn(150, 333, generator=random).to(dtype), torch.randn(230, 333, generator=random)
    packed = operators.pack_linear(weight)
    together = operators.linear(x, packed, 150)
    for num_rows in (1, 2, 3, 4, 5, 6, 7, 13, 64, 97):
        first = int(torch.randint(0, 230 - num_rows, (), generator=random))
        rows = slice(first, first + num_rows)
        assert torch.equal(operators.linear(x[rows], packed, 150), together[rows])
    for num_threads in (1, 3):
        assert torch.equal(with_threads(operators, num_threads).linear(x, packed, 150), together)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("out_features", "in_features"), [(64, 64), (200, 256), (53, 37), (1, 3), (80, 4001)])
def test_int8_weights_lose_their_own_rounding_and_16_bits_of_activations(
    operators: Operators, random: torch.Generator, dtype: torch.dtype, out_features: int, in_features: int
) -> None:
    """Products of the weights as 8-bit integers with a scale for each output, and of nearly exact activations."""
    weight = torch.randn(out_features, in_features, generator=random).to(dtype)
    x = torch.randn(19, in_features, generator=random) * torch.logspace(-3, 3, 19)[:, None]
    scale = weight.double().abs().amax(1, keepdim=True) / 127
    rounded = (weight.double() / scale).round() * scale
    packed = operators.pack_linear(weight, int8=True)
    assert packed.dtype == torch.int8
    operators.team.poison()
    result = operators.linear(x, packed, out_features)
    # Half a step of an activation's 16 bits, float32's rounding, and weights on the edge of two integers.
    step = x.double().abs().amax(1, keepdim=True) / 32639
    bound = 0.51 * step * rounded.abs().sum(1) + 1e-6 * x.double().abs() @ rounded.abs().T
    edge = ((weight.double() / scale).frac().abs() - 0.5).abs() < 1e-4
    bound += x.double().abs() @ (edge * scale).T
    assert ((result.double() - x.double() @ rounded.T).abs() <= bound).all()


@pytest.mark.parametrize("rows_dtype", [F32, BF16], ids=["float32", "bfloat16"])
def test_a_row_of_an_int8_product_does_not_depend_on_the_others(
    operators: Operators, random: torch.Generator, rows_dtype: torch.dtype
) -> None:
    """As for the other formats; and a broken row stays alone."""
    weight, x = torch.randn(150, 333, generator=random), torch.randn(130, 333, generator=random).to(rows_dtype)
    packed = operators.pack_linear(weight, int8=True)
    together = operators.linear(x, packed, 150)
    for num_rows in (1, 2, 3, 4, 5, 13, 97):
        assert torch.equal(operators.linear(x[7 : 7 + num_rows], packed, 150), together[7 : 7 + num_rows])
    for num_threads in (1, 3):
        assert torch.equal(with_threads(operators, num_threads).linear(x, packed, 150), together)
    x[3, 5], x[6, 332], x[8] = torch.nan, -torch.inf, 0
    broken = operators.linear(x, packed, 150)
    assert not broken[[3, 6]].isfinite().any()
    assert not broken[8].any()
    rest = [row for row in range(130) if row not in (3, 6, 8)]
    assert torch.equal(broken[rest], together[rest])


def test_linear_reads_rows_that_are_part_of_a_wider_tensor(operators: Operators, random: torch.Generator) -> None:
    """Neither what lies between two rows nor what follows the last is read."""
    wide = torch.full((9, 80), torch.nan)
    wide[:, 11:48] = torch.randn(9, 37, generator=random)
    packed = operators.pack_linear(torch.randn(20, 37, generator=random))
    assert torch.equal(
        operators.linear(wide[:, 11:48], packed, 20), operators.linear(wide[:, 11:48].contiguous(), packed, 20)
    )


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
def test_a_broken_row_stays_alone(operators: Operators, random: torch.Generator, dtype: torch.dtype) -> None:
    """NaN and infinity in one row of a product leave the others their bits, and do not vanish."""
    packed = operators.pack_linear(torch.randn(70, 90, generator=random).to(dtype))
    x = torch.randn(8, 90, generator=random)
    whole = operators.linear(x, packed, 70)
    x[3, 5], x[6, 89] = torch.nan, torch.inf
    broken = operators.linear(x, packed, 70)
    rest = [0, 1, 2, 4, 5, 7]
    assert torch.equal(broken[rest], whole[rest])
    assert not broken[3].isfinite().any()
    assert not broken[6].isfinite().any()


def low_rank_case(operators: Operators, random: torch.Generator, rank: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a low-rank operator of odd sizes, ready to be called."""
    down = operators.pack_linear(torch.randn(rank, 50, generator=random) * 0.2)
    up = operators.pack_linear(torch.randn(66, rank, generator=random))
    bias = torch.randn(66, generator=random)
    return lambda x: operators.low_rank(x, down, up, rank, bias, "tanh", "sigmoid", 66, F32)


@pytest.mark.parametrize("rank", [8, 13])
def test_low_rank_does_not_depend_on_the_batch(operators: Operators, random: torch.Generator, rank: int) -> None:
    """A row's result is bitwise the same alone and among others, also where the rank fills no vector."""
    low_rank, x = low_rank_case(operators, random, rank), torch.randn(40, 50, generator=random)
    operators.team.poison()
    together = low_rank(x)
    assert together.isfinite().all()
    assert torch.equal(torch.cat([low_rank(row[None]) for row in x]), together)


@pytest.mark.parametrize("rank", [8, 13])
def test_low_rank_in_bfloat16_never_reads_its_padding(operators: Operators, random: torch.Generator, rank: int) -> None:
    """The place after an odd rank holds no number of another call."""
    down = operators.pack_linear(torch.randn(rank, 50, generator=random).to(BF16))
    up = operators.pack_linear(torch.randn(66, rank, generator=random).to(BF16))
    x = torch.randn(5, 50, generator=random)
    results = []
    for _ in range(2):
        operators.team.poison()
        results.append(operators.low_rank(x, down, up, rank, None, "none", "none", 66, F32))
    assert results[0].isfinite().all()
    assert torch.equal(*results)


@pytest.mark.parametrize(("name", "exact"), [("sigmoid", torch.sigmoid), ("tanh", torch.tanh)], ids=["sigmoid", "tanh"])
def test_activations_are_within_a_few_units_in_the_last_place(
    operators: Operators, name: str, exact: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """Over the whole range, tails included, and a NaN stays a NaN."""
    x = torch.cat([torch.linspace(-20, 20, 4001), torch.logspace(-6, 1.9, 500), -torch.logspace(-6, 1.9, 500)])
    one = operators.pack_linear(torch.ones(1, 1))
    apply = lambda x: operators.low_rank(x[:, None], one, one, 1, None, "none", name, 1, F32)[:, 0]  # noqa: E731
    torch.testing.assert_close(apply(x).double(), exact(x.double()), rtol=4e-7, atol=1e-38)
    assert apply(torch.tensor([torch.nan])).isnan().all()
    ends = torch.tensor([torch.inf, -torch.inf])
    torch.testing.assert_close(apply(ends), exact(ends), rtol=0, atol=1e-38)


class WkvCase:
    """Random inputs of `wkv7` with realistic decays, for any head size."""

    def __init__(
        self,
        random: torch.Generator,
        num_heads: int,
        head_size: int,
        num_tokens: int,
        dtype: torch.dtype,
        kept_as: torch.dtype = F32,
    ):
        C = num_heads * head_size

        def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
            return torch.randn(*shape, generator=random) * scale

        self.rows = [
            *(normal(num_tokens, C).to(dtype) for _ in range(3)),
            normal(num_tokens, C, scale=2.0) - 3.0,
            torch.sigmoid(normal(num_tokens, C)).to(dtype),
            normal(num_tokens, C).to(dtype),
            normal(num_tokens, C).to(dtype),
            torch.sigmoid(normal(num_tokens, C)).to(dtype),
        ]
        self.parameters = [
            normal(C, scale=0.1) + 0.7,
            normal(C, scale=0.1) + 1.0,
            normal(num_heads, head_size, scale=0.1),
            normal(C, scale=0.1) + 1.0,
            normal(C, scale=0.1),
        ]
        state = normal(6, 2, num_heads, head_size, head_size).to(kept_as)
        self.state = state[:, 1]  # strided, as the pool hands it out

    def run(self, operators: Operators, slots: list[int], lengths: list[int], first: int = 0) -> torch.Tensor:
        """Run packed sequences that begin at token `first`; advances the state."""
        rows = [row[first : first + sum(lengths)] for row in self.rows]
        return operators.wkv7(*rows, *self.parameters, 1e-3, self.state, torch.tensor(slots), starts_of(lengths))


@pytest.mark.parametrize(("kept_as", "tolerance"), [(F32, 1e-5), (F16, 2e-2)], ids=["float32 state", "float16 state"])
@pytest.mark.parametrize(("num_heads", "head_size"), [(2, 64), (3, 8), (2, 32), (1, 100), (2, 27)])
def test_wkv7_equals_the_formulas(
    operators: Operators,
    random: torch.Generator,
    num_heads: int,
    head_size: int,
    kept_as: torch.dtype,
    tolerance: float,
) -> None:
    """Results and states of 40 tokens agree with float64, whether or not a head fills its vectors.

    A float16 state is rounded after every token, and not in the formulas: a step is 1e-3 of a number.
    """
    if head_size > operators.team.max_head_size:
        pytest.skip("left to PyTorch on this target")
    case = WkvCase(random, num_heads, head_size, 40, F32, kept_as)
    S, expected = case.state[3].double().clone(), []
    k_k, k_a, r_k, weight, bias = (p.double().view(num_heads, head_size) for p in case.parameters)
    for t in range(40):
        r, k, v, dw, a, gate, v_first, mix = (row[t].double().view(num_heads, head_size) for row in case.rows)
        v = v + (v_first - v) * mix
        kk, k = reference.unit_length(k * k_k), k * (1 + (a - 1) * k_a)
        w = torch.exp(-torch.exp(torch.tensor(-0.5, dtype=torch.float64)) * torch.sigmoid(dw))
        y = torch.stack([reference.wkv_head(S[h], r[h], w[h], k[h], v[h], kk[h], a[h]) for h in range(num_heads)])
        y = reference.group_norm(y, weight, bias, 1e-3) + (r * k * r_k).sum(1, keepdim=True) * v
        expected.append((y * gate).flatten())
    operators.team.poison()
    result = case.run(operators, [3], [40])
    torch.testing.assert_close(result.double(), torch.stack(expected), rtol=tolerance, atol=2 * tolerance)
    torch.testing.assert_close(case.state[3].double(), S, rtol=tolerance, atol=tolerance)


def test_a_float16_state_holds_every_number_it_can(operators: Operators, random: torch.Generator) -> None:
    """A token that changes nothing changes no bit of any finite number, subnormal ones included."""
    numbers = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(F16).view(16, 64, 64)
    case = WkvCase(random, 16, 64, 1, F32, F16)
    case.state[2] = before = torch.where(numbers.isfinite(), numbers, 0.0)
    for row, value in zip(case.rows, (0.0, 0.0, 0.0, -200.0, 0.0, 0.0, 0.0, 0.0), strict=True):
        row.fill_(value)
    case.run(operators, [2], [1])
    assert torch.equal(case.state[2] + 0.0, before + 0.0)  # -0 may become 0


def test_a_float16_state_takes_a_neighbour_the_nearer_one_more_often(
    operators: Operators, random: torch.Generator
) -> None:
    """As often as it is near; gradually to zero, infinite beyond the largest; and NaN stays NaN, whatever its bits."""
    H, N = 64, 64
    case = WkvCase(random, H, N, 1, F32, F16)
    _r, k, v, decay, a, _gate, _v_first, value_mix = case.rows
    for row, value in ((decay, -200.0), (a, 0.0), (value_mix, 0.0), (case.parameters[1], 0.0)):
        row.fill_(value)  # nothing decays, nothing is removed, keys are written as they are
    v[0, N:] *= 2.0 ** torch.randint(-30, 15, (N * (H - 1),), generator=random)
    v[0, :2] = torch.tensor([-1, 0x7FFFFFFF], dtype=torch.int32).view(F32)  # NaN with all bits set
    v[0, 2:4] = torch.tensor([2.0**30, -(2.0**40)])
    case.state[2] = 0.0
    case.run(operators, [2], [1])
    kept, exact = (x.flatten(0, 1) for x in (case.state[2].float(), v.view(H, N, 1) * k.view(H, 1, N)))
    assert kept[:2].isnan().all()
    assert torch.equal(kept[2:4], torch.inf * exact[2:4])
    kept, exact = kept[4:], exact[4:]
    is_normal = (exact.abs() > 2**-14) & (exact.abs() < 60_000)
    assert (kept - exact)[exact.abs() < 2**-14].abs().max() < 2**-24
    kept, bits = kept[is_normal], exact[is_normal].view(torch.int32)
    below, rest = bits & ~0x1FFF, (bits & 0x1FFF) / 0x2000
    is_above = kept == (below + 0x2000).view(F32)
    assert (is_above | (kept == below.view(F32))).all()
    for tenth in range(10):
        share = is_above[(rest * 10).int() == tenth].float().mean()
        assert abs(float(share) - (tenth + 0.5) / 10) < 0.03


def test_a_float16_state_decays_however_slowly(operators: Operators, random: torch.Generator) -> None:
    """By less than half a step a token: rounded to the nearest it would stay as it is."""
    case = WkvCase(random, 2, 64, 512, F32, F16)
    _r, _k, v, decay, a, _gate, v_first, _value_mix = case.rows
    for row, value in ((v, 0.0), (v_first, 0.0), (a, 1e-20)):
        row.fill_(value)
    decay.fill_(math.log(2**-12 / math.exp(-0.5)))  # of a sigmoid that is small: w is 1 - 2^-12
    case.state[2] = 1.5
    case.run(operators, [2], [512])
    assert float(case.state[2].float().mean()) == pytest.approx(1.5 * math.exp(-512 * 2**-12), rel=2e-3)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kept_as", [F32, F16], ids=["float32 state", "float16 state"])
@pytest.mark.parametrize("head_size", [64, 27])
def test_wkv7_does_not_depend_on_batch_cut_or_threads(
    operators: Operators, random: torch.Generator, dtype: torch.dtype, kept_as: torch.dtype, head_size: int
) -> None:
    """Sequences together, one by one, token by token, on one thread: results and states have the same bits."""
    lengths, slots = [37, 1, 18], [4, 0, 2]
    case = WkvCase(random, 3, head_size, sum(lengths), dtype, kept_as)
    before = case.state.clone()
    together = case.run(operators, slots, lengths)
    after = case.state.clone()
    starts = starts_of(lengths).tolist()

    case.state.copy_(before)
    one_thread = with_threads(operators, 1)
    assert torch.equal(
        torch.cat([case.run(one_thread, [s], [n], b) for s, n, b in zip(slots, lengths, starts[:-1], strict=True)]),
        together,
    )
    assert torch.equal(case.state, after)

    case.state.copy_(before)
    steps = [
        case.run(operators, [slot], [1], t)
        for slot, n, b in zip(slots, lengths, starts[:-1], strict=True)
        for t in range(b, b + n)
    ]
    assert torch.equal(torch.cat(steps), together)
    assert torch.equal(case.state, after)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
def test_shift_mix_does_not_depend_on_batch_cut_or_threads(
    operators: Operators, random: torch.Generator, dtype: torch.dtype
) -> None:
    """As for wkv7, with a width that fills no vector."""
    C, lengths, slots = 203, [37, 1, 18], [4, 0, 2]
    x, mix = torch.randn(sum(lengths), C, generator=random), torch.rand(6, C, generator=random)
    weight, bias = torch.randn(C, generator=random), torch.randn(C, generator=random)
    before = torch.randn(6, 2, C, generator=random)[:, 1]

    def run(
        operators: Operators, shift: torch.Tensor, slots: list[int], lengths: list[int], first: int
    ) -> torch.Tensor:
        operators.team.poison()
        rows = x[first : first + sum(lengths)]
        return operators.shift_mix(rows, weight, bias, 1e-5, shift, mix, torch.tensor(slots), starts_of(lengths), dtype)

    together_shift, alone_shift = before.clone(), before.clone()
    together = run(operators, together_shift, slots, lengths, 0)
    starts, one_thread = starts_of(lengths).tolist(), with_threads(operators, 1)
    alone = [
        run(one_thread, alone_shift, [slot], [1], t)
        for slot, length, start in zip(slots, lengths, starts[:-1], strict=True)
        for t in range(start, start + length)
    ]
    assert torch.equal(torch.cat(alone, dim=1), together)
    assert torch.equal(alone_shift, together_shift)


def test_float16_weights_are_left_to_pytorch(operators: Operators, random: torch.Generator) -> None:
    """A dtype the library does not know is packed and multiplied by the PyTorch operators."""
    weight, x = torch.randn(8, 16, generator=random).half(), torch.randn(3, 16, generator=random).half()
    result = operators.linear(x, operators.pack_linear(weight), 8)
    torch.testing.assert_close(result.float(), x.float() @ weight.float().T, rtol=1e-2, atol=1e-2)


def test_float16_rows_meet_weights_of_another_dtype(operators: Operators, random: torch.Generator) -> None:
    """Decays keep float32 weights in a float16 model: their rows are converted, their results as asked."""
    weight, x = torch.randn(8, 16, generator=random), torch.randn(3, 16, generator=random).half()
    packed, back = operators.pack_linear(weight), operators.pack_linear(weight.T.contiguous())
    product = operators.linear(x, packed, 8)
    assert product.dtype == torch.float16
    torch.testing.assert_close(product.float(), x.float() @ weight.T, rtol=1e-2, atol=1e-2)
    result = operators.low_rank(x, packed, back, 8, None, "none", "none", 16, torch.float16)
    assert result.dtype == torch.float16
    torch.testing.assert_close(result.float(), x.float() @ weight.T @ weight, rtol=1e-2, atol=5e-2)

"""Products in Triton: right, and for each row the same bits however many rows there are."""

from __future__ import annotations

import pytest
import torch

linear = pytest.importorskip("kernels.triton.linear", reason="Triton is not installed: pip install sostenuto[cuda]")
packed = pytest.importorskip("kernels.triton.packed", reason="Triton is not installed: pip install sostenuto[cuda]")
int8 = pytest.importorskip("kernels.triton.int8", reason="Triton is not installed: pip install sostenuto[cuda]")

NUM_ROWS = [1, 2, 15, 16, 17, 33, 64, 65, 128, 256, 257, 512, 513]
MANY = max(NUM_ROWS)  # so many that a program adds the spans


def matrix(random: torch.Generator, shape: tuple[int, int], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a matrix as the kernels take it, and what it means in float64."""
    outputs, K = shape
    weight = torch.randn(outputs, K, generator=random) / K**0.5
    if dtype == torch.int8:
        quantised, scales = int8.quantise(weight)
        return packed.pack_int8(weight), quantised.double() * scales.double()[:, None]
    return packed.pack(weight.to(dtype)), weight.to(dtype).double()


@pytest.mark.parametrize("shape", [(200, 512), (64, 96), (3, 48)], ids="{0[0]} x {0[1]}".format)
def test_packing_loses_nothing(random: torch.Generator, shape: tuple[int, int]) -> None:
    """Back and forth."""
    weight = torch.randn(shape, generator=random)
    assert torch.equal(packed.unpack(packed.pack(weight), shape[0]), weight)


DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int8]
SHAPES = [(dtype, shape) for dtype in DTYPES for shape in ((200, 512), (64, 192), (72, 1024))]
SHAPES += [(dtype, (64, 96)) for dtype in DTYPES if dtype != torch.int8]


@pytest.mark.parametrize(("dtype", "shape"), SHAPES, ids=str)
@pytest.mark.parametrize("num_rows", [3, 40, 300, 600])
def test_products_equal_float64(
    random: torch.Generator, device: torch.device, dtype: torch.dtype, shape: tuple[int, int], num_rows: int
) -> None:
    """With bias, whatever is left over at the edges, spans side by side or not."""
    weight, exact = matrix(random, shape, dtype)
    x = torch.randn(num_rows, shape[1], generator=random).to(torch.bfloat16 if dtype == torch.int8 else dtype)
    bias = torch.randn(shape[0], generator=random)
    result = linear.linear(x.to(device), weight.to(device), shape[0], bias.to(device), dtype=torch.float32)
    expected = x.double() @ exact.T + bias.double()
    torch.testing.assert_close(result.double().cpu(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("activation", "formula"),
    [
        ("none", lambda x: x),
        ("tanh", torch.tanh),
        ("sigmoid", torch.sigmoid),
        ("relu_squared", lambda x: x.relu().square()),
    ],
)
@pytest.mark.parametrize("inputs", [32, 1024], ids=["one span", "spans added"])
def test_activations(random: torch.Generator, device: torch.device, activation: str, formula, inputs: int) -> None:  # type: ignore[no-untyped-def]
    """Applied once, to the whole sum and its bias."""
    weight, exact = matrix(random, (48, inputs), torch.float32)
    x, bias = torch.randn(3, inputs, generator=random), torch.randn(48, generator=random)
    result = linear.linear(x.to(device), weight.to(device), 48, bias.to(device), activation)
    expected = formula(x.double() @ exact.T + bias.double())
    torch.testing.assert_close(result.double().cpu(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("ordered_products")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_is_the_same_in_every_batch(random: torch.Generator, device: torch.device, dtype: torch.dtype) -> None:
    """Bitwise, across all buckets, over the border where spans are no longer side by side, from any place in it."""
    weight, _ = matrix(random, (64, 512), dtype)
    assert packed.plan(64, 512, weight.element_size()).split > 1
    x = torch.randn(MANY, 512, generator=random).to(torch.float16).to(device)
    weight = weight.to(device)
    most = linear.linear(x, weight, 64, dtype=torch.float32)
    for num_rows in NUM_ROWS:
        assert torch.equal(linear.linear(x[:num_rows], weight, 64, dtype=torch.float32), most[:num_rows]), num_rows
    assert torch.equal(linear.linear(x[200:202], weight, 64, dtype=torch.float32), most[200:202])


@pytest.mark.usefixtures("ordered_products")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=str)
def test_spans_that_others_add_are_those_that_a_program_adds(
    random: torch.Generator, device: torch.device, dtype: torch.dtype
) -> None:
    """Bitwise, in their order: what the next kernel does with few rows' sums, and the program of many rows itself."""
    weight, exact = matrix(random, (64, 512), dtype)
    x = torch.randn(MANY, 512, generator=random).to(torch.bfloat16)
    (whole,) = linear.linear_sums(x.to(device), weight.to(device), 64)
    first, *others = linear.linear_sums(x[:5].to(device), weight.to(device), 64)
    assert others
    for sums in others:
        first += sums
    assert torch.equal(first, whole[:5])
    torch.testing.assert_close(whole.double().cpu(), x.double() @ exact.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("num_rows", [3, 70])
def test_wide_rows_are_rounded_to_what_they_are_multiplied_in(
    random: torch.Generator, device: torch.device, dtype: torch.dtype, num_rows: int
) -> None:
    """Beside int8 that is bfloat16. So many float32 rows have no room in a processor's shared memory as they are."""
    weight = matrix(random, (64, 128), dtype)[0].to(device)
    x = torch.randn(num_rows, 128, generator=random).to(device)
    result = linear.linear(x, weight, 64)
    assert torch.equal(result, linear.linear(x.to(torch.bfloat16), weight, 64, dtype=torch.float32))


def test_matrices_that_tiles_do_not_divide_are_refused() -> None:
    """A tile of int8 weights is at least four times what tensor cores take at once."""
    with pytest.raises(ValueError, match="in_features must be a multiple of 16, not 40"):
        packed.plan(64, 40, 2)
    with pytest.raises(ValueError, match="in_features must be a multiple of 64, not 96"):
        packed.plan(64, 96, 1)


@pytest.mark.parametrize("itemsize", [1, 2, 4])
def test_how_a_matrix_is_summed_is_no_matter_of_rows(itemsize: int) -> None:
    """Whatever the tile, it leaves the order of sums alone: only the plan says that, and it knows no rows."""
    plan = packed.plan(2048, 2048, itemsize)
    steps = set()
    for num_rows in NUM_ROWS:
        options = linear.tile(num_rows, itemsize, plan.split).options(num_rows, 2048 // plan.split, plan.tile_k)
        steps.add(options["BLOCK_K"])
        of_step = options["BLOCK_O"] * itemsize + options["BLOCK_T"] * max(itemsize, 2)
        assert options["BLOCK_K"] % plan.tile_k == 0
        assert options["num_stages"] * options["BLOCK_K"] * of_step <= 227 << 10
    assert itemsize != 1 or steps == {plan.tile_k}

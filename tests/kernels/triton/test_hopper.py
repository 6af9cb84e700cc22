"""Hopper's products are everyone's: the same bits, by other copies. They run on such a card alone, and nowhere else."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.triton import test_projections as cases

hopper = pytest.importorskip("kernels.triton.hopper", reason="Triton is not installed: pip install sostenuto[cuda]")
linear = pytest.importorskip("kernels.triton.linear", reason="Triton is not installed: pip install sostenuto[cuda]")
packed = pytest.importorskip("kernels.triton.packed", reason="Triton is not installed: pip install sostenuto[cuda]")

IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == hopper.CAPABILITY
NUM_ROWS = [1, 8, 9, 16, 17, 32, 33, 64, 65, 256, 257, 1000]
SHARED_BYTES = 227 << 10  # of a program

on_hopper = pytest.mark.skipif(not IS_HOPPER, reason="needs a Hopper card")


def test_only_what_it_can_do_is_hoppers() -> None:
    """Here there is no such card; there are kernels for all others."""
    rows, weight = torch.zeros(3, 256, dtype=torch.bfloat16), torch.zeros(64, 256, dtype=torch.bfloat16)
    assert not hopper.can_run(rows, packed.pack(weight), packed.plan(64, 256, 2))


@pytest.mark.parametrize("split", [1, 4])
def test_a_program_has_room_for_its_stages(split: int) -> None:
    """For any number of rows: at least two, or nothing would be under way while another is multiplied."""
    for num_rows in NUM_ROWS:
        tile = hopper.tile(num_rows, split)
        assert tile.block_t >= min(num_rows, 128)
        assert tile.stages >= 2
        assert tile.stages * tile.step * (tile.block_o + tile.block_t) * hopper.TILE_K * 2 < SHARED_BYTES
        for rank in (256, 512, hopper.MAX_RANK):
            raised = hopper.raise_tile(num_rows, rank)
            results = raised.block_o * raised.block_t * 2  # beside the operands: half of them at once, float32
            assert rank * (raised.block_o + raised.block_t) * 2 + results < SHARED_BYTES


@on_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("shape", "is_whole"), [((200, 512), True), ((2048, 2048), False), ((8192, 256), True)])
@pytest.mark.parametrize("num_rows", NUM_ROWS)
def test_products_are_those_of_other_cards(
    dtype: torch.dtype, shape: tuple[int, int], is_whole: bool, num_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bitwise: bias and activation, spans added by another launch and by the program."""
    random = torch.Generator("cuda").manual_seed(num_rows)
    outputs, inputs = shape
    weight = packed.pack(torch.randn(outputs, inputs, generator=random, device="cuda").to(dtype))
    x = torch.randn(num_rows, inputs, generator=random, device="cuda").to(dtype)
    bias = torch.randn(outputs, generator=random, device="cuda")
    assert hopper.can_run(x, weight, packed.plan(outputs, inputs, 2, is_whole))
    found = linear.linear(x, weight, outputs, bias, "tanh", is_whole=is_whole)
    sums = linear.linear_sums(x, weight, outputs)
    monkeypatch.setattr(hopper, "can_run", lambda *_: False)
    assert torch.equal(found, linear.linear(x, weight, outputs, bias, "tanh", is_whole=is_whole))
    assert torch.equal(sums, linear.linear_sums(x, weight, outputs))


@on_hopper
@pytest.mark.parametrize("num_rows", NUM_ROWS)
def test_projections_are_those_of_other_cards(
    random: torch.Generator, device: torch.device, num_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bitwise, low-rank ones too: what is lost by rounding a decay's hidden values is added as there."""
    monkeypatch.setattr(cases, "C", 256)  # pairs of tiles
    case = cases.ProjectionsCase(random, torch.bfloat16, "of bfloat16", device)
    mixes = torch.randn(6, num_rows, 256, generator=random).to(torch.bfloat16).to(device)
    assert hopper.can_run(mixes, case.packed[0], packed.plan(256, 256, 2))
    found = case.run(mixes)
    monkeypatch.setattr(hopper, "can_run", lambda *_: False)
    expected = case.run(mixes)
    assert torch.equal(found.rkv, expected.rkv)
    assert torch.equal(found.decay, expected.decay)
    assert torch.equal(found.others, expected.others)

"""What reads the mixes, in two launches: right beside int8 weights and others, and of the same bits in every batch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
import torch

linear = pytest.importorskip("kernels.triton.linear", reason="Triton is not installed: pip install sostenuto[cuda]")
packed = pytest.importorskip("kernels.triton.packed", reason="Triton is not installed: pip install sostenuto[cuda]")
int8 = pytest.importorskip("kernels.triton.int8", reason="Triton is not installed: pip install sostenuto[cuda]")
projections = pytest.importorskip(
    "kernels.triton.projections", reason="Triton is not installed: pip install sostenuto[cuda]"
)

if TYPE_CHECKING:
    from kernels.triton.projections import Projected

C = 192  # no multiple of a part; int8 tiles are narrower then
RANKS = (16, 32, 48, 16)  # of decay, rate, gate, value mix
KINDS = [(torch.float32, "of float32"), (torch.bfloat16, "of bfloat16"), (torch.bfloat16, "int8 beside bfloat16")]
NUM_ROWS = (1, 17, 33, 65)  # each has another tile


class ProjectionsCase:
    """Projections of random weights as the kernels run them, and in float64."""

    def __init__(self, random: torch.Generator, dtype: torch.dtype, kind: str, device: torch.device) -> None:
        def matrix(outputs: int, inputs: int) -> torch.Tensor:
            return (torch.randn(outputs, inputs, generator=random) / inputs**0.5).to(dtype)

        wide = [matrix(C, C) for _ in range(3)]
        self.wide = [weight.double() for weight in wide]
        pack = packed.pack
        if kind.startswith("int8"):
            pack = packed.pack_int8
            self.wide = [
                values.double() * scales.double()[:, None] for values, scales in (int8.quantise(w) for w in wide)
            ]
        self.down, self.up = [matrix(rank, C) for rank in RANKS], [matrix(C, rank) for rank in RANKS]
        self.biases = [torch.randn(C, generator=random) for _ in RANKS]
        self.packed = [pack(weight).to(device) for weight in wide]
        self.linears = [SimpleNamespace(packed=packed.clone(), in_features=C) for packed in self.packed]
        low_ranks = [
            SimpleNamespace(rank=rank, down=down.to(device), up=up.to(device), bias=bias.to(device))
            for rank, down, up, bias in zip(RANKS, self.down, self.up, self.biases, strict=True)
        ]
        low_ranks[2].bias = None
        self.run = projections.Projections(self.linears, low_ranks, dtype)

    def expected(self, mixes: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor, list[torch.Tensor]]:
        """Return receptance, key and value; the decay; rate, gate and value mix, in float64."""
        m_r, m_w, m_k, m_v, m_a, m_g = mixes.double()

        def low_rank(i: int, m: torch.Tensor, activation=lambda x: x) -> torch.Tensor:  # type: ignore[no-untyped-def]
            return activation(m @ self.down[i].double().T) @ self.up[i].double().T

        rkv = [m @ weight.T for m, weight in zip((m_r, m_k, m_v), self.wide, strict=True)]
        decay = low_rank(0, m_w, torch.tanh) + self.biases[0].double()
        rate = torch.sigmoid(low_rank(1, m_a) + self.biases[1].double())
        gate = low_rank(2, m_g, torch.sigmoid)
        return rkv, decay, [rate, gate, torch.sigmoid(low_rank(3, m_v) + self.biases[3].double())]


@pytest.mark.parametrize(("dtype", "kind"), KINDS, ids=[kind for _, kind in KINDS])
@pytest.mark.parametrize("num_rows", [3, 70])
def test_projections_equal_float64(
    random: torch.Generator, device: torch.device, dtype: torch.dtype, kind: str, num_rows: int
) -> None:
    """All seven of them. A decay is never rounded to 16 bits, whatever its weights."""
    case = ProjectionsCase(random, dtype, kind, device)
    mixes = torch.randn(6, num_rows, C, generator=random).to(dtype)
    found: Projected = case.run(mixes.to(device))
    rkv, decay, others = case.expected(mixes)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for name, left, right in zip("rkv", found.rkv, rkv, strict=True):
        torch.testing.assert_close(left.double().cpu(), right, rtol=tolerance, atol=tolerance, msg=name)
    for name, left, right in zip(("rate", "gate", "value mix"), found.others, others, strict=True):
        torch.testing.assert_close(left.double().cpu(), right, rtol=tolerance, atol=tolerance, msg=name)
    close = 1e-5 if dtype == torch.float32 else 1e-4
    torch.testing.assert_close(found.decay.double().cpu(), decay, rtol=close, atol=close)


@pytest.mark.usefixtures("ordered_products")
@pytest.mark.parametrize(("dtype", "kind"), KINDS[1:], ids=[kind for _, kind in KINDS[1:]])
def test_a_row_is_the_same_in_every_batch(
    random: torch.Generator, device: torch.device, dtype: torch.dtype, kind: str
) -> None:
    """Bitwise, from any place in it."""
    case = ProjectionsCase(random, dtype, kind, device)
    mixes = torch.randn(6, max(NUM_ROWS), C, generator=random).to(dtype).to(device)
    most: Projected = case.run(mixes)
    for rows in [slice(0, num_rows) for num_rows in NUM_ROWS] + [slice(40, 42)]:
        found: Projected = case.run(mixes[:, rows].contiguous())
        assert torch.equal(found.rkv, most.rkv[:, rows]), rows
        assert torch.equal(found.decay, most.decay[rows]), rows
        assert torch.equal(found.others, most.others[:, rows]), rows


@pytest.mark.parametrize(("dtype", "kind"), KINDS, ids=[kind for _, kind in KINDS])
def test_joined_matrices_stay_usable_alone(
    random: torch.Generator, device: torch.device, dtype: torch.dtype, kind: str
) -> None:
    """Receptance, key and value are views of the joint weights, and multiply as before."""
    case = ProjectionsCase(random, dtype, kind, device)
    x = torch.randn(3, C, generator=random).to(dtype).to(device)
    storages = {linear_.packed.untyped_storage().data_ptr() for linear_ in case.linears}
    assert len(storages) == 1
    for before, now in zip(case.packed, case.linears, strict=True):
        assert torch.equal(now.packed, before)
        assert torch.equal(linear.linear(x, now.packed, C), linear.linear(x, before, C))

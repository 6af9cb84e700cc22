"""Int8 weights: what quantising keeps, which matrices it takes, and what the assembler makes of a byte."""

from __future__ import annotations

import re
import struct

import pytest
import torch

int8 = pytest.importorskip("kernels.triton.int8", reason="Triton is not installed: pip install sostenuto[cuda]")
operators = pytest.importorskip(
    "kernels.triton.operators", reason="Triton is not installed: pip install sostenuto[cuda]"
)


def test_quantising_moves_a_weight_by_half_a_step(random: torch.Generator) -> None:
    """Each output has a scale of its own, by which its largest weight is 127; one of zeros stays zero."""
    weight = torch.randn(5, 64, generator=random) * torch.tensor([1e-3, 1.0, 7.0, 1e4, 0.0])[:, None]
    quantised, scales = int8.quantise(weight)
    assert quantised.dtype == torch.int8
    assert quantised.abs().amax(dim=1).tolist() == [127, 127, 127, 127, 0]
    moved = (quantised.double() * scales.double()[:, None] - weight.double()).abs()
    assert (moved <= 0.5001 * scales.double()[:, None]).all()
    assert scales.isfinite().all()


@pytest.mark.parametrize(
    ("shape", "dtype", "becomes"),
    [
        ((96, 128), torch.bfloat16, torch.int8),
        ((96, 192), torch.bfloat16, torch.int8),
        ((96, 96), torch.bfloat16, torch.bfloat16),
        ((96, 40), torch.bfloat16, torch.bfloat16),
        ((96, 128), torch.float32, torch.float32),
        ((96, 128), torch.float16, torch.float16),
    ],
    ids=str,
)
def test_what_becomes_int8(shape: tuple[int, int], dtype: torch.dtype, becomes: torch.dtype) -> None:
    """Matrices in bfloat16 whose inputs fill tiles; others stay what they are, and so do all that nobody asks for."""
    weight = torch.ones(shape, dtype=dtype)
    assert operators.pack_linear(weight, int8=True).dtype == becomes
    assert operators.pack_linear(weight, int8=False).dtype == dtype


def run(ptx: str, words: tuple[int, int]) -> list[tuple[float, float]]:
    """Return the pairs of bfloat16 that the assembler's text makes of two words, by the few instructions it has."""
    registers = {"$4": words[0], "$5": words[1]}

    def value(operand: str) -> int:
        return registers[operand] if operand in registers else int(operand, 16)

    def halves(bits: int) -> tuple[float, float]:
        low, high = bits << 16 & 0xFFFFFFFF, bits & 0xFFFF0000
        return struct.unpack("<ff", struct.pack("<II", low, high))

    for instruction in re.findall(r"(?:mov|prmt|lop3|fma)[^;]*", ptx):
        name, to, *operands = re.split(r",?\s+", instruction.strip())
        of = [value(operand) for operand in operands]
        if name == "mov.b32":
            registers[to] = of[0]
        elif name == "prmt.b32":
            choices = (of[0] | of[1] << 32).to_bytes(8, "little")
            registers[to] = int.from_bytes(bytes(choices[of[2] >> 4 * i & 7] for i in range(4)), "little")
        elif name == "lop3.b32":
            assert of[3] == (0xF0 & 0xCC) | 0xAA  # the table of (a & b) | c
            registers[to] = (of[0] & of[1]) | of[2]
        else:
            assert name == "fma.rn.bf16x2"
            exact = [a * b + c for a, b, c in zip(*(halves(bits) for bits in of), strict=True)]
            as_bits = [struct.unpack("<I", struct.pack("<f", number))[0] for number in exact]
            assert not any(bits & 0xFFFF for bits in as_bits)  # they are bfloat16: nothing was to be rounded
            registers[to] = as_bits[0] >> 16 | as_bits[1]
    return [halves(registers[f"${byte}"]) for byte in range(4)]


def test_every_byte_becomes_itself_in_the_assembler() -> None:
    """No interpreter runs it, so this does; all bytes, in all four places of both words."""
    for low in range(256):
        first = bytes((low + step) % 256 for step in (0, 50, 100, 150))
        second = bytes((low + step) % 256 for step in (77, 3, 201, 128))
        pairs = run(int8.UNPACK_PTX.value, (int.from_bytes(first, "little"), int.from_bytes(second, "little")))
        assert pairs == list(zip(struct.unpack("4b", first), struct.unpack("4b", second), strict=True))

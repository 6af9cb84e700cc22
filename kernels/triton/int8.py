"""Int8 weights: bytes with a scale for each output, that become bfloat16 in registers, where they are multiplied.

Every `|byte| <= 127` is a bfloat16, so a product with bfloat16 rows loses nothing but what quantising lost. Bytes lie
in words of four: a row of a tile (`linear.py`) of N inputs is N / 4 words, and word `i` holds inputs `i`, `i + N / 4`,
`i + N / 2` and `i + 3 N / 4`. So the four tiles that a tile of words becomes lie side by side along the inputs, each
thread makes what it multiplies itself, and memory is read 16 bytes at a time: Triton reads a tile of bytes in eights,
and takes it out of shared memory in twos.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.triton.overlap import INTERPRETED

LEAST_TILE_K = 64  # a quarter of it is what tensor cores take at once

# Each byte of two words as a pair of bfloat16. With b7 the upper bit and low the other seven, a byte is
# (128 + low) - (b7 ? 256 : 128): as bfloat16, 0x4300 | low is the first and 0x4300 | b7 the second, and all is exact.
_UNPACK_BYTE = (
    "prmt.b32 byte, $4, $5, 0x{1}{1}{0}{0}; "
    "lop3.b32 second, byte, 0x00800080, 0x43004300, 0xEA; "
    "lop3.b32 first, byte, 0x007F007F, 0x43004300, 0xEA; "
    "fma.rn.bf16x2 ${0}, second, minus_one, first; "
)
UNPACK_PTX = tl.constexpr(
    "{ .reg .b32 byte, first, second, minus_one; mov.b32 minus_one, 0xBF80BF80; "
    + "".join(_UNPACK_BYTE.format(byte, byte + 4) for byte in range(4))
    + "}"
)
OPERANDS = tl.constexpr("=&r,=&r,=&r,=&r,r,r")  # words are still read when the first byte is written


def can_quantise(weight: torch.Tensor) -> bool:
    """Say whether a matrix `[O, K]` may become int8: rows beside it are bfloat16, as it was, and tiles must fit."""
    return weight.dtype == torch.bfloat16 and weight.shape[1] % LEAST_TILE_K == 0


def quantise(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `weight[O, K]` as int8 in -127 to 127, and the float32 scales `[O]` that make them what they were."""
    scales = weight.float().abs().amax(dim=1).div(127).clamp_(min=torch.finfo(torch.float32).tiny)
    return (weight.float() / scales[:, None]).round_().to(torch.int8), scales


def interleave(tiles: torch.Tensor) -> torch.Tensor:
    """Return int8 tiles `[..., N]` with their inputs in words."""
    quarters = tiles.view(*tiles.shape[:-1], 4, -1)
    return quarters.transpose(-1, -2).flatten(-2)


@triton.jit
def unpacked(words, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr):
    """Return the weights `[BLOCK_O, BLOCK_K]` of words `[BLOCK_O, BLOCK_K // 4]`, one tile, as the product takes them.

    Triton's interpreter knows neither the assembler nor bfloat16: it gives the same numbers in float32.
    """
    if INTERPRETED:
        first = (words << 24 >> 24).to(tl.float32)
        second = (words << 16 >> 24).to(tl.float32)
        third = (words << 8 >> 24).to(tl.float32)
        fourth = (words >> 24).to(tl.float32)
    else:
        first, second, third, fourth = tl.inline_asm_elementwise(
            UNPACK_PTX, OPERANDS, [words], (tl.bfloat16,) * 4, is_pure=True, pack=2
        )
    side_by_side = tl.join(tl.join(first, third), tl.join(second, fourth))
    return tl.reshape(tl.permute(side_by_side, (0, 2, 3, 1)), [BLOCK_O, BLOCK_K])

"""Truncation and drawing without sorting the vocabulary: one program a row, in a fixed order.

The last token that `top_k` and `top_p` keep is found by halving: of positive floats the bit patterns have the floats'
order, so 30 passes over a row that lies in cache decide which likelihood it is, exactly. The draw walks the cumulative
distribution in blocks and looks into one of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

NUM_WARPS = 8
BLOCK = 1024

_BITS_OF_ONE = tl.constexpr(0x3F800000)  # of the float32 1.0, which is the most likely token's likelihood


@triton.jit
def _greatest(logits, V: tl.constexpr, BLOCK: tl.constexpr):
    """The greatest logit, the lowest id that has it, and whether the row is a distribution."""
    columns = tl.arange(0, BLOCK)
    most = tl.full([BLOCK], float("-inf"), tl.float32)
    ids = tl.zeros([BLOCK], tl.int32)
    is_broken = tl.zeros([BLOCK], tl.int32)
    for begin in range(0, V, BLOCK):
        x = tl.load(logits + begin + columns, mask=begin + columns < V, other=float("-inf"))
        is_broken |= ((x != x) | (x == float("inf"))).to(tl.int32)
        is_greater = x > most
        most = tl.where(is_greater, x, most)
        ids = tl.where(is_greater, begin + columns, ids)
    greatest = tl.max(most, axis=0)
    lowest_id = tl.min(tl.where(most == greatest, ids, V), axis=0)
    return greatest, lowest_id, (tl.max(is_broken, axis=0) == 0) & (greatest > float("-inf"))


@triton.jit
def _likelihoods(logits, begin, greatest, V: tl.constexpr, BLOCK: tl.constexpr):
    """`exp(logit - greatest)` of a block, 0 past the end."""
    columns = begin + tl.arange(0, BLOCK)
    return tl.exp(tl.load(logits + columns, mask=columns < V, other=float("-inf")) - greatest)


@triton.jit
def _count_and_mass(logits, greatest, bound, V: tl.constexpr, BLOCK: tl.constexpr):
    """How many likelihoods have bits of at least `bound`, and their sum in float64."""
    count = tl.zeros([BLOCK], tl.int32)
    mass = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, V, BLOCK):
        likelihoods = _likelihoods(logits, begin, greatest, V, BLOCK)
        is_in = likelihoods.to(tl.int32, bitcast=True) >= bound
        is_in &= begin + tl.arange(0, BLOCK) < V
        count += is_in.to(tl.int32)
        mass += tl.where(is_in, likelihoods, 0.0)
    return tl.sum(count, axis=0), tl.sum(mass.to(tl.float64), axis=0)


@triton.jit
def _cutoff_bits(logits, greatest, top_k, top_p, V: tl.constexpr, BLOCK: tl.constexpr):
    """The bits of the least likelihood that both truncations keep."""
    _, total = _count_and_mass(logits, greatest, 0, V, BLOCK)
    wanted = tl.where(top_p < 1.0, top_p * total, 2.0 * total)
    enough = tl.zeros([], tl.int32)  # these bits and more are enough tokens or mass,
    short = tl.full([], _BITS_OF_ONE + 1, tl.int32)  # these are not
    while short - enough > 1:
        middle = (enough + short) // 2
        count, mass = _count_and_mass(logits, greatest, middle, V, BLOCK)
        is_enough = (count >= top_k) | (mass > wanted)
        enough = tl.where(is_enough, middle, enough)
        short = tl.where(is_enough, short, middle)
    return enough


@triton.jit
def _weights(logits, begin, greatest, scale, cutoff, V: tl.constexpr, BLOCK: tl.constexpr):
    """What is drawn from, of a block: reshaped likelihoods, 0 where truncated."""
    columns = begin + tl.arange(0, BLOCK)
    below = tl.load(logits + columns, mask=columns < V, other=float("-inf")) - greatest
    is_kept = (tl.exp(below).to(tl.int32, bitcast=True) >= cutoff) & (columns < V)
    return tl.where(is_kept, tl.exp(below * scale), 0.0)


@triton.jit
def _draw(logits, greatest, scale, cutoff, uniform, V: tl.constexpr, BLOCK: tl.constexpr, NUM_BLOCKS: tl.constexpr):
    """The first id whose cumulative weight exceeds `uniform` of all; never one of weight 0."""
    blocks = tl.arange(0, NUM_BLOCKS)
    sums = tl.zeros([NUM_BLOCKS], tl.float64)
    for begin in range(0, V, BLOCK):
        weights = _weights(logits, begin, greatest, scale, cutoff, V, BLOCK)
        sums = tl.where(blocks == begin // BLOCK, tl.sum(weights.to(tl.float64), axis=0), sums)
    cumulative = tl.cumsum(sums, axis=0)
    point = uniform * tl.max(cumulative, axis=0)
    last = tl.max(tl.where(sums > 0, blocks, 0), axis=0)  # where the point lies if it was rounded up to the very end
    block = tl.min(tl.where(cumulative > point, blocks, last), axis=0)
    before = tl.sum(tl.where(blocks < block, sums, 0.0), axis=0)
    columns = tl.arange(0, BLOCK)
    weights = _weights(logits, block * BLOCK, greatest, scale, cutoff, V, BLOCK)
    cumulative_inside = before + tl.cumsum(weights.to(tl.float64), axis=0)
    last_inside = tl.max(tl.where(weights > 0, columns, 0), axis=0)
    is_past = (cumulative_inside > point) & (weights > 0)
    return block * BLOCK + tl.min(tl.where(is_past, columns, last_inside), axis=0)


@triton.jit
def sample_kernel(
    logits, temperature, top_k, top_p, min_p, uniform, out, stride,
    V: tl.constexpr, BLOCK: tl.constexpr, NUM_BLOCKS: tl.constexpr,
):  # fmt: skip
    """Draw a token for a row; program (row)."""
    row = tl.program_id(0)
    logits += row.to(tl.int64) * stride
    greatest, token_id, is_sound = _greatest(logits, V, BLOCK)
    heat = tl.load(temperature + row)
    if is_sound & (heat > 0):
        k, p = tl.load(top_k + row), tl.load(top_p + row)
        cutoff = tl.load(min_p + row).to(tl.int32, bitcast=True)
        if ((k > 0) & (k < V)) | (p < 1.0):
            wanted = tl.where(k > 0, k, V)
            cutoff = tl.maximum(cutoff, _cutoff_bits(logits, greatest, wanted, p, V, BLOCK))
        scale = tl.minimum(1.0 / tl.maximum(heat, 1e-30), 1e30)
        token_id = _draw(logits, greatest, scale, cutoff, tl.load(uniform + row), V, BLOCK, NUM_BLOCKS)
    tl.store(out + row, tl.where(is_sound, token_id, -1).to(tl.int64))


@dataclass(frozen=True, slots=True)
class SamplingRows:
    """The parameters of R rows on the device."""

    temperature: torch.Tensor  # [R] float32
    top_k: torch.Tensor  # [R] int32
    top_p: torch.Tensor  # [R] float64
    min_p: torch.Tensor  # [R] float32
    uniform: torch.Tensor  # [R] float64

    @classmethod
    def from_host(
        cls,
        temperature: Sequence[float],
        top_k: Sequence[int],
        top_p: Sequence[float],
        min_p: Sequence[float],
        uniform: Sequence[float],
        device: torch.device,
    ) -> SamplingRows:
        """Return parameters that the host has, on `device`."""
        return cls(
            torch.tensor(temperature, dtype=torch.float32, device=device),
            torch.tensor(top_k, dtype=torch.int32, device=device),
            torch.tensor(top_p, dtype=torch.float64, device=device),
            torch.tensor(min_p, dtype=torch.float32, device=device),
            torch.tensor(uniform, dtype=torch.float64, device=device),
        )


def sample_rows(logits: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
    """As `kernels.sample`, from parameters on the device: the host reads nothing, so a graph may hold the call."""
    num_rows, vocab_size = logits.shape
    token_ids = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    sample_kernel[(num_rows,)](
        logits, rows.temperature, rows.top_k, rows.top_p, rows.min_p, rows.uniform, token_ids, logits.stride(0),
        V=vocab_size, BLOCK=BLOCK, NUM_BLOCKS=triton.next_power_of_2(triton.cdiv(vocab_size, BLOCK)),
        num_warps=NUM_WARPS,
    )  # fmt: skip
    return token_ids

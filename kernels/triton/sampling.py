"""Truncation and drawing without sorting the vocabulary: six short launches, most of them with many programs a row.

    survey    of each block of a row: the greatest logit, where it is, whether the row is a distribution
    weigh     of each block, by octave of likelihood: how many tokens, and their mass
    collect   the likelihoods of the octave in which the last token lies that `top_k` and `top_p` keep
    cut       which of them it is, by halving: of positive floats the bit patterns have the floats' order
    add       of each block: the mass that is drawn from
    pick      the block, then the token in it

Every sum has one order. Rows that do not truncate leave the second to fourth at once, greedy ones the fifth, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels.triton.overlap import let_successor_begin, wait_for_inputs

BLOCK = 2048
NUM_WARPS = 8
CANDIDATES = 8192  # of an octave that lie in registers; if there are more, the others are read in every round
CUT_WARPS = 16

_OCTAVES = tl.constexpr(32)  # the last one holds all the rest
_BITS_OF_ONE = tl.constexpr(0x3F800000)  # of the float32 1.0, which is the most likely token's likelihood


@triton.jit
def survey_kernel(logits, greatest, ids, is_broken, stride, V: tl.constexpr, BLOCK: tl.constexpr):
    """Program (row, block)."""
    let_successor_begin()
    wait_for_inputs()
    row, block = tl.program_id(0), tl.program_id(1)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row.to(tl.int64) * stride + columns, mask=columns < V, other=float("-inf"))
    broken = tl.max(((x != x) | (x == float("inf"))).to(tl.int32), axis=0)
    x = tl.where(x == x, x, float("-inf"))
    most = tl.max(x, axis=0)
    at = row * tl.num_programs(1) + block
    tl.store(greatest + at, most)
    tl.store(ids + at, tl.min(tl.where(x == most, columns, V), axis=0))
    tl.store(is_broken + at, broken)


@triton.jit
def _greatest(greatest, row, num_blocks, NUM_BLOCKS: tl.constexpr):
    """The greatest logit of a row, or 0 if none is finite."""
    blocks = tl.arange(0, NUM_BLOCKS)
    of_block = tl.load(greatest + row * num_blocks + blocks, mask=blocks < num_blocks, other=float("-inf"))
    most = tl.max(of_block, axis=0)
    return tl.where((most > float("-inf")) & (most < float("inf")), most, 0.0)


@triton.jit
def _truncates(top_k, top_p, row, V: tl.constexpr):
    """Whether a row's truncation takes looking at ranks."""
    k = tl.load(top_k + row)
    return ((k > 0) & (k < V)) | (tl.load(top_p + row) < 1.0)


@triton.jit
def _likelihood_bits(logits, columns, greatest, V: tl.constexpr):
    """The bits of `exp(logit - greatest)`, -1 past the end."""
    below = tl.load(logits + columns, mask=columns < V, other=float("-inf")) - greatest
    return tl.where(columns < V, tl.exp(below).to(tl.int32, bitcast=True), -1)


@triton.jit
def _octave(bits):
    """0 for a likelihood of 1, one more for each halving."""
    return tl.minimum(127 - (bits >> 23), _OCTAVES - 1)


@triton.jit
def weigh_kernel(
    logits, temperature, top_k, top_p, greatest, counts, masses, stride,
    V: tl.constexpr, BLOCK: tl.constexpr, NUM_BLOCKS: tl.constexpr,
):  # fmt: skip
    """Program (row, block); writes `counts` and `masses` `[R, blocks, octaves]`."""
    let_successor_begin()
    wait_for_inputs()
    row, block, num_blocks = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    if _truncates(top_k, top_p, row, V) & (tl.load(temperature + row) > 0):
        most = _greatest(greatest, row, num_blocks, NUM_BLOCKS)
        columns = block * BLOCK + tl.arange(0, BLOCK)
        bits = _likelihood_bits(logits + row.to(tl.int64) * stride, columns, most, V)
        likelihood, octave = tl.maximum(bits, 0).to(tl.float32, bitcast=True), tl.where(bits < 0, -1, _octave(bits))
        octaves = tl.arange(0, _OCTAVES)
        count, mass = tl.zeros([_OCTAVES], tl.int32), tl.zeros([_OCTAVES], tl.float32)
        for i in range(_OCTAVES):
            is_in = octave == i
            count = tl.where(octaves == i, tl.sum(is_in.to(tl.int32), axis=0), count)
            mass = tl.where(octaves == i, tl.sum(tl.where(is_in, likelihood, 0.0), axis=0), mass)
        at = (row * num_blocks + block) * _OCTAVES + octaves
        tl.store(counts + at, count)
        tl.store(masses + at, mass)


@triton.jit
def _last_octave(counts, masses, top_k, top_p, row, num_blocks, V: tl.constexpr, NUM_BLOCKS: tl.constexpr):
    """The octave of the last token kept, or one past the last; count and mass above it; mass wanted; count wanted."""
    blocks, octaves = tl.arange(0, NUM_BLOCKS), tl.arange(0, _OCTAVES)
    at = (row * num_blocks + blocks[:, None]) * _OCTAVES + octaves[None, :]
    count = tl.sum(tl.load(counts + at, mask=(blocks < num_blocks)[:, None], other=0), axis=0)
    mass = tl.sum(tl.load(masses + at, mask=(blocks < num_blocks)[:, None], other=0.0).to(tl.float64), axis=0)
    k, p = tl.load(top_k + row), tl.load(top_p + row)
    wanted = tl.where(k > 0, k, V)
    wanted_mass = tl.where(p < 1.0, p, 2.0) * tl.sum(mass, axis=0)
    is_enough = (tl.cumsum(count, axis=0) >= wanted) | (tl.cumsum(mass, axis=0) > wanted_mass)
    last = tl.min(tl.where(is_enough, octaves, _OCTAVES), axis=0)
    count_above = tl.sum(tl.where(octaves < last, count, 0), axis=0)
    mass_above = tl.sum(tl.where(octaves < last, mass, 0.0), axis=0)
    return last, count_above, mass_above, wanted, wanted_mass


@triton.jit
def collect_kernel(
    logits, temperature, top_k, top_p, greatest, counts, masses, candidates, stride,
    V: tl.constexpr, BLOCK: tl.constexpr, NUM_BLOCKS: tl.constexpr,
):  # fmt: skip
    """Program (row, block); writes the bits of the octave's likelihoods to `candidates[R, V]`, one after the other."""
    let_successor_begin()
    wait_for_inputs()
    row, block, num_blocks = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    if _truncates(top_k, top_p, row, V) & (tl.load(temperature + row) > 0):
        last, _, _, _, _ = _last_octave(counts, masses, top_k, top_p, row, num_blocks, V, NUM_BLOCKS)
        blocks = tl.arange(0, NUM_BLOCKS)
        at = (row * num_blocks + blocks) * _OCTAVES + last
        before = tl.sum(tl.load(counts + at, mask=(blocks < block) & (last < _OCTAVES), other=0), axis=0)
        most = _greatest(greatest, row, num_blocks, NUM_BLOCKS)
        columns = block * BLOCK + tl.arange(0, BLOCK)
        bits = _likelihood_bits(logits + row.to(tl.int64) * stride, columns, most, V)
        is_in = (bits >= 0) & (_octave(bits) == last)
        place = before + tl.cumsum(is_in.to(tl.int32), axis=0) - 1
        tl.store(candidates + row.to(tl.int64) * V + place, bits, mask=is_in)


@triton.jit
def _count_and_mass(bits, bound):
    """How many of the bits are at least `bound`, and the sum of what they mean."""
    is_in = bits >= bound
    mass = tl.where(is_in, bits.to(tl.float32, bitcast=True), 0.0)
    return tl.sum(is_in.to(tl.int32), axis=0), tl.sum(mass, axis=0).to(tl.float64)


@triton.jit
def cut_kernel(
    temperature, top_k, top_p, min_p, counts, masses, candidates, cutoffs, num_blocks,
    V: tl.constexpr, NUM_BLOCKS: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    """Program (row); writes the bits of the least likelihood that all truncations keep."""
    let_successor_begin()
    wait_for_inputs()
    row = tl.program_id(0)
    cutoff = tl.load(min_p + row).to(tl.int32, bitcast=True)
    if _truncates(top_k, top_p, row, V) & (tl.load(temperature + row) > 0):
        last, count_above, mass_above, wanted, wanted_mass = _last_octave(
            counts, masses, top_k, top_p, row, num_blocks, V, NUM_BLOCKS
        )
        if last < _OCTAVES:
            blocks = tl.arange(0, NUM_BLOCKS)
            at = (row * num_blocks + blocks) * _OCTAVES + last
            num_candidates = tl.sum(tl.load(counts + at, mask=blocks < num_blocks, other=0), axis=0)
            columns = tl.arange(0, CANDIDATES)
            list_of_row = candidates + row.to(tl.int64) * V
            first = tl.load(list_of_row + columns, mask=columns < num_candidates, other=-1)
            # These bits and more are enough tokens or mass, those are not.
            enough = tl.where(last == _OCTAVES - 1, 0, (127 - last) << 23)
            short = tl.where(last == 0, _BITS_OF_ONE + 1, (128 - last) << 23)
            while short - enough > 1:
                middle = enough + (short - enough) // 2
                count, mass = _count_and_mass(first, middle)
                begin = tl.full([], CANDIDATES, tl.int32)
                while begin < num_candidates:
                    is_there = begin + columns < num_candidates
                    more = tl.load(list_of_row + begin + columns, mask=is_there, other=-1)
                    more_count, more_mass = _count_and_mass(more, middle)
                    count += more_count
                    mass += more_mass
                    begin += CANDIDATES
                is_enough = (count_above + count >= wanted) | (mass_above + mass > wanted_mass)
                enough = tl.where(is_enough, middle, enough)
                short = tl.where(is_enough, short, middle)
            cutoff = tl.maximum(cutoff, enough)
    tl.store(cutoffs + row, cutoff)


@triton.jit
def _weights(logits, columns, greatest, temperature, cutoff, V: tl.constexpr):
    """What is drawn from: reshaped likelihoods, 0 where truncated."""
    below = tl.load(logits + columns, mask=columns < V, other=float("-inf")) - greatest
    is_kept = (tl.exp(below).to(tl.int32, bitcast=True) >= cutoff) & (columns < V)
    scale = tl.minimum(1.0 / tl.maximum(temperature, 1e-30), 1e30)
    return tl.where(is_kept, tl.exp(below * scale), 0.0).to(tl.float64)


@triton.jit
def add_kernel(
    logits, temperature, greatest, cutoffs, sums, stride, V: tl.constexpr, BLOCK: tl.constexpr, NUM_BLOCKS: tl.constexpr
):
    """Program (row, block); writes `sums[R, blocks]`."""
    let_successor_begin()
    wait_for_inputs()
    row, block, num_blocks = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    heat = tl.load(temperature + row)
    if heat > 0:
        most = _greatest(greatest, row, num_blocks, NUM_BLOCKS)
        columns = block * BLOCK + tl.arange(0, BLOCK)
        weights = _weights(logits + row.to(tl.int64) * stride, columns, most, heat, tl.load(cutoffs + row), V)
        tl.store(sums + row * num_blocks + block, tl.sum(weights, axis=0))


@triton.jit
def pick_kernel(
    logits, temperature, uniform, greatest, ids, is_broken, cutoffs, sums, out, stride, num_blocks,
    V: tl.constexpr, BLOCK: tl.constexpr, NUM_BLOCKS: tl.constexpr,
):  # fmt: skip
    """Program (row). The first id whose cumulative weight exceeds `uniform` of all; never one of weight 0."""
    let_successor_begin()
    wait_for_inputs()
    row = tl.program_id(0)
    blocks = tl.arange(0, NUM_BLOCKS)
    at, is_block = row * num_blocks + blocks, blocks < num_blocks
    of_block = tl.load(greatest + at, mask=is_block, other=float("-inf"))
    most = tl.max(of_block, axis=0)
    token_id = tl.min(tl.where(of_block == most, tl.load(ids + at, mask=is_block, other=V), V), axis=0)
    is_sound = (tl.max(tl.load(is_broken + at, mask=is_block, other=0), axis=0) == 0) & (most > float("-inf"))
    heat = tl.load(temperature + row)
    if is_sound & (heat > 0):
        masses = tl.load(sums + at, mask=is_block, other=0.0)
        cumulative = tl.cumsum(masses, axis=0)
        point = tl.load(uniform + row) * tl.max(cumulative, axis=0)
        last = tl.max(tl.where(masses > 0, blocks, 0), axis=0)  # for a point that was rounded up to the very end
        block = tl.min(tl.where(cumulative > point, blocks, last), axis=0)
        before = tl.sum(tl.where(blocks < block, masses, 0.0), axis=0)
        columns = tl.arange(0, BLOCK)
        weights = _weights(
            logits + row.to(tl.int64) * stride, block * BLOCK + columns, most, heat, tl.load(cutoffs + row), V
        )
        last = tl.max(tl.where(weights > 0, columns, 0), axis=0)
        is_past = (before + tl.cumsum(weights, axis=0) > point) & (weights > 0)
        token_id = block * BLOCK + tl.min(tl.where(is_past, columns, last), axis=0)
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


def sample_rows(logits: torch.Tensor, rows: SamplingRows, **launch: bool) -> torch.Tensor:
    """As `kernels.sample`, from parameters on the device: the host reads nothing, so a graph may hold the call.

    `launch` are Triton's options.
    """
    R, V = logits.shape
    num_blocks = triton.cdiv(V, BLOCK)
    of_blocks = (R, num_blocks)

    def new(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=logits.device)

    greatest, sums = new(*of_blocks, dtype=torch.float32), new(*of_blocks, dtype=torch.float64)
    ids, is_broken = (new(*of_blocks, dtype=torch.int32) for _ in range(2))
    counts = new(*of_blocks, _OCTAVES.value, dtype=torch.int32)
    masses = new(*of_blocks, _OCTAVES.value, dtype=torch.float32)
    candidates, cutoffs = new(R, V, dtype=torch.int32), new(R, dtype=torch.int32)
    token_ids = new(R, dtype=torch.int64)
    truncation = (rows.temperature, rows.top_k, rows.top_p)
    sizes = {"V": V, "NUM_BLOCKS": triton.next_power_of_2(num_blocks)}
    options = {"num_warps": NUM_WARPS, **launch}
    by_block = {**sizes, "BLOCK": BLOCK, **options}
    stride = logits.stride(0)
    survey_kernel[of_blocks](logits, greatest, ids, is_broken, stride, V=V, BLOCK=BLOCK, **options)
    weigh_kernel[of_blocks](logits, *truncation, greatest, counts, masses, stride, **by_block)
    collect_kernel[of_blocks](logits, *truncation, greatest, counts, masses, candidates, stride, **by_block)
    cut_kernel[(R,)](
        *truncation, rows.min_p, counts, masses, candidates, cutoffs, num_blocks,
        **sizes, CANDIDATES=CANDIDATES, num_warps=CUT_WARPS, **launch,
    )  # fmt: skip
    add_kernel[of_blocks](logits, rows.temperature, greatest, cutoffs, sums, stride, **by_block)
    pick_kernel[(R,)](
        logits, rows.temperature, rows.uniform, greatest, ids, is_broken, cutoffs, sums, token_ids, stride, num_blocks,
        **by_block,
    )  # fmt: skip
    return token_ids

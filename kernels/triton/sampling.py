"""Truncation and drawing without sorting the vocabulary: eight short launches, most with many programs a row.

    survey         of each block of a row: the greatest logit, where it is, whether the row is a distribution
    weigh, thrice  of each larger block: tokens at least so likely, and their mass, for eight bounds; after the first
                   time between those of the time before where the last token lies that `top_k` and `top_p` keep
    collect        of each larger block: the likelihoods between those of the last time
    cut            which of them it is, between ever closer bounds
    add            of each block: the mass that is drawn from
    pick           the block, then the token in it

Bounds are on the bits of likelihoods, which for positive floats have the floats' order. Every sum has one order. Rows
that do not truncate leave the second to sixth at once, greedy ones the seventh, too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels.triton.overlap import let_successor_begin, wait_for_inputs

BLOCK = 2048
NUM_WARPS = 8
# What is weighed against many bounds: threads sum pieces, and what they exchange at a block's end costs more than that.
WEIGHED = {"BLOCK": 4096, "PIECE": 1024, "STAGES": 3, "num_warps": 8}
MAX_PROGRAMS = 1024  # of many rows: a program then takes several of these blocks
CANDIDATES = 128  # of such a block that are collected; if there are more, the whole row is looked at again
CUT_WARPS = 4
PIECE = 2048  # of a row that is looked at again

_BOUNDS = tl.constexpr(8)
_TABLES = tl.constexpr(3)  # each divides what the one before leaves
_BITS_OF_ONE = tl.constexpr(0x3F800000)  # of the float32 1.0, which is the most likely token's likelihood


@triton.jit
def survey_kernel(logits, greatest, ids, is_broken, stride, V: tl.constexpr, BLOCK: tl.constexpr):
    """Program (row, block)."""
    let_successor_begin(True)
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
def _at_least(bits, bounds):
    """For each of `bounds`: how many of the bits are at least as much, and the sum of what these mean."""
    is_in = bits[None, :] >= bounds[:, None]
    mass = tl.where(is_in, tl.maximum(bits, 0).to(tl.float32, bitcast=True)[None, :], 0.0)
    return tl.sum(is_in.to(tl.int32), axis=1), tl.sum(mass, axis=1)


@triton.jit
def _first_bounds():
    """Likelihoods of 2 ** -14, 2 ** -12, ..., 1."""
    return (113 + 2 * tl.arange(0, _BOUNDS)) << 23


@triton.jit
def _bounds_between(enough, short):
    """What divides the bits from `enough` up to `short` alike; a few more of them may be behind the last."""
    return enough + tl.maximum((short - enough) // _BOUNDS, 1) * (tl.arange(0, _BOUNDS) + 1)


@triton.jit
def _narrowed(bounds, count, mass, wanted, wanted_mass, enough, short, count_above, mass_above):
    """The range between the last of `bounds` that is `enough` and the first that is `short`; what is from that on."""
    is_enough = ((count >= wanted) | (mass > wanted_mass)) & (bounds < short)
    num_enough = tl.sum(is_enough.to(tl.int32), axis=0)
    i = tl.arange(0, _BOUNDS)
    enough = tl.where(num_enough > 0, tl.sum(tl.where(i == num_enough - 1, bounds, 0), axis=0), enough)
    next_bound = tl.sum(tl.where(i == num_enough, bounds, 0), axis=0)
    is_there = (num_enough < _BOUNDS) & (next_bound < short)
    count_above = tl.where(is_there, tl.sum(tl.where(i == num_enough, count, 0), axis=0), count_above)
    mass_above = tl.where(is_there, tl.sum(tl.where(i == num_enough, mass, 0.0), axis=0), mass_above)
    return enough, tl.where(is_there, next_bound, short), count_above, mass_above


@triton.jit
def _of_row(counts, masses, table, row, num_blocks, NUM_BLOCKS: tl.constexpr):
    """A table of a row, `[bounds]`, all its blocks added. `counts` and `masses` are `[tables, R, blocks, bounds]`."""
    blocks = tl.arange(0, NUM_BLOCKS)[:, None]
    at = ((table + row) * num_blocks + blocks) * _BOUNDS + tl.arange(0, _BOUNDS)[None, :]
    count = tl.load(counts + at, mask=blocks < num_blocks, other=0)
    mass = tl.load(masses + at, mask=blocks < num_blocks, other=0.0)
    return tl.sum(count, axis=0), tl.sum(mass.to(tl.float64), axis=0)


@triton.jit
def _range(
    top_k, top_p, counts, masses, totals, row, num_rows, num_blocks,
    NUM_TABLES: tl.constexpr, V: tl.constexpr, NUM_BLOCKS: tl.constexpr,
):  # fmt: skip
    """Between which bits the last token kept lies, as far as tables tell; what is above; what is wanted."""
    k, p = tl.load(top_k + row), tl.load(top_p + row)
    blocks = tl.arange(0, NUM_BLOCKS)
    total = tl.sum(tl.load(totals + row * num_blocks + blocks, mask=blocks < num_blocks, other=0.0).to(tl.float64))
    wanted = tl.where(k > 0, k, V)
    wanted_mass = tl.where(p < 1.0, p, 2.0) * total
    enough, short = tl.zeros([], tl.int32), tl.full([], _BITS_OF_ONE + 1, tl.int32)
    count_above, mass_above = tl.zeros([], tl.int32), tl.zeros([], tl.float64)
    for table in tl.static_range(NUM_TABLES):
        bounds = _first_bounds() if table == 0 else _bounds_between(enough, short)
        count, mass = _of_row(counts, masses, table * num_rows, row, num_blocks, NUM_BLOCKS)
        enough, short, count_above, mass_above = _narrowed(
            bounds, count, mass, wanted, wanted_mass, enough, short, count_above, mass_above
        )
    return enough, short, count_above, mass_above, wanted, wanted_mass


@triton.jit(do_not_specialize=["num_rows"])
def weigh_kernel(
    logits, temperature, top_k, top_p, greatest, counts, masses, totals, stride, num_rows, num_surveyed, num_blocks,
    TABLE: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr, PIECE: tl.constexpr, STAGES: tl.constexpr,
    NUM_SURVEYED: tl.constexpr, NUM_BLOCKS: tl.constexpr,
):  # fmt: skip
    """Program (row, block and every so many after it); fills the TABLE, and the first time the `totals[R, blocks]`."""
    let_successor_begin(True)
    wait_for_inputs()
    row, block = tl.program_id(0), tl.program_id(1)
    if _truncates(top_k, top_p, row, V) & (tl.load(temperature + row) > 0):
        most = _greatest(greatest, row, num_surveyed, NUM_SURVEYED)
        if TABLE == 0:
            bounds = _first_bounds()
        else:
            enough, short, _count, _mass, _wanted, _wanted_mass = _range(
                top_k, top_p, counts, masses, totals, row, num_rows, num_blocks, TABLE, V, NUM_BLOCKS
            )
            bounds = _bounds_between(enough, short)
        while block < num_blocks:
            count, mass = tl.zeros([_BOUNDS, PIECE], tl.int32), tl.zeros([_BOUNDS, PIECE], tl.float32)
            total = tl.zeros([PIECE], tl.float32)
            for begin in tl.range(0, BLOCK, PIECE, num_stages=STAGES):
                columns = block * BLOCK + begin + tl.arange(0, PIECE)
                bits = _likelihood_bits(logits + row.to(tl.int64) * stride, columns, most, V)
                likelihoods = tl.where((bits >= 0) & (bits <= _BITS_OF_ONE), bits, 0).to(tl.float32, bitcast=True)
                total += likelihoods
                is_in = bits[None, :] >= bounds[:, None]
                count += is_in.to(tl.int32)
                mass += tl.where(is_in, likelihoods[None, :], 0.0)
            if TABLE == 0:
                tl.store(totals + row * num_blocks + block, tl.sum(total, axis=0))
            at = ((TABLE * num_rows + row) * num_blocks + block) * _BOUNDS + tl.arange(0, _BOUNDS)
            tl.store(counts + at, tl.sum(count, axis=1))
            tl.store(masses + at, tl.sum(mass, axis=1))
            block += tl.num_programs(1)


@triton.jit(do_not_specialize=["num_rows"])
def collect_kernel(
    logits, temperature, top_k, top_p, greatest, counts, masses, totals, candidates, num_candidates, stride, num_rows,
    num_surveyed, num_blocks,
    V: tl.constexpr, BLOCK: tl.constexpr, PIECE: tl.constexpr, STAGES: tl.constexpr, NUM_SURVEYED: tl.constexpr,
    NUM_BLOCKS: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    """Program as above; writes `num_candidates[R, blocks]` and the bits, `candidates[R, blocks, CANDIDATES]`."""
    let_successor_begin(True)
    wait_for_inputs()
    row, block = tl.program_id(0), tl.program_id(1)
    if _truncates(top_k, top_p, row, V) & (tl.load(temperature + row) > 0):
        most = _greatest(greatest, row, num_surveyed, NUM_SURVEYED)
        enough, short, _count, _mass, _wanted, _wanted_mass = _range(
            top_k, top_p, counts, masses, totals, row, num_rows, num_blocks, _TABLES, V, NUM_BLOCKS
        )
        while block < num_blocks:
            at, num_found = row * num_blocks + block, tl.zeros([], tl.int32)
            for begin in tl.range(0, BLOCK, PIECE, num_stages=STAGES):
                columns = block * BLOCK + begin + tl.arange(0, PIECE)
                bits = _likelihood_bits(logits + row.to(tl.int64) * stride, columns, most, V)
                is_in = (bits >= enough) & (bits < short)
                place = num_found + tl.cumsum(is_in.to(tl.int32), axis=0) - 1
                tl.store(candidates + at * CANDIDATES + place, bits, mask=is_in & (place < CANDIDATES))
                num_found += tl.sum(is_in.to(tl.int32), axis=0)
            tl.store(num_candidates + at, num_found)
            block += tl.num_programs(1)


@triton.jit
def _at_least_of_row(logits, most, bounds, V: tl.constexpr, PIECE: tl.constexpr):
    """As `_at_least`, of all tokens of a row."""
    count, mass = tl.zeros([_BOUNDS], tl.int32), tl.zeros([_BOUNDS], tl.float64)
    for begin in range(0, V, PIECE):
        more_count, more_mass = _at_least(_likelihood_bits(logits, begin + tl.arange(0, PIECE), most, V), bounds)
        count += more_count
        mass += more_mass.to(tl.float64)
    return count, mass


@triton.jit(do_not_specialize=["num_rows"])
def cut_kernel(
    logits, temperature, top_k, top_p, min_p, greatest, counts, masses, totals, candidates, num_candidates, cutoffs,
    stride, num_rows, num_surveyed, num_blocks,
    V: tl.constexpr, NUM_SURVEYED: tl.constexpr, NUM_BLOCKS: tl.constexpr, CANDIDATES: tl.constexpr,
    PIECE: tl.constexpr,
):  # fmt: skip
    """Program (row); writes the bits of the least likelihood that all truncations keep."""
    let_successor_begin(True)
    wait_for_inputs()
    row = tl.program_id(0)
    cutoff = tl.load(min_p + row).to(tl.int32, bitcast=True)
    if _truncates(top_k, top_p, row, V) & (tl.load(temperature + row) > 0):
        enough, short, count_above, mass_above, wanted, wanted_mass = _range(
            top_k, top_p, counts, masses, totals, row, num_rows, num_blocks, _TABLES, V, NUM_BLOCKS
        )
        blocks, place = tl.arange(0, NUM_BLOCKS), tl.arange(0, NUM_BLOCKS * CANDIDATES)
        at = row * num_blocks
        most_of_block = tl.max(tl.load(num_candidates + at + blocks, mask=blocks < num_blocks, other=0), axis=0)
        if most_of_block <= CANDIDATES:
            block = place // CANDIDATES
            num = tl.load(num_candidates + at + block, mask=block < num_blocks, other=0)
            bits = tl.load(candidates + at * CANDIDATES + place, mask=place % CANDIDATES < num, other=-1)
            while short - enough > 1:
                bounds = _bounds_between(enough, short)
                count, mass = _at_least(bits, bounds)
                enough, short, count_above, mass_above = _narrowed(
                    bounds, count_above + count, mass_above + mass.to(tl.float64), wanted, wanted_mass,
                    enough, short, count_above, mass_above,
                )  # fmt: skip
                # What has come to lie above is in the counts now.
                bits = tl.where(bits < short, bits, -1)
        else:
            most = _greatest(greatest, row, num_surveyed, NUM_SURVEYED)
            while short - enough > 1:
                bounds = _bounds_between(enough, short)
                count, mass = _at_least_of_row(logits + row.to(tl.int64) * stride, most, bounds, V, PIECE)
                enough, short, count_above, mass_above = _narrowed(
                    bounds, count, mass, wanted, wanted_mass, enough, short, count_above, mass_above
                )
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
    let_successor_begin(True)
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
    logits, temperature, uniform, greatest, ids, is_broken, cutoffs, sums, slots, out, stride, num_blocks,
    V: tl.constexpr, BLOCK: tl.constexpr, NUM_BLOCKS: tl.constexpr, HAS_SLOTS: tl.constexpr,
):  # fmt: skip
    """Program (row). The first id whose cumulative weight exceeds `uniform` of all; never one of weight 0.

    -1 where the row is no distribution, or its slot is.
    """
    let_successor_begin(True)
    wait_for_inputs()
    row = tl.program_id(0)
    blocks = tl.arange(0, NUM_BLOCKS)
    at, is_block = row * num_blocks + blocks, blocks < num_blocks
    of_block = tl.load(greatest + at, mask=is_block, other=float("-inf"))
    most = tl.max(of_block, axis=0)
    token_id = tl.min(tl.where(of_block == most, tl.load(ids + at, mask=is_block, other=V), V), axis=0)
    is_sound = (tl.max(tl.load(is_broken + at, mask=is_block, other=0), axis=0) == 0) & (most > float("-inf"))
    if HAS_SLOTS:
        is_sound &= tl.load(slots + row) >= 0
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
    def from_host(cls, rules: torch.Tensor, device: torch.device) -> SamplingRows:
        """Return the parameters of `kernels.sample` on `device`."""
        temperature, top_k, top_p, min_p, uniform = rules.T.contiguous().to(device)
        return cls(temperature.float(), top_k.int(), top_p, min_p.float(), uniform)


def sample_rows(
    logits: torch.Tensor,
    rows: SamplingRows,
    slots: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    **launch: bool,
) -> torch.Tensor:
    """As `kernels.sample`, from parameters on the device: the host reads nothing, so a graph may hold the call.

    Rows of a slot of -1 draw -1; what is drawn is written to `out[R]` int64 if that is given. `launch` are Triton's
    options.
    """
    R, V = logits.shape
    num_blocks, num_weighed = triton.cdiv(V, BLOCK), triton.cdiv(V, WEIGHED["BLOCK"])
    of_blocks, of_weighed = (R, num_blocks), (R, num_weighed)

    def new(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=logits.device)

    greatest, sums = new(*of_blocks, dtype=torch.float32), new(*of_blocks, dtype=torch.float64)
    ids, is_broken = (new(*of_blocks, dtype=torch.int32) for _ in range(2))
    counts, masses = (
        new(_TABLES.value, *of_weighed, _BOUNDS.value, dtype=dtype) for dtype in (torch.int32, torch.float32)
    )
    totals, num_candidates = new(*of_weighed, dtype=torch.float32), new(*of_weighed, dtype=torch.int32)
    candidates, cutoffs = new(*of_weighed, CANDIDATES, dtype=torch.int32), new(R, dtype=torch.int32)
    token_ids = new(R, dtype=torch.int64) if out is None else out
    truncation = (rows.temperature, rows.top_k, rows.top_p)
    tables = (counts, masses, totals)
    padded = triton.next_power_of_2(num_blocks)
    of_row = {"V": V, **launch}
    of_block = {**of_row, "BLOCK": BLOCK, "num_warps": NUM_WARPS}
    weighed = {**of_row, "NUM_SURVEYED": padded, "NUM_BLOCKS": triton.next_power_of_2(num_weighed)}
    of_weighed_block = {**weighed, **WEIGHED}
    sizes = (logits.stride(0), R, num_blocks, num_weighed)
    programs = (R, min(num_weighed, max(1, MAX_PROGRAMS // R)))
    survey_kernel[of_blocks](logits, greatest, ids, is_broken, logits.stride(0), **of_block)
    for table in range(_TABLES.value):
        weigh_kernel[programs](logits, *truncation, greatest, *tables, *sizes, TABLE=table, **of_weighed_block)
    collect_kernel[programs](
        logits, *truncation, greatest, *tables, candidates, num_candidates, *sizes,
        CANDIDATES=CANDIDATES, **of_weighed_block,
    )  # fmt: skip
    cut_kernel[(R,)](
        logits, *truncation, rows.min_p, greatest, *tables, candidates, num_candidates, cutoffs, *sizes,
        CANDIDATES=CANDIDATES, PIECE=PIECE, **weighed, num_warps=CUT_WARPS,
    )  # fmt: skip
    add_kernel[of_blocks](
        logits, rows.temperature, greatest, cutoffs, sums, logits.stride(0), NUM_BLOCKS=padded, **of_block
    )
    pick_kernel[(R,)](
        logits, rows.temperature, rows.uniform, greatest, ids, is_broken, cutoffs, sums,
        token_ids if slots is None else slots, token_ids, logits.stride(0), num_blocks,
        NUM_BLOCKS=padded, HAS_SLOTS=slots is not None, **of_block,
    )  # fmt: skip
    return token_ids

"""What a step consumes that follows another: tokens which that one sampled, and who has no next one.

One launch in place of fifteen small ones, which took longer than a layer.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.triton.overlap import wait_for_inputs

BLOCK = 128


@triton.jit(do_not_specialize=["T", "R"])
def consumed_kernel(
    sources, token_ids, starts, slots, stop_ids, last_sampled, ids_out, slots_out, last_out, T, R,
    STOPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (tokens and rows of the same numbers)."""
    wait_for_inputs()
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_token, is_row = at < T, at < R
    source = tl.load(sources + at, mask=is_token, other=-1)
    sampled = tl.load(last_sampled + tl.maximum(source, 0), mask=source >= 0, other=0)
    given = tl.load(token_ids + at, mask=is_token, other=0)
    tl.store(ids_out + at, tl.where(source >= 0, tl.maximum(sampled, 0), given), mask=is_token)
    last = tl.load(starts + at + 1, mask=is_row, other=1) - 1
    source = tl.load(sources + last, mask=is_row, other=-1)
    ending = tl.load(last_sampled + tl.maximum(source, 0), mask=source >= 0, other=0)
    stop = tl.arange(0, STOPS)[None, :]
    stops = tl.load(stop_ids + at[:, None] * STOPS + stop, mask=is_row[:, None], other=-1)
    is_stop = tl.max((stops == ending[:, None]).to(tl.int32), axis=1) > 0
    has_ended = (source >= 0) & ((ending < 0) | is_stop)
    slot = tl.load(slots + at, mask=is_row, other=-1)
    tl.store(slots_out + at, tl.where(has_ended, -1, slot), mask=is_row)
    tl.store(last_out + at, last, mask=is_row)


def consumed(
    sources: torch.Tensor,
    token_ids: torch.Tensor,
    starts: torch.Tensor,
    slots: torch.Tensor,
    stop_ids: torch.Tensor,
    last_sampled: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what is consumed `[T]`, in which slots `[R]`, and which tokens are the rows' last `[R]`; all int64.

    A token is `last_sampled[source]`, or `token_ids`' where its source is -1. A row whose last token's source sampled
    nothing (-1), or one of the row's `stop_ids[R, S]` (int32, -1: none; S a power of two), has slot -1. No row is empty
    before the first that is not.
    """
    T, R = len(sources), len(slots)
    outs = torch.empty_like(token_ids), torch.empty_like(slots), torch.empty_like(slots)
    consumed_kernel[(triton.cdiv(max(T, R), BLOCK),)](
        sources, token_ids, starts, slots, stop_ids, last_sampled, *outs, T, R,
        STOPS=stop_ids.shape[1], BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return outs

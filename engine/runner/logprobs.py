"""Log-probabilities as they are reported: of the raw logits, before bias, penalties, temperature and truncation."""

from __future__ import annotations

from collections.abc import Sequence

import torch

import kernels
from engine.messages import TokenLogprobs


def report_logprobs(
    logits: torch.Tensor, token_ids: Sequence[int], nums_top: Sequence[int], forbidden_ids: torch.Tensor
) -> list[TokenLogprobs]:
    """Return what is reported for `token_ids[R]` under `logits[R, V]`, with `nums_top[R]` alternatives each.

    The distribution is over the whole vocabulary; the alternatives leave out `forbidden_ids`, which rise and can never
    be sampled. Where the token is the most likely one its value equals the first alternative's bit for bit, and the
    first alternative is the one greedy sampling takes.
    """
    ids = torch.tensor(token_ids, device=logits.device)
    own, top, top_ids = kernels.logprobs(logits.float(), ids, max(nums_top), forbidden_ids)
    return [
        TokenLogprobs(value, row_ids[:num], row_values[:num])
        for value, row_ids, row_values, num in zip(own.tolist(), top_ids.tolist(), top.tolist(), nums_top, strict=True)
    ]

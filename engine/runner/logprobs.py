"""Log-probabilities as they are reported: of the raw logits, before bias, penalties, temperature and truncation."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.messages import TokenLogprobs


def report_logprobs(
    logits: torch.Tensor, token_ids: Sequence[int], nums_top: Sequence[int], forbidden_ids: torch.Tensor
) -> list[TokenLogprobs]:
    """Return what is reported for `token_ids[R]` under `logits[R, V]`, with `nums_top[R]` alternatives each.

    The distribution is over the whole vocabulary; the alternatives leave out ids that can never be sampled. Where the
    token is the most likely one its value equals the first alternative's bit for bit, and the first alternative is
    the one greedy sampling takes.
    """
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    ids = torch.tensor(token_ids, device=logits.device)
    own = logprobs.gather(1, ids[:, None])[:, 0].tolist()
    if not (k := min(max(nums_top), logits.shape[1])):
        return [TokenLogprobs(value) for value in own]
    logprobs.index_fill_(1, forbidden_ids, -torch.inf)
    values, top_ids = logprobs.topk(k, dim=-1)
    best = logprobs.argmax(dim=-1).tolist()
    return [
        TokenLogprobs(value, _with_first(row_ids[:num], best_id), row_values[:num])
        for value, row_ids, row_values, num, best_id in zip(
            own, top_ids.tolist(), values.tolist(), nums_top, best, strict=True
        )
    ]


def _with_first(ids: list[int], best_id: int) -> list[int]:
    """Return `ids` led by `best_id`: of equal values `topk` may list any first, greedy sampling takes the lowest."""
    if not ids or ids[0] == best_id:
        return ids
    if best_id in ids:
        position = ids.index(best_id)
        ids[0], ids[position] = ids[position], ids[0]
    else:
        ids[0] = best_id
    return ids

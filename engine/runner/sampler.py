"""From logits to token ids, all rows at once. The one place where the meaning of sampling parameters is decided.

The order of the steps, for each row:

1. forbidden ids are out, `logit_bias` is added;
2. repetition penalty, then presence and frequency penalties (`engine.runner.penalties`);
3. temperature 0 takes the most likely token, the lowest id among equals, and ends here;
4. truncation, decided on the distribution at temperature 1, as RWKV does: a token stays if it is among the `top_k`
   most likely, *and* in the smallest set of most likely tokens whose mass exceeds `top_p`, *and* at least `min_p`
   times as likely as the most likely one. Tokens as likely as the last that stays, stay;
5. temperature reshapes what is left, `p ** (1 / T)`;
6. one uniform number picks from the cumulative distribution in the order of token ids.

The number is a hash of (seed, position): sampling keeps no state, so a sequence draws the same tokens whatever runs
beside it and wherever it was interrupted. Reported log-probabilities are not this module's: they are of raw logits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.messages import SamplingParams

_HEAD = 256  # most likely tokens looked at before a whole row is sorted: nearly always enough for top_p
_MASK = (1 << 64) - 1


def sample(logits: torch.Tensor, params: Sequence[SamplingParams], positions: Sequence[int]) -> list[int]:
    """Return a token id for each row of `logits[R, V]` float32, which have been through steps 1 and 2."""
    chosen = logits.argmax(dim=-1)
    rows = [i for i, p in enumerate(params) if p.temperature > 0]
    if rows:
        index = torch.tensor(rows, device=logits.device)
        drawn = _draw(
            logits if len(rows) == len(params) else logits.index_select(0, index),
            [params[i] for i in rows],
            [positions[i] for i in rows],
        )
        chosen.index_copy_(0, index, drawn)
    ids: list[int] = chosen.tolist()
    return ids


def restrict(logits: torch.Tensor, params: Sequence[SamplingParams], forbidden_ids: torch.Tensor) -> None:
    """Apply step 1 to `logits[R, V]` in place."""
    biases = [(row, token_id, bias) for row, p in enumerate(params) for token_id, bias in p.logit_bias.items()]
    if biases:
        rows, ids, values = zip(*biases, strict=True)
        index = (torch.tensor(rows, device=logits.device), torch.tensor(ids, device=logits.device))
        logits.index_put_(index, torch.tensor(values, dtype=logits.dtype, device=logits.device), accumulate=True)
    logits.index_fill_(1, forbidden_ids, -torch.inf)


def uniform(seed: int, position: int) -> float:
    """Return the number in [0, 1) that picks the token at `position`: two rounds of splitmix64 over both."""
    return (_splitmix64(_splitmix64(seed) ^ (position & _MASK)) >> 16) * 2.0**-48


def _splitmix64(value: int) -> int:
    """Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def _draw(logits: torch.Tensor, params: Sequence[SamplingParams], positions: Sequence[int]) -> torch.Tensor:
    """Steps 4 to 6 for rows with a temperature above 0."""
    probs = torch.softmax(logits, dim=-1)
    if any(p.temperature != 1 for p in params):
        # In the log domain, relative to the maximum: no temperature overflows or loses the most likely token.
        temperature = _column([p.temperature for p in params], logits.device)
        weights = ((logits - logits.amax(dim=-1, keepdim=True)) / temperature).exp_()
    else:
        weights = probs
    if any(_truncates_by_rank(p) or p.min_p > 0 for p in params):
        weights = torch.where(probs >= _cutoff(probs, params), weights, 0)
    cumulative = weights.cumsum(dim=-1, dtype=torch.float64)
    numbers = [uniform(p.seed, position) for p, position in zip(params, positions, strict=True)]
    point = _column(numbers, logits.device, torch.float64) * cumulative[:, -1:]
    # The first id whose cumulative weight exceeds the point; an id of weight 0 never does so first.
    return torch.searchsorted(cumulative, point, right=True)[:, 0].clamp_(max=logits.shape[1] - 1)


def _truncates_by_rank(params: SamplingParams) -> bool:
    return params.top_p < 1 or params.top_k > 0


def _cutoff(probs: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """Return the least probability that stays in each row, `[R, 1]`."""
    cutoff = _column([p.min_p for p in params], probs.device) * probs.amax(dim=-1, keepdim=True)
    rows = [i for i, p in enumerate(params) if _truncates_by_rank(p)]
    if rows:
        index = torch.tensor(rows, device=probs.device)
        least = _least_by_rank(probs.index_select(0, index), [params[i] for i in rows])
        cutoff.index_copy_(0, index, torch.maximum(cutoff.index_select(0, index), least))
    return cutoff


def _least_by_rank(probs: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """Return the probability of the last token that `top_k` and `top_p` both keep, `[R, 1]`."""
    least, found = _least_among(probs.topk(min(_HEAD, probs.shape[1]), dim=-1).values, params, probs.shape[1])
    rest = [i for i, is_found in enumerate(found.tolist()) if not is_found]
    if rest:
        index = torch.tensor(rest, device=probs.device)
        ranked = probs.index_select(0, index).sort(dim=-1, descending=True).values
        least.index_copy_(0, index, _least_among(ranked, [params[i] for i in rest], probs.shape[1])[0])
    return least


def _least_among(
    ranked: torch.Tensor, params: Sequence[SamplingParams], vocab_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `_least_by_rank`, looking only at the most likely tokens `ranked[R, K]`; and whether that was enough."""
    last_by_k = torch.tensor([min(p.top_k or vocab_size, vocab_size) - 1 for p in params], device=ranked.device)
    top_p = _column([p.top_p if p.top_p < 1 else torch.inf for p in params], ranked.device, torch.float64)
    last_by_p = (ranked.cumsum(dim=-1, dtype=torch.float64) <= top_p).sum(dim=-1)
    last = torch.minimum(last_by_k, last_by_p)
    return ranked.gather(1, last.clamp(max=ranked.shape[1] - 1)[:, None]), last < ranked.shape[1]


def _column(values: Sequence[float], device: torch.device, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=device)[:, None]

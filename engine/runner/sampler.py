"""From logits to token ids, all rows at once. The one place that says what sampling parameters mean.

The order of the steps, for each row:

1. forbidden ids are out, and so is what the row's grammar does not allow and what would end it before its minimum
   length; `logit_bias` is added;
2. repetition penalty, then presence and frequency penalties (`engine.runner.penalties`);
3. temperature 0 takes the most likely token, the lowest id among equals, and ends here;
4. truncation, decided on the distribution at temperature 1, as RWKV does. First `top_n_sigma`: a token stays if its
   logit is within so many standard deviations of the greatest, over the logits that are left. Then `typical_p`: of
   those, the tokens stay whose surprise is nearest to the expected one, as few as have a mass of `typical_p`;
5. of what is left a token stays if it is among the `top_k` most likely, *and* in the smallest set of most likely tokens
   whose mass exceeds `top_p`, *and* at least `min_p` times as likely as the most likely one. Tokens as likely as the
   last that stays, stay;
6. temperature reshapes what is left, `p ** (1 / T)`;
7. one uniform number picks from the cumulative distribution in the order of token ids.

The number is a hash of (seed, position): sampling keeps no state, so a sequence draws the same tokens whatever runs
beside it and wherever it was interrupted. Reported log-probabilities are not this module's: they are of raw logits.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

import kernels
from engine.messages import SamplingParams
from engine.runner.grammars import Allowed

Words = npt.NDArray[np.uint64]


def sample(logits: torch.Tensor, params: Sequence[SamplingParams], positions: Sequence[int]) -> list[int]:
    """Return a token id for each row of `logits[R, V]` float32, which have been through the steps before this one's.

    A row that is no distribution, having a NaN or plus infinity in it, gives -1.
    """
    ids: list[int] = kernels.sample(logits, rules_of(params, positions)).tolist()
    return ids


def rules_of(params: Sequence[SamplingParams], positions: Sequence[int]) -> torch.Tensor:
    """Return `[R, 5]` float64, all that `kernels.sample` needs to know of rows whose next token is at `positions`."""
    rules = np.empty((len(params), 5))
    rules[:, :4] = [(p.temperature, p.top_k, p.top_p, p.min_p) for p in params]
    rules[:, 4] = 0
    if any([p.temperature > 0 for p in params]):
        seeds = np.array([p.seed for p in params], np.uint64)
        rules[:, 4] = uniforms(hash_seeds(seeds), np.array(positions, np.uint64))
    return torch.from_numpy(rules)


def restrict(
    logits: torch.Tensor,
    params: Sequence[SamplingParams],
    forbidden_ids: torch.Tensor,
    barred: Sequence[Sequence[int]] = (),
    allowed: Sequence[Allowed | None] = (),
) -> None:
    """Apply step 1 to `logits[R, V]` in place; `barred` ids are out in their row, `allowed` is None for all ids."""
    biases = [(row, token_id, bias) for row, p in enumerate(params) for token_id, bias in p.logit_bias.items()]
    biases += [(row, token_id, -torch.inf) for row, ids in enumerate(barred) for token_id in ids]
    if biases:
        rows, ids, values = zip(*biases, strict=True)
        index = (torch.tensor(rows, device=logits.device), torch.tensor(ids, device=logits.device))
        logits.index_put_(index, torch.tensor(values, dtype=logits.dtype, device=logits.device), accumulate=True)
    logits.index_fill_(1, forbidden_ids, -torch.inf)
    if masks := [(row, mask) for row, mask in enumerate(allowed) if mask is not None]:
        where = torch.tensor([row for row, _ in masks], device=logits.device)
        may = torch.from_numpy(np.stack([mask for _, mask in masks])).to(logits.device)
        # Added, not written: a row that is not a number stays one.
        logits.index_add_(0, where, torch.zeros(may.shape, device=logits.device).masked_fill_(~may, -torch.inf))


def truncate(logits: torch.Tensor, params: Sequence[SamplingParams]) -> None:
    """Apply step 4 to `logits[R, V]` in place. Row by row: it is seldom asked for."""
    for row, p in enumerate(params):
        if p.temperature == 0:
            continue  # step 3: the most likely token need not be a typical one
        if p.top_n_sigma > 0:
            _cut_by_sigma(logits[row], p.top_n_sigma)
        if p.typical_p < 1:
            _cut_by_surprise(logits[row], p.typical_p)


def _cut_by_sigma(logits: torch.Tensor, num_sigmas: float) -> None:
    """Tang et al., "Top-n-sigma: not all logits are you need", 2024, equation 2."""
    left = logits[logits > -torch.inf]
    if len(left) > 1:
        logits.masked_fill_(logits < left.max() - num_sigmas * left.std(correction=0), -torch.inf)


def _cut_by_surprise(logits: torch.Tensor, mass: float) -> None:
    """Meister et al., "Locally typical sampling", 2022, section 4."""
    logprobs = torch.log_softmax(logits, dim=-1)
    probs = logprobs.exp()
    expected = -torch.where(probs > 0, probs * logprobs, 0).sum()
    order = torch.argsort((-logprobs - expected).abs(), stable=True)  # what is out is infinitely surprising
    before = probs[order].cumsum(dim=-1, dtype=torch.float64) - probs[order]
    logits[order[before >= mass]] = -torch.inf


def uniforms(hashed_seeds: Words, positions: Words) -> npt.NDArray[np.float64]:
    """Return the number in [0, 1) that picks each row's token: the second of two rounds of splitmix64."""
    return (_splitmix64(hashed_seeds ^ positions) >> np.uint64(16)).astype(np.float64) * np.float64(2.0**-48)


def hash_seeds(seeds: Words) -> Words:
    """Return the first of the two rounds, which does not depend on the position."""
    return _splitmix64(seeds)


def _splitmix64(values: Words) -> Words:
    """Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014. Words of 64 bits wrap around."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))

"""From logits to token ids, all rows at once. The one place that says what sampling parameters mean.

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

import kernels
from engine.messages import SamplingParams

_MASK = (1 << 64) - 1


def sample(logits: torch.Tensor, params: Sequence[SamplingParams], positions: Sequence[int]) -> list[int]:
    """Return a token id for each row of `logits[R, V]` float32, which have been through steps 1 and 2.

    A row that is no distribution, having a NaN or plus infinity in it, gives -1.
    """
    ids: list[int] = kernels.sample(
        logits,
        [p.temperature for p in params],
        [p.top_k for p in params],
        [p.top_p for p in params],
        [p.min_p for p in params],
        [uniform(p.seed, position) for p, position in zip(params, positions, strict=True)],
    ).tolist()
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

"""Greedy decoding of a batch through the recurrent form: enough to look at a model while it is trained."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from training.data import END_OF_TEXT_ID
from training.model import Rwkv7

_PREFILL_TOKENS = 128  # of one window; bounds the memory of a long batch


@torch.no_grad()
def generate_greedy(
    model: Rwkv7, prompts: Sequence[Sequence[int]], max_tokens: int, stop_ids: Sequence[int]
) -> list[list[int]]:
    """Return what follows each prompt at temperature 0, up to a stop id, which is left out, or `max_tokens` ids.

    Prompts of different lengths are filled up on the left; the state is reset where each begins.
    """
    was_training = model.training
    model.eval()
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), END_OF_TEXT_ID)
    resets = torch.zeros(len(prompts), width, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.as_tensor(prompt)
        resets[row, width - len(prompt)] = True
    device = model.emb.weight.device
    ids, resets = ids.to(device), resets.to(device)
    state = None
    for begin in range(0, width, _PREFILL_TOKENS):
        window = slice(begin, begin + _PREFILL_TOKENS)
        x, state = model(ids[:, window], state, resets[:, window])
    answers: list[list[int]] = [[] for _ in prompts]
    open_rows = set(range(len(prompts)))
    for _ in range(max_tokens):
        token: Tensor = model.logits(x[:, -1]).argmax(dim=-1)
        for row, chosen in enumerate(token.tolist()):
            if chosen in stop_ids:
                open_rows.discard(row)
            if row in open_rows:
                answers[row].append(chosen)
        if not open_rows:
            break
        x, state = model(token.unsqueeze(1), state)
    model.train(was_training)
    return answers

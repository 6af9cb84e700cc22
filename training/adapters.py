"""Training a little of a model: initial states (`time_state`), or low-rank additions to its matrices (LoRA).

A tuned state is the cheapest persona there is: a server starts conversations from it as from any state. Its file has
one `blocks.i.att.time_state` [H, N(value), N(key)] a layer, as published state-tuned files do. LoRA is merged to serve.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from training.config import TuneSection
from training.model import Rwkv7


def adapt(model: Rwkv7, tune: TuneSection) -> None:
    """Freeze the model and add what is to be trained."""
    if tune.method == "full":
        return
    model.requires_grad_(False)
    if tune.method == "state":
        for time_mix in model.time_mixes():
            shape = (model.shape.num_heads, model.shape.head_size, model.shape.head_size)
            time_mix.time_state = nn.Parameter(torch.zeros(shape, device=model.emb.weight.device))
    else:
        for linear in _linears(model, tune.targets):
            parametrize.register_parametrization(
                linear, "weight", LowRankAddition(linear.weight, tune.rank, tune.alpha)
            )


def merge(model: Rwkv7) -> None:
    """Make low-rank additions part of the matrices they were added to."""
    for linear in _linears(model, ()):
        if parametrize.is_parametrized(linear, "weight"):
            parametrize.remove_parametrizations(linear, "weight", leave_parametrized=True)


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint must hold: everything that is trained."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def load_trained_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Put trained weights back. Raises `ValueError` if they are not exactly those that are trained."""
    expected = trained_weights(model).keys()
    if expected != weights.keys():
        some = ", ".join(sorted(expected ^ weights.keys())[:5])
        raise ValueError(f"the checkpoint is of a different model or a different way of tuning: {some}")
    model.load_state_dict(weights, strict=False)


class LowRankAddition(nn.Module):
    """`W + alpha / rank * B A`; B starts at zero."""

    def __init__(self, weight: Tensor, rank: int, alpha: float) -> None:
        super().__init__()
        outputs, inputs = weight.shape
        self.lora_A = nn.Parameter(torch.empty(rank, inputs, device=weight.device))
        self.lora_B = nn.Parameter(torch.zeros(outputs, rank, device=weight.device))
        self.scale = alpha / rank
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        """The matrix with the addition."""
        return weight + self.scale * (self.lora_B @ self.lora_A)


def _linears(model: Rwkv7, targets: Sequence[str]) -> list[nn.Linear]:
    """The projections of every layer with these names (`receptance`, `ffn.key`, ...), or all of them."""
    return [
        module
        for name, module in model.blocks.named_modules()
        if isinstance(module, nn.Linear) and (not targets or name.endswith(tuple(f".{target}" for target in targets)))
    ]

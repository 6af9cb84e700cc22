"""AdamW with the groups of the RWKV-7 recipe."""

from __future__ import annotations

import torch
from torch import nn

from training.config import OptimizerSection


def make_optimizer(model: nn.Module, optimizer: OptimizerSection) -> torch.optim.AdamW:
    """Return AdamW over the parameters that are to be trained.

    Weight decay only for matrices named `weight` (embedding, head, projections), never for mixing coefficients,
    low-rank pairs or norms. The decay's bias `w0` moves at twice the rate: a group's `lr_scale` multiplies the
    schedule.
    """
    groups: dict[str, list[nn.Parameter]] = {"decayed": [], "fast": [], "plain": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[_group(name, parameter)].append(parameter)
    settings = [
        {"params": groups["decayed"], "weight_decay": optimizer.weight_decay, "lr_scale": 1.0},
        {"params": groups["fast"], "weight_decay": 0.0, "lr_scale": 2.0},
        {"params": groups["plain"], "weight_decay": 0.0, "lr_scale": 1.0},
    ]
    return torch.optim.AdamW(
        [group for group in settings if group["params"]],
        lr=optimizer.peak_lr,
        betas=optimizer.betas,
        eps=optimizer.eps,
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set every group's rate for the next step."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]


def _group(name: str, parameter: nn.Parameter) -> str:
    if name.endswith("att.w0"):
        return "fast"
    return "decayed" if name.endswith(".weight") and parameter.dim() == 2 else "plain"

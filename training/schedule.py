"""The learning rate of a step."""

from __future__ import annotations

import math

from training.config import OptimizerSection

_FIRST_SHARE = 0.01  # of the peak, in the first step of the warm-up


def learning_rate(step: int, num_steps: int, optimizer: OptimizerSection) -> float:
    """The rate of optimizer step `step`, counted from 0. Past the end it stays what it was at the end."""
    peak, final = optimizer.peak_lr, optimizer.final_lr
    if step < optimizer.warmup_steps:
        return peak * (_FIRST_SHARE + (1 - _FIRST_SHARE) * step / optimizer.warmup_steps)
    match optimizer.schedule:
        case "constant":
            return peak
        case "cosine":
            progress = _progress(step, optimizer.warmup_steps, num_steps)
            return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * progress))
        case "wsd":
            return peak + (final - peak) * _progress(step, num_steps - optimizer.decay_steps, num_steps)


def _progress(step: int, begin: int, end: int) -> float:
    """How far `step` is between the two, from 0 to 1; the last step before `end` is 1."""
    return min(1.0, max(0.0, (step - begin) / max(1, end - 1 - begin)))

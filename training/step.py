"""One update of the parameters: rows in, loss and gradient norm out.

The loss is the weighted mean over *all* tokens of the step that count, however the step's rows were cut among
processes and micro-batches, so accumulating and adding processes change the speed and nothing else.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from training.config import RunSection, TrainConfig
from training.data import Batch
from training.model import Rwkv7, TrainingState
from training.processes import ALONE, Processes
from training.sharding import whole


class LanguageModelLoss(nn.Module):
    """The share that some rows have in a step's loss."""

    def __init__(self, model: Rwkv7, logit_penalty: float) -> None:
        super().__init__()
        self.model, self.logit_penalty = model, logit_penalty

    def forward(
        self, batch: Batch, total_weight: float, state: TrainingState | None = None
    ) -> tuple[Tensor, Tensor, TrainingState]:
        """What to follow downhill, the part of the mean loss that these rows make up, and the state after them.

        The first has L2Wrap added: the squares of the largest logits, which keeps them from drifting. As a term of the
        loss it scales with everything else.
        """
        x, state = self.model(batch.inputs, state, batch.resets)
        counts = batch.weights > 0
        logits = self.model.logits(x[counts]).float()
        losses = cross_entropy(logits, batch.targets[counts], reduction="none")
        loss = (losses * batch.weights[counts]).sum() / total_weight
        penalty = 0.5 * self.logit_penalty * logits.amax(dim=-1).square().sum() / total_weight
        return loss + penalty, loss.detach(), state


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one update found."""

    loss: float  # mean over the step's tokens
    grad_norm: float  # before clipping; not finite if the update was skipped
    state: TrainingState  # of this process's rows, after them


def take_step(
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    batch: Batch,
    config: TrainConfig,
    processes: Processes = ALONE,
    carried: TrainingState | None = None,
) -> StepResult:
    """Update the parameters once. `carried` is the state that this process's rows begin with, zero when None.

    A gradient that is not finite changes nothing: neither parameters nor moments.
    """
    total_weight = max(float(batch.weights.sum()), 1.0)
    micro_batches = list(_cut(batch, processes, config.run.accumulate))
    states: list[TrainingState | None] = [None] * len(micro_batches)
    if carried is not None:
        states = list(carried.split(micro_batches[0].inputs.shape[0]))
    optimizer.zero_grad(set_to_none=True)
    loss = torch.zeros((), device=config.run.device)
    after = []
    for index, (rows, state) in enumerate(zip(micro_batches, states, strict=True)):
        with contextlib.ExitStack() as stack:
            is_last = index + 1 == len(micro_batches)
            if isinstance(objective, FSDPModule):
                objective.set_requires_gradient_sync(is_last)
            elif isinstance(objective, DistributedDataParallel) and not is_last:
                stack.enter_context(objective.no_sync())
            with _autocast(config.run):
                descent, part, state = objective(rows.to(torch.device(config.run.device)), total_weight, state)
            # Processes' gradients are averaged, but their shares of the loss are to be added.
            scaler.scale(descent * processes.count).backward()
        loss += part
        after.append(state.detach())
    if processes.count > 1:
        distributed.all_reduce(loss)
    scaler.unscale_(optimizer)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = whole(nn.utils.clip_grad_norm_(parameters, config.optimizer.max_grad_norm))
    if scaler.is_enabled():
        scaler.step(optimizer)  # skips by itself
        scaler.update()
    elif norm.isfinite():
        optimizer.step()
    return StepResult(float(loss), float(norm), TrainingState.join(after))


def _cut(batch: Batch, processes: Processes, accumulate: int) -> Iterator[Batch]:
    """The micro-batches of one process."""
    rows, parts = batch.inputs.shape[0], processes.count * accumulate
    if rows % parts:
        raise ValueError(
            f"{rows} rows a step cannot be cut into {processes.count} processes x {accumulate} accumulations"
        )
    size = rows // parts
    for index in range(processes.rank * accumulate, (processes.rank + 1) * accumulate):
        yield batch.slice(slice(index * size, (index + 1) * size))


def _autocast(run: RunSection) -> torch.autocast:
    dtype = torch.float16 if run.precision == "float16" else torch.bfloat16
    return torch.autocast(torch.device(run.device).type, dtype=dtype, enabled=run.precision != "float32")

"""Parameters, gradients and moments shared out among processes (FSDP2), and brought together where they must be whole.

Each block is gathered when it runs and let go of afterwards. Files never show it: what is saved is whole, so a run may
go on with another number of processes, or without sharding.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(objective: nn.Module, blocks: Iterable[nn.Module], optimizer: torch.optim.Optimizer, device: str) -> None:
    """Share out `objective`, block by block, and what `optimizer` knows of its parameters, among all processes.

    Every process must hold the same values before.
    """
    # Blocks return views, which would be a danger to whoever changed them in place; nobody here does.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(torch.device(device).type, (distributed.get_world_size(),))
    names: dict[Tensor, str] = {parameter: name for name, parameter in objective.named_parameters()}
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(objective, mesh=mesh)
    shards = dict(objective.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [shards[names[parameter]] for parameter in group["params"]]
    moments = {shards[names[parameter]]: slots for parameter, slots in optimizer.state.items()}
    optimizer.state = defaultdict(
        dict,
        {
            parameter: {key: _shared_out(value, parameter) for key, value in slots.items()}
            for parameter, slots in moments.items()
        },
    )


@contextmanager
def unsharded(objective: nn.Module) -> Iterator[None]:
    """Give every process whole parameters meanwhile; does nothing to a module that is not sharded.

    All processes must enter together. What is changed inside is lost.
    """
    modules = [module for module in objective.modules() if isinstance(module, FSDPModule)]
    for module in modules:
        module.unshard()
    try:
        yield
    finally:
        for module in modules:
            module.reshard()


def whole_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's `state_dict` with whole tensors. All processes must ask together."""
    state = optimizer.state_dict()
    slots = {index: {key: whole(value) for key, value in slots.items()} for index, slots in state["state"].items()}
    return {"state": slots, "param_groups": state["param_groups"]}


def whole(tensor: Tensor) -> Tensor:
    """The tensor of which `tensor` may be a shard. All processes must ask together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _shared_out(value: Tensor, parameter: Tensor) -> Tensor:
    """The share of a moment that belongs to a share of a parameter; a counter of steps is everyone's."""
    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    return distribute_tensor(value, parameter.device_mesh, parameter.placements)

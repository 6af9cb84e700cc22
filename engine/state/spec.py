"""The shape of a model's recurrent state, and one such state outside the pool."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch

from engine.messages import CheckpointRef, StateSource


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a state, without the slot dimension."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Size of the tensor's data."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


@dataclass(frozen=True, slots=True)
class StateSpec:
    """What a state of one model is made of. Two states fit each other only if their specs are equal."""

    fingerprint: str  # of the weights that produced it, hex
    generation: str  # "7"
    layout: str  # orientation of the matrices, e.g. "value_key"
    tensors: tuple[TensorSpec, ...]

    @property
    def num_bytes(self) -> int:
        """Size of one state."""
        return sum(tensor.num_bytes for tensor in self.tensors)


class Arrival(Protocol):
    """When a state is in host memory, whose copy was only asked for. May be waited for in any thread."""

    def wait(self) -> None:
        """Return when it is there; raises if it never will be."""
        ...

    def wait_on_device(self) -> None:
        """Let the device, and not the caller, wait before it does what it is asked for from now on."""
        ...


@dataclass(frozen=True, slots=True)
class RecurrentState:
    """The state that has consumed exactly the `num_tokens` tokens behind `chain`.

    Lives in host memory and never changes once it has arrived there.
    """

    num_tokens: int
    chain: bytes
    tensors: dict[str, torch.Tensor]  # read them after `wait`
    arrival: Arrival | None = field(default=None, compare=False)  # None: they are there

    def wait(self) -> None:
        """Return when the tensors may be read."""
        if self.arrival is not None:
            self.arrival.wait()

    @property
    def num_bytes(self) -> int:
        """Size of the tensors' data."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def is_finite(self) -> bool:
        """Whether all of it are numbers: no model makes anything else."""
        self.wait()
        return all(bool(torch.isfinite(tensor).all()) for tensor in self.tensors.values())

    def matches(self, wanted: StateSource | CheckpointRef) -> bool:
        """Say whether this is the state that `wanted` names."""
        return (self.num_tokens, self.chain) == (wanted.num_tokens, wanted.chain)

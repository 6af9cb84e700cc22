"""The device's memory for states: numbered slots in one preallocated tensor. Knows nothing of who owns a slot."""

from __future__ import annotations

import torch

from engine.state.spec import RecurrentState, StateSpec
from engine.state.transfers import Transfers, transfers_of

_ALIGNMENT = 4  # bytes: of a tensor of float32 behind one of float16


class StatePool:
    """States on a device, slot-major: one state is one contiguous row, so saving one is one copy.

    The last slot is `scratch_slot`: it takes what padding rows write, and its content means nothing. All others belong
    to the scheduler. Used from the engine's one thread.
    """

    def __init__(
        self, spec: StateSpec, num_slots: int, device: torch.device, transfers: Transfers | None = None
    ) -> None:
        if any(tensor.num_bytes % _ALIGNMENT for tensor in spec.tensors):
            raise ValueError(f"the pool keeps tensors of whole {_ALIGNMENT} bytes, side by side")
        self.spec = spec
        self._transfers = transfers or transfers_of(device)
        self.num_slots = num_slots
        self.scratch_slot = num_slots - 1
        self._data = torch.zeros(num_slots, spec.num_bytes, dtype=torch.uint8, device=device)  # [S, P]
        views = split_state(self._data, spec)
        self.wkv = views["wkv"]  # [S, L, H, N(value), N(key)]
        self.shift = views["shift"]  # [S, L, 2, C]; 0: before time mixing, 1: before channel mixing

    def clear(self, slot: int) -> None:
        """Give the slot the zero state: nothing consumed yet."""
        self._data[slot].zero_()

    def load(self, slot: int, state: RecurrentState) -> None:
        """Give the slot a state that lies in host memory, or will; raises `ValueError` if it does not fit."""
        expected = {tensor.name: (torch.Size(tensor.shape), tensor.dtype) for tensor in self.spec.tensors}
        if {name: (tensor.shape, tensor.dtype) for name, tensor in state.tensors.items()} != expected:
            raise ValueError("the state's tensors are not those of this pool")
        if state.arrival is not None:
            state.arrival.wait_on_device()
        for name, view in split_state(self._data[slot], self.spec).items():
            view.copy_(state.tensors[name], non_blocking=True)

    def copy(self, source: int, target: int) -> None:
        """Make `target` equal to `source`, on the device."""
        self._data[target].copy_(self._data[source])

    def save(self, slot: int, num_tokens: int, chain: bytes) -> RecurrentState:
        """Return a copy of the slot's state, on its way to host memory; the slot may be reused at once."""
        row, arrival = self._transfers.to_host(self._data[slot])
        return RecurrentState(num_tokens, chain, split_state(row, self.spec), arrival)


def split_state(data: torch.Tensor, spec: StateSpec) -> dict[str, torch.Tensor]:
    """Return views `[..., *shape]` of the bytes `data[..., P]`, in the order of the spec's tensors."""
    parts = torch.split(data, [tensor.num_bytes for tensor in spec.tensors], dim=-1)
    return {
        tensor.name: part.view(tensor.dtype).view(*part.shape[:-1], *tensor.shape)
        for tensor, part in zip(spec.tensors, parts, strict=True)
    }

"""A slot's state on its way to host memory: the device goes on meanwhile, and nobody waits but who reads it."""

from __future__ import annotations

from typing import Protocol

import torch

from engine.state.spec import Arrival


class Transfers(Protocol):
    """Copies from a device to host memory."""

    def to_host(self, data: torch.Tensor) -> tuple[torch.Tensor, Arrival | None]:
        """Return a copy of `data` as it is when the device comes to this, and when it may be read (None: now)."""
        ...


def transfers_of(device: torch.device) -> Transfers:
    """Return how `device` copies."""
    return CudaTransfers(device) if device.type == "cuda" else AtOnce()


class AtOnce:
    """Implements `Transfers` where the copy is made by the thread that asks for it."""

    def to_host(self, data: torch.Tensor) -> tuple[torch.Tensor, Arrival | None]:
        """Copy."""
        return data.to("cpu", copy=True), None


class CudaTransfers:
    """Implements `Transfers` with a copy on the device, in the order of its work, and one to pinned memory beside it.

    Pinned memory is kept and used again by PyTorch's allocator; only what was never there before costs time.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def to_host(self, data: torch.Tensor) -> tuple[torch.Tensor, Arrival | None]:
        """Have it copied."""
        staged = data.clone()
        host = torch.empty(data.shape, dtype=data.dtype, pin_memory=True)
        self._stream.wait_stream(torch.cuda.current_stream(data.device))
        with torch.cuda.stream(self._stream):
            host.copy_(staged, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        staged.record_stream(self._stream)  # its memory is not used again before it was copied
        return host, _CudaArrival(event, data.device)


class _CudaArrival:
    def __init__(self, event: torch.cuda.Event, device: torch.device) -> None:
        self._event = event
        self._device = device

    def wait(self) -> None:
        self._event.synchronize()

    def wait_on_device(self) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._event)

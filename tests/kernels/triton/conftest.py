"""The Triton kernels on a card where there is one, else in Triton's interpreter: indexing, masks, slots and maths.

The interpreter proves nothing about races, shared memory, the rounding of tensor cores, or speed.
"""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
import torch

import kernels

if TYPE_CHECKING:
    from kernels.rwkv7 import Weights
    from kernels.triton.fused import FusedRwkv7

HAS_CARD = torch.cuda.is_available()

if not HAS_CARD:
    os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are defined, so before anything imports them


@pytest.fixture
def device() -> torch.device:
    """Where the kernels run."""
    return torch.device("cuda" if HAS_CARD else "cpu")


@pytest.fixture
def random() -> torch.Generator:
    """Numbers that are the same in every run."""
    return torch.Generator().manual_seed(7)


@pytest.fixture
def ordered_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the interpreter's products sum along K in order: BLAS chooses an order by the shape, tensor cores do not.

    What is left to differ is the kernels' own: which K a program sums, and how spans are added.
    """
    if not HAS_CARD:
        from triton.runtime import interpreter

        def in_order(self, a, b, d, input_precision, max_num_imprecise_acc):  # type: ignore[no-untyped-def]
            total = d.data.copy()
            for k in range(a.data.shape[1]):
                total += a.data[:, k : k + 1].astype(total.dtype) * b.data[k : k + 1, :].astype(total.dtype)
            return interpreter.TensorHandle(total, d.dtype.scalar)

        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", in_order)


@pytest.fixture
def on_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `kernels` call these operators on tensors of any device, as the dispatcher lets it on CUDA; none is fused."""
    operators = pytest.importorskip("kernels.triton.operators")
    ours = {name: SimpleNamespace(default=getattr(operators, name)) for name in kernels.triton_operators.NAMES}
    monkeypatch.setattr(kernels, "_ops", SimpleNamespace(relu_squared=kernels._ops.relu_squared, **ours))
    monkeypatch.setattr(kernels.cpu, "fuse_rwkv7", lambda _: None)
    monkeypatch.setattr(kernels.triton_operators, "fuse_rwkv7", lambda *_: None)


@pytest.fixture
def fused_on_triton(on_triton: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `on_triton`, but models are fused, as they are on CUDA; who loads one that cannot be learns it here."""
    fused = pytest.importorskip("kernels.triton.fused")

    def fuse(weights: Weights, dtype: torch.dtype) -> FusedRwkv7:
        assert fused.can_fuse(weights, dtype)
        model: FusedRwkv7 = fused.FusedRwkv7(weights, dtype)
        return model

    monkeypatch.setattr(kernels.triton_operators, "fuse_rwkv7", fuse)

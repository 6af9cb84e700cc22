"""The Triton kernels on a card where there is one, else in Triton's interpreter: indexing, masks, slots and maths.

The interpreter proves nothing about races, shared memory, the rounding of tensor cores, or speed.
"""

from __future__ import annotations

import os

import pytest
import torch

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

"""The identity of weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine.weights.fingerprint import fingerprint
from engine.weights.open import open_weights
from engine.weights.synthetic import save_weights

Tensors = dict[str, torch.Tensor]


def tensors() -> Tensors:
    """Return two tensors, always the same."""
    return {"a": torch.arange(12.0).view(3, 4), "b": torch.ones(5, dtype=torch.bfloat16)}


def test_file_format_and_order_do_not_matter(tmp_path: Path) -> None:
    """The same tensors have one fingerprint, from memory, .pth or .safetensors, in any order."""
    found = {fingerprint(tensors()), fingerprint(dict(reversed(tensors().items())))}
    for suffix in (".pth", ".safetensors"):
        save_weights(tmp_path / f"model{suffix}", tensors())
        found.add(fingerprint(open_weights(tmp_path / f"model{suffix}")))
    assert len(found) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t | {"a": t["a"].view(4, 3)},
        lambda t: t | {"a": t["a"].view(torch.int32)},
        lambda t: t | {"a": torch.nextafter(t["a"], torch.tensor(9.0))},
        lambda t: {"a": t["a"], "c": t["b"]},
        lambda t: {"a": t["a"]},
        lambda t: t | {"a": t["a"].t().contiguous().t() + 0 * t["a"], "b": -t["b"]},
    ],
    ids=["shape", "dtype", "one bit", "name", "fewer", "sign"],
)
def test_any_difference_changes_it(change: Callable[[Tensors], Tensors]) -> None:
    """Names, shapes, dtypes and data all count."""
    assert fingerprint(change(tensors())) != fingerprint(tensors())


def test_memory_layout_does_not_matter() -> None:
    """A transposed view with the same values is the same tensor."""
    changed = tensors()
    changed["a"] = changed["a"].t().contiguous().t()
    assert not changed["a"].is_contiguous()
    assert fingerprint(changed) == fingerprint(tensors())

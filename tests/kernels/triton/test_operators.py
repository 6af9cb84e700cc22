"""A whole model on the Triton operators, and how they are chosen."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine.models.load import load_model
from engine.runner.cuda_graphs import can_record
from engine.runner.input_batch import InputBatch
from engine.state.pool import StatePool
from engine.weights.open import open_weights
from engine.weights.synthetic import SyntheticShape, save_synthetic
from tests.conftest import ROOT
from tests.parity.float64_model import reference_run

pytest.importorskip("triton", reason="Triton is not installed: pip install sostenuto[cuda]")

V = 50


@pytest.mark.parametrize("loaded", ["on_triton", "fused_on_triton"])
def test_a_model_equals_the_formulas(
    tmp_path: Path, device: torch.device, request: pytest.FixtureRequest, loaded: str
) -> None:
    """A prompt, a decode beside a padding row: logits and states against float64, in float32."""
    request.getfixturevalue(loaded)
    shape = SyntheticShape(num_layers=2, width=32, head_size=16, vocab_size=V, value_rank=16, gate_rank=32)
    path = save_synthetic(tmp_path / "m.safetensors", shape, seed=3, dtype=torch.float32)
    token_ids = torch.randint(V, (21,), generator=torch.Generator().manual_seed(1)).tolist()
    expected, state = reference_run(open_weights(path), token_ids)
    model = load_model(path, device, "float32")
    pool = StatePool(model.config.state_spec, 4, device)
    logits = []
    for ids, slots, starts in [(token_ids[:20], [2], [0, 20]), ([token_ids[20], 0], [2, -1], [0, 1, 2])]:
        batch = InputBatch(*(torch.tensor(x, device=device) for x in (ids, slots, starts, list(range(len(ids))))))
        logits.append(model.logits(model.forward(batch, pool)).cpu())
    result = torch.cat([logits[0], logits[1][:1]]).double()
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pool.wkv[2].double().cpu(), state["wkv"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pool.shift[2].double().cpu(), state["shift"], rtol=1e-4, atol=1e-5)
    assert not pool.wkv[[0, 1, 3]].any()


@pytest.mark.parametrize("is_installed", [True, False], ids=["with Triton", "without"])
def test_cuda_gets_these_operators_where_triton_is(is_installed: bool) -> None:
    """Chosen without a card; without Triton PyTorch's stay, and a warning says so. In a process of its own."""
    code = f"""
import sys
if not {is_installed}:
    import importlib.util
    find_spec = importlib.util.find_spec
    importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find_spec(name, *rest)
import torch, kernels
assert "triton" not in sys.modules
print(kernels.select_backend(torch.device("cuda")))
print(*(torch._C._dispatch_has_kernel_for_dispatch_key("sostenuto::" + name, "CUDA") for name in ("wkv7", "sample")))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == (["Triton", "True", "True"] if is_installed else ["PyTorch", "False", "False"])
    assert ("Triton is not installed" in done.stderr) != is_installed


def test_only_models_whose_padding_is_known_are_recorded(tmp_path: Path, device: torch.device) -> None:
    """Heads of a size that the kernels leave to PyTorch, which has no padding rows, are not."""
    for head_size, is_recorded in ((16, True), (8, False)):
        shape = SyntheticShape(num_layers=2, width=32, head_size=head_size, vocab_size=V)
        path = save_synthetic(tmp_path / f"{head_size}.safetensors", shape, seed=3, dtype=torch.float32)
        assert can_record(load_model(path, device, "float32").config) == is_recorded

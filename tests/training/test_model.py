from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from training.model import ModelShape, Rwkv7, TrainingState

SHAPE = ModelShape(vocab_size=50, width=32, num_layers=3, head_size=16)


@pytest.fixture
def model() -> Rwkv7:
    """A model whose every parameter matters: what starts at zero is set at random."""
    torch.manual_seed(0)
    model = Rwkv7(SHAPE)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.fixture
def ids() -> Tensor:
    """Two rows of 70 ids."""
    return torch.randint(0, 50, (2, 70), generator=torch.Generator().manual_seed(1))


def test_published_logits(shared_dir: Path) -> None:
    """A published checkpoint loads by its official names and gives its published logits to 2e-6."""
    weights = torch.load(shared_dir / "models/tiny-rwkv-7v0.pth", weights_only=True)
    shape = ModelShape(vocab_size=256, width=64, num_layers=12, head_size=64)
    model = Rwkv7(shape)
    own = model.state_dict()
    low_rank = {name for name in own if name[-2:] in ("w1", "w2", "a1", "a2", "v1", "v2", "g1", "g2")}
    assert own.keys() == weights.keys()
    for name in low_rank:  # its ranks are other than the recipe's
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, torch.nn.Parameter(torch.empty_like(weights[name].float())))
    model.load_state_dict({name: weights[name].float().view(model.state_dict()[name].shape) for name in own})
    expected = np.load(shared_dir / "models/tiny-rwkv-7v0.expected-logits.npy").ravel()
    x, _ = model.eval()(torch.tensor([list(b'"in')]))
    logits = model.logits(x)[0, -1].detach().numpy()
    assert np.abs(logits - expected).max() < 2e-6


@pytest.mark.parametrize("sizes", [[1] * 70, [1, 40, 29], [33, 37]])
def test_recurrent_form_is_parallel_form(model: Rwkv7, ids: Tensor, sizes: list[int]) -> None:
    """Token by token, or in any pieces, with the state carried, gives what the whole sequence gives."""
    whole, end = model(ids)
    state: TrainingState | None = None
    pieces = []
    for piece in ids.split(sizes, dim=1):
        x, state = model(piece, state)
        pieces.append(x)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=2e-5, rtol=1e-4)
    assert state is not None
    torch.testing.assert_close(state.wkv, end.wkv, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(state.shift, end.shift, atol=2e-5, rtol=1e-4)


def test_rows_do_not_see_each_other(model: Rwkv7, ids: Tensor) -> None:
    """A row in a batch of two gives what it gives alone, one token at a time too."""
    for piece in (ids, ids[:, :1]):
        together, _ = model(piece)
        alone, _ = model(piece[1:])
        torch.testing.assert_close(together[1:], alone, atol=1e-5, rtol=1e-5)


def test_information_flows_forward_only(model: Rwkv7, ids: Tensor) -> None:
    """A changed token changes every later output and no earlier one."""
    changed = ids.clone()
    changed[:, 30] = (changed[:, 30] + 1) % 50
    difference = (model(ids)[0] - model(changed)[0]).abs().amax(dim=2)
    assert difference[:, :30].max() == 0
    assert difference[:, 30:].min() > 0


def test_a_reset_is_a_fresh_start(model: Rwkv7, ids: Tensor) -> None:
    """A document inside a row gives what it gives in a row of its own."""
    resets = torch.zeros_like(ids, dtype=torch.bool)
    resets[:, [0, 45]] = True
    inside, _ = model(ids, model.initial_state(2), resets)
    alone, _ = model(ids[:, 45:])
    torch.testing.assert_close(inside[:, 45:], alone, atol=1e-5, rtol=1e-5)


def test_recomputing_changes_no_gradient(ids: Tensor) -> None:
    """Gradient checkpointing gives the same gradients."""
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = Rwkv7(SHAPE, recompute=recompute).train()
        x, _ = model(ids)
        model.logits(x).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert one is not None
        torch.testing.assert_close(one, other)


def test_recipe_of_the_initialisation() -> None:
    """Residual branches and first low-rank halves start at zero, mixing lies in [0, 1], the norm's eps is 64e-5."""
    model = Rwkv7(ModelShape(vocab_size=512, width=256, num_layers=6))
    weights = model.state_dict()
    for name, tensor in weights.items():
        if name.endswith(("att.output.weight", "ffn.value.weight", "w1", "a1", "v1", "g1")):
            assert tensor.abs().max() == 0, name
        if ".x_" in name:
            assert 0 <= tensor.min() <= tensor.max() <= 1, name
    assert "blocks.0.att.v1" not in weights
    assert weights["blocks.1.att.w1"].shape == (256, 32)
    assert weights["blocks.1.att.g1"].shape == (256, 64)
    assert weights["emb.weight"].abs().max() <= 1e-4
    assert model.blocks[0].att.ln_x.eps == pytest.approx(64e-5)
    torch.testing.assert_close(weights["blocks.5.att.ln_x.weight"], torch.ones(256))
    # Receptance is orthogonal.
    receptance = weights["blocks.2.att.receptance.weight"]
    torch.testing.assert_close(receptance @ receptance.T, torch.eye(256), atol=1e-4, rtol=0)


def test_one_layer_is_enough() -> None:
    """A model of a single layer can be made: no division by the number of layers minus one."""
    x, _ = Rwkv7(ModelShape(vocab_size=8, width=16, num_layers=1, head_size=16))(torch.zeros(1, 3, dtype=torch.long))
    assert x.isfinite().all()


def test_width_that_heads_do_not_fill_is_refused() -> None:
    """The error names both numbers."""
    with pytest.raises(ValueError, match="width 100 is not a multiple of the head size 64"):
        ModelShape(vocab_size=8, width=100, num_layers=1)

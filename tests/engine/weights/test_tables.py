"""Weights checked against the table of their generation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.errors import ModelFileError
from engine.weights.open import open_weights
from engine.weights.synthetic import SyntheticShape, synthetic_weights
from engine.weights.tables import check_weights

SHAPE = SyntheticShape(num_layers=2, width=32, head_size=8, vocab_size=50, decay_rank=5, rate_rank=6, gate_rank=7)
CPU = torch.device("cpu")


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    """A sound model, for a test to break."""
    return synthetic_weights(SHAPE)


def problems_of(weights: dict[str, torch.Tensor]) -> tuple[str, ...]:
    """Return what is wrong with `weights`."""
    with pytest.raises(ModelFileError) as caught:
        check_weights("model.pth", weights)
    return caught.value.problems


def test_every_dimension_is_inferred(weights: dict[str, torch.Tensor]) -> None:
    """Width, heads, head size, vocabulary and feed-forward width follow from the shapes alone."""
    checked = check_weights("model.pth", weights)
    assert (checked.generation, checked.num_layers) == ("7", 2)
    assert checked.dimensions == {"V": 50, "C": 32, "H": 4, "N": 8, "F": 128}


def test_low_rank_widths_may_differ_between_layers(weights: dict[str, torch.Tensor]) -> None:
    """Each layer's low-rank widths are inferred by themselves."""
    weights["blocks.1.att.w1"] = torch.ones(32, 9)
    weights["blocks.1.att.w2"] = torch.ones(9, 32)
    assert check_weights("model.pth", weights).tensors["blocks.1.att.w1"].shape == (32, 9)


def test_unused_tensors_of_the_first_layer_may_be_there_or_not(weights: dict[str, torch.Tensor]) -> None:
    """Official files carry v0, v1 and v2 in layer 0, others don't: both load, and the tensors are left out."""
    without = check_weights("model.pth", weights)
    for name, shape in (("v0", (1, 1, 32)), ("v1", (32, 8)), ("v2", (8, 32))):
        weights[f"blocks.0.att.{name}"] = torch.ones(shape)
    assert check_weights("model.pth", weights).tensors.keys() == without.tensors.keys()


def test_vectors_may_be_flat(weights: dict[str, torch.Tensor]) -> None:
    """`[C]` is as good as the official `[1, 1, C]`."""
    weights["blocks.0.att.x_r"] = weights["blocks.0.att.x_r"].view(32)
    assert check_weights("model.pth", weights).tensors["blocks.0.att.x_r"].shape == (32,)


def test_all_problems_are_reported_at_once(weights: dict[str, torch.Tensor]) -> None:
    """Missing, unexpected, misshapen, wrongly typed and not finite: one error names each tensor."""
    del weights["ln_out.bias"]
    weights["blocks.1.att.surprise"] = torch.ones(1)
    weights["blocks.0.att.key.weight"] = torch.ones(32, 31)
    weights["blocks.1.ffn.x_k"] = torch.ones(1, 1, 32, dtype=torch.int8)
    weights["emb.weight"] = torch.full((50, 32), torch.nan)
    problems = problems_of(weights)
    assert len(problems) == 5
    for name in (
        "ln_out.bias: missing",
        "blocks.1.att.surprise: not part",
        "blocks.0.att.key.weight: shape (32, 31), expected [C C] = (32, 32)",
        "blocks.1.ffn.x_k: dtype torch.int8",
        "emb.weight: holds NaN",
    ):
        assert any(problem.startswith(name) for problem in problems), name


def test_a_misshapen_tensor_is_blamed_and_not_its_neighbours(weights: dict[str, torch.Tensor]) -> None:
    """Even the first tensor of the table does not dictate a dimension on which all others disagree."""
    weights["emb.weight"] = torch.ones(50, 40)
    assert problems_of(weights) == ("emb.weight: shape (50, 40), expected [V C] = (50, 32)",)


def test_an_absent_layer_is_reported_tensor_by_tensor(weights: dict[str, torch.Tensor]) -> None:
    """The number of layers is the highest index; a gap below it is missing tensors."""
    problems = problems_of({name: tensor for name, tensor in weights.items() if not name.startswith("blocks.1.")} | {
        "blocks.2.ffn.x_k": torch.ones(32)
    })  # fmt: skip
    assert any(problem.startswith("blocks.1.ffn.key.weight: missing") for problem in problems)
    assert any(problem.startswith("blocks.2.ffn.key.weight: missing") for problem in problems)


def test_heads_must_fill_the_width(weights: dict[str, torch.Tensor]) -> None:
    """Heads times head size is the width in every RWKV-7 model."""
    for layer in range(2):
        weights[f"blocks.{layer}.att.r_k"] = torch.ones(3, 8)
    assert problems_of(weights) == ("width 32 is not heads x head size = 3 x 8",)


@pytest.mark.parametrize(
    ("sign", "word"),
    [
        ("_strategy", "original .pth"),
        ("blocks.0.ffn.enn.weight", "RWKV-8"),
        ("blocks.0.qkv.qq.weight", "RWKV-7b"),
        ("blocks.0.ffn.s_emb.weight", "RWKV-7a"),
        ("model.layers.0.attn.r_k", "Hugging Face"),
    ],
)
def test_other_kinds_of_model_are_named(weights: dict[str, torch.Tensor], sign: str, word: str) -> None:
    """A file with the sign of another kind is refused with its name, whatever else it holds."""
    assert word in " ".join(problems_of(weights | {sign: torch.ones(1)}))


@pytest.mark.parametrize("generation", ["4", "5", "6"])
def test_earlier_generations_are_named(shared_dir: Path, generation: str) -> None:
    """Real files of generations 4, 5 and 6 are recognised and refused."""
    (file,) = (shared_dir / "models").glob(f"tiny-rwkv-{generation}v{'2' if generation == '5' else '0'}.pth")
    assert f"RWKV-{generation}" in " ".join(problems_of(open_weights(file)))


def test_a_file_of_something_else_is_refused() -> None:
    """Tensors without any known name are no model."""
    assert "no RWKV model" in " ".join(problems_of({"layer1.weight": torch.ones(2, 2)}))


def test_tensors_are_prepared_as_the_table_says(weights: dict[str, torch.Tensor]) -> None:
    """Matrices in the model's dtype, low-rank pairs swapped, decays and vectors exact; always a copy."""
    checked = check_weights("model.pth", weights)
    key = checked.prepared("blocks.0.att.key.weight", CPU, torch.bfloat16)
    rate = checked.prepared("blocks.0.att.a1", CPU, torch.bfloat16)
    decay = checked.prepared("blocks.0.att.w1", CPU, torch.bfloat16)
    mix = checked.prepared("blocks.0.att.x_r", CPU, torch.bfloat16)
    assert (key.dtype, rate.dtype, rate.shape) == (torch.bfloat16, torch.bfloat16, (6, 32))
    assert (decay.dtype, decay.shape, mix.dtype, mix.shape) == (torch.float32, (5, 32), torch.float32, (32,))
    assert torch.equal(decay, weights["blocks.0.att.w1"].t())
    same = checked.prepared("blocks.0.att.key.weight", CPU, torch.float32)
    assert same.data_ptr() != weights["blocks.0.att.key.weight"].data_ptr()

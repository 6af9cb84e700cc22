"""Tuned states from files: read in both formats, identified by their content, refused by file when they do not fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from engine.errors import ModelFileError
from engine.state.initial_states import load_initial_states
from engine.state.spec import StateSpec, TensorSpec
from engine.token_chain import root_digest

SPEC = StateSpec(
    fingerprint="f00d",
    generation="7",
    layout="value_key",
    tensors=(TensorSpec("wkv", (2, 3, 4, 4), torch.float32), TensorSpec("shift", (2, 2, 12), torch.float32)),
)


def tuned(seed: int = 0, num_layers: int = 2) -> dict[str, torch.Tensor]:
    """Return a tuned state by its published names."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"blocks.{layer}.att.time_state": torch.randn(3, 4, 4, generator=generator).bfloat16()
        for layer in range(num_layers)
    }


def test_both_formats_of_one_content_are_one_state(tmp_path: Path) -> None:
    """Names are the files'; the identity is of the numbers, whatever wrote them and in which precision."""
    save_file({name: tensor.float() for name, tensor in tuned().items()}, tmp_path / "bard.safetensors")
    torch.save(tuned(), tmp_path / "actor.pth")
    save_file(tuned(seed=1), tmp_path / "clerk.safetensors")
    (tmp_path / "README.md").write_text("states")
    states = load_initial_states(tmp_path, SPEC)
    actor, bard, clerk = states
    assert [ref.name for ref in states] == ["actor", "bard", "clerk"]
    assert actor.fingerprint == bard.fingerprint != clerk.fingerprint
    state = states[bard]
    assert torch.equal(state.tensors["wkv"], torch.stack([tensor.float() for tensor in tuned().values()]))
    assert torch.equal(state.tensors["shift"], torch.zeros(2, 2, 12))
    roots = {state.chain for state in states.values()}
    assert len(roots) == 2
    assert root_digest() not in roots
    assert state.num_tokens == 0


FIRST, SECOND = "blocks.0.att.time_state", "blocks.1.att.time_state"
SPOILT: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "shape": (
        {FIRST: torch.zeros(3, 4, 4), SECOND: torch.zeros(3, 4, 5)},
        r"blocks\.1\.att\.time_state has the shape \[3, 4, 5\], expected \[3, 4, 4\]",
    ),
    "missing": ({FIRST: torch.zeros(3, 4, 4)}, r"blocks\.1\.att\.time_state is missing"),
    "unexpected": (tuned() | {"emb.weight": torch.zeros(2)}, r"emb\.weight is not expected"),
    "nan": (tuned() | {FIRST: torch.full((3, 4, 4), float("nan"))}, r"finite"),
    "integers": (tuned() | {FIRST: torch.zeros(3, 4, 4, dtype=torch.int64)}, r"floating"),
}


@pytest.mark.parametrize(("state", "complaint"), SPOILT.values(), ids=SPOILT.keys())
def test_what_does_not_fit_the_model_is_refused_by_file(
    tmp_path: Path, state: dict[str, torch.Tensor], complaint: str
) -> None:
    """The error says which file, and what is wrong with it."""
    save_file(state, tmp_path / "wrong.safetensors")
    save_file(tuned(), tmp_path / "right.safetensors")
    with pytest.raises(ModelFileError, match=r"wrong\.safetensors[\s\S]*" + complaint):
        load_initial_states(tmp_path, SPEC)


def test_names_are_unambiguous(tmp_path: Path) -> None:
    """Two files of one name, a name that no request could spell, and no directory at all are refused."""
    with pytest.raises(ModelFileError, match="directory"):
        load_initial_states(tmp_path / "none", SPEC)
    save_file(tuned(), tmp_path / "bard.safetensors")
    torch.save(tuned(1), tmp_path / "bard.pth")
    with pytest.raises(ModelFileError, match=r"bard\.safetensors[\s\S]*another file"):
        load_initial_states(tmp_path, SPEC)
    (tmp_path / "bard.pth").rename(tmp_path / "the bard.pth")
    with pytest.raises(ModelFileError, match=r"the bard\.pth[\s\S]*must match"):
        load_initial_states(tmp_path, SPEC)


def test_nothing_in_a_file_is_executed(tmp_path: Path) -> None:
    """A pickle of anything but tensors is refused."""
    torch.save({"blocks.0.att.time_state": Path}, tmp_path / "trap.pth")
    with pytest.raises(ModelFileError, match=r"trap\.pth"):
        load_initial_states(tmp_path, SPEC)


def test_a_state_kept_in_float16_is_the_same_state(tmp_path: Path) -> None:
    """Its name in histories is of what was tuned, however it is kept; what float16 cannot hold is refused."""
    save_file(tuned(), tmp_path / "bard.safetensors")
    halves = replace(SPEC, tensors=(replace(SPEC.tensors[0], dtype=torch.float16), SPEC.tensors[1]))
    ((ref, state),) = load_initial_states(tmp_path, SPEC).items()
    ((half_ref, half_state),) = load_initial_states(tmp_path, halves).items()
    assert half_ref == ref
    assert half_state.chain == state.chain
    assert half_state.tensors["wkv"].equal(state.tensors["wkv"].half())
    assert half_state.tensors["shift"].dtype == torch.float32
    save_file(tuned() | {FIRST: torch.full((3, 4, 4), 1e5)}, tmp_path / "loud.safetensors")
    assert len(load_initial_states(tmp_path, SPEC)) == 2
    with pytest.raises(ModelFileError, match=r"loud\.safetensors.*\n?.*too large for state_dtype float16"):
        load_initial_states(tmp_path, halves)

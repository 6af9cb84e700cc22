"""Opening weights files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.errors import ModelFileError
from engine.weights.open import find_weights_file, open_weights
from engine.weights.synthetic import save_weights

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_tensors_come_back_as_they_were_written(tmp_path: Path, suffix: str) -> None:
    """Names, shapes, dtypes and values survive either format."""
    path = tmp_path / f"model{suffix}"
    save_weights(path, dict(TENSORS))
    opened = open_weights(path)
    assert opened.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert opened[name].dtype == tensor.dtype
        assert torch.equal(opened[name], tensor)


def test_a_directory_stands_for_the_one_file_in_it(tmp_path: Path) -> None:
    """Other files beside the weights do not matter."""
    save_weights(tmp_path / "model.safetensors", dict(TENSORS))
    (tmp_path / "README.md").write_text("hello")
    assert find_weights_file(tmp_path) == tmp_path / "model.safetensors"


def test_a_directory_with_two_models_names_both(tmp_path: Path) -> None:
    """Which of several files is meant is not guessed."""
    for name in ("one.pth", "two.safetensors"):
        save_weights(tmp_path / name, dict(TENSORS))
    with pytest.raises(ModelFileError, match=r"exactly one .*one\.pth, two\.safetensors"):
        open_weights(tmp_path)


def test_an_old_file_without_zip_is_read_too(tmp_path: Path) -> None:
    """Files of `torch.save` from before its zip form cannot be mapped, and are read instead."""
    path = tmp_path / "old.pth"
    torch.save(TENSORS, path, _use_new_zipfile_serialization=False)
    assert torch.equal(open_weights(path)["a"], TENSORS["a"])


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("absent.pth", None, "no such file"),
        ("model.gguf", b"GGUF", r"must end in \.safetensors or \.pth"),
        ("model.pth", b"not a model", "cannot be read as .pth"),
        ("model.pth", b"junk\n", "cannot be read as .pth"),  # to its reader: fetch what was never stored
        ("model.pth", b"", "cannot be read as .pth"),
        ("model.safetensors", b"\xff" * 64, "cannot be read as .safetensors"),
    ],
)
def test_what_is_no_model_is_refused(tmp_path: Path, name: str, content: bytes | None, complaint: str) -> None:
    """Whatever lies there, the answer is a `ModelFileError` that names the file."""
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ModelFileError, match=complaint) as caught:
        open_weights(path)
    assert caught.value.path == str(path)


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    """A pickle that would call a function when loaded is refused, and the function not called."""
    victim = tmp_path / "touched"

    class Malicious:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (victim,)

    path = tmp_path / "evil.pth"
    torch.save({"a": torch.ones(1), "b": Malicious()}, path)
    with pytest.raises(ModelFileError, match="cannot be read"):
        open_weights(path)
    assert not victim.exists()


def test_a_file_of_settings_is_no_model(tmp_path: Path) -> None:
    """A dictionary without any tensor is refused with what it holds instead."""
    path = tmp_path / "settings.pth"
    torch.save({"learning_rate": 0.1}, path)
    with pytest.raises(ModelFileError, match="learning_rate"):
        open_weights(path)

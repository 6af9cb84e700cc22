"""Which tokenizer a model gets."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from engine.errors import TokenizerError
from engine.tokenizer import load


@pytest.mark.parametrize(("rows", "name"), [(256, "bytes"), (65_530, "world"), (65_536, "world")])
def test_auto_goes_by_the_number_of_rows(tmp_path: Path, rows: int, name: str) -> None:
    """Without a tokenizer file the size of the head decides."""
    tokenizer = load("auto", tmp_path / "model.pth", rows)
    assert (tokenizer.name, tokenizer.vocab_size) == (name, rows)


@pytest.mark.parametrize("model", ["", "model.safetensors"])
def test_auto_prefers_a_tokenizer_beside_the_model(byte_level_path: Path, tmp_path: Path, model: str) -> None:
    """A tokenizer.json in the model's directory is used, be the model that directory or a file in it."""
    path = Path(shutil.copy(byte_level_path, tmp_path))
    (tmp_path / "model.safetensors").touch()
    assert load("auto", tmp_path / model, 65_536).name == str(path)


def test_auto_gives_up_with_what_it_looked_for(tmp_path: Path) -> None:
    """A head of another size without a tokenizer file is an error that says what would have been accepted."""
    with pytest.raises(TokenizerError) as caught:
        load("auto", tmp_path / "model.pth", 4096)
    for said in ("4096 rows", str(tmp_path / "tokenizer.json"), "256", "65536", "bytes, world, or the path"):
        assert said in str(caught.value)


def test_a_spec_wins_over_what_is_there(byte_level_path: Path) -> None:
    """A named tokenizer is used whatever lies beside the model."""
    assert load("bytes", byte_level_path.parent, 384).name == "bytes"
    assert load("world", byte_level_path.parent, 70_000).name == "world"


def test_a_path_may_be_a_file_or_its_directory(byte_level_path: Path, tmp_path: Path) -> None:
    """A tokenizer.json can be named, or the directory it lies in."""
    for spec in (byte_level_path, byte_level_path.parent):
        assert load(str(spec), tmp_path, 384).name == str(byte_level_path)


def test_a_path_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    """A mistyped spec is not guessed at."""
    with pytest.raises(TokenizerError, match=r"no tokenizer wrold: expected auto, bytes, world"):
        load("wrold", tmp_path, 65_536)


@pytest.mark.parametrize("spec", ["world", "auto"])
def test_a_tokenizer_larger_than_the_head_is_an_error(byte_level_path: Path, spec: str) -> None:
    """A vocabulary with more ids than the model has rows is refused."""
    with pytest.raises(TokenizerError, match="the model has only 256 rows"):
        load(spec, byte_level_path.parent, 256)

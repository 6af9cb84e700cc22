"""Which template a model gets."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.templates import BUILTIN, TemplateError, choose


@pytest.mark.parametrize("name", BUILTIN)
def test_a_name_is_that_template(tmp_path: Path, name: str) -> None:
    """A named template is used whatever lies beside the model."""
    (tmp_path / "sostenuto.json").write_text('{"chat_template": "g1h"}')
    assert choose(name, tmp_path).name == name


def test_auto_without_notes_is_world(tmp_path: Path) -> None:
    """A model that says nothing about itself is addressed as all of them understand."""
    assert choose("auto", tmp_path / "model.pth") is BUILTIN["world"]


@pytest.mark.parametrize("model", ["", "model.pth"])
def test_auto_reads_the_notes_beside_the_model(tmp_path: Path, model: str) -> None:
    """A sostenuto.json in the model's directory names its template."""
    (tmp_path / "model.pth").touch()
    (tmp_path / "sostenuto.json").write_text('{"chat_template": "g1h"}')
    assert choose("auto", tmp_path / model) is BUILTIN["g1h"]


@pytest.mark.parametrize("notes", ["", "{}", "[]", '{"chat_template": 1}', '{"chat_template": "g1", "temperature": 1}'])
def test_notes_that_are_not_understood_are_an_error(tmp_path: Path, notes: str) -> None:
    """Nothing in the notes is ignored."""
    (tmp_path / "sostenuto.json").write_text(notes)
    with pytest.raises(TemplateError, match=r"cannot read .*sostenuto\.json"):
        choose("auto", tmp_path)


def test_unknown_names_are_refused_with_the_known_ones(tmp_path: Path) -> None:
    """A mistyped name, on the command line or in the notes, is an error that lists the templates."""
    with pytest.raises(TemplateError, match="known are: world, g1, g1h, raw") as caught:
        choose("wrold", tmp_path)
    assert caught.value.field == "chat_template"
    (tmp_path / "sostenuto.json").write_text('{"chat_template": "chatml"}')
    with pytest.raises(TemplateError, match=r"sostenuto\.json: no chat template is called 'chatml'"):
        choose("auto", tmp_path)

"""Which template a model gets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from server.templates import BUILTIN, AnswerReader, AnswerText, Message, TemplateError, choose, render


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
    with pytest.raises(TemplateError, match="known are: world, world-v4, g1, g1h, raven, instruction, raw") as caught:
        choose("wrold", tmp_path)
    assert caught.value.field == "chat_template"
    (tmp_path / "sostenuto.json").write_text('{"chat_template": "chatml"}')
    with pytest.raises(TemplateError, match=r"sostenuto\.json: no chat template is called 'chatml'"):
        choose("auto", tmp_path)


OWN = {
    "name": "mine",
    "system": "# ",
    "user": "Q: ",
    "border": "\n\n",
    "past_opening": "A:",
    "lead": " ",
    "opening": {"text": "A:", "completion": " "},
    "efforts": {"high": {"text": "A: <think", "thinking": True, "completion": ">", "skips_space": True}},
    "stop_strings": ["\n\nQ:"],
}


def test_a_model_may_bring_its_own_template(tmp_path: Path) -> None:
    """A whole template in the notes is used like a built-in one."""
    (tmp_path / "sostenuto.json").write_text(json.dumps({"chat_template": OWN}))
    template = choose("auto", tmp_path)
    prompt = render([Message("system", "s"), Message("user", "u")], template, first=True, reasoning_effort="high")
    assert prompt.pieces == ("# s\n\n", "Q: u\n\nA: <think")
    assert prompt.stop_strings == ("\n\nQ:",)
    reader = AnswerReader(prompt.opening)
    assert reader.push(">why</think> so") == AnswerText("why", "so")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"name": None}, "name"),
        ({"name": "No Spaces"}, "name"),
        ({"user": 1}, "user"),
        ({"border": "x" * 257}, "border"),
        ({"jinja": "{{ messages }}"}, "jinja"),
        ({"opening": {"text": "A: "}}, "must not end in a space"),
        ({"opening": {"text": "A:", "unshown": ".*"}}, "unshown"),
        ({"efforts": {"much": {"text": "A:"}}}, "much"),
        ({"stop_strings": [""]}, "stop_strings"),
        ({"stop_strings": ["x"] * 17}, "stop_strings"),
        ({"name": "world"}, "built-in"),
    ],
)
def test_own_templates_are_read_strictly(tmp_path: Path, change: dict[str, object], said: str) -> None:
    """An unknown field, a wrong type, a size out of bounds and a taken name are errors that say which."""
    (tmp_path / "sostenuto.json").write_text(json.dumps({"chat_template": OWN | change}))
    with pytest.raises(TemplateError, match=said) as caught:
        choose("auto", tmp_path)
    assert caught.value.field == "chat_template"


@pytest.mark.parametrize("field", ["name", "system", "user", "border", "past_opening", "opening", "stop_strings"])
def test_own_templates_leave_nothing_to_guess(tmp_path: Path, field: str) -> None:
    """What every template needs cannot be left out."""
    own = {name: value for name, value in OWN.items() if name != field}
    (tmp_path / "sostenuto.json").write_text(json.dumps({"chat_template": own}))
    with pytest.raises(TemplateError, match=field):
        choose("auto", tmp_path)

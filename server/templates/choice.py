"""Which template a model's conversations are written in."""

from __future__ import annotations

from pathlib import Path

import msgspec

from server.templates.builtin import BUILTIN, WORLD
from server.templates.template import Template, TemplateError

FILE_NAME = "sostenuto.json"  # beside a model, optional
FIELD = "chat_template"


class ModelNotes(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a `sostenuto.json` says about the model it lies beside."""

    chat_template: str | Template


def choose(spec: str, model_path: str | Path) -> Template:
    """Return the template that `spec` names: a built-in one, or `auto`.

    `auto` takes the one in a `sostenuto.json` in the model's directory, which names a built-in one
    (`{"chat_template": "g1"}`) or holds a whole one; else `world`, which every World and G1 model understands.
    Raises `TemplateError` for names that are not known and templates that are not well formed.
    """
    if spec != "auto":
        return _named(spec, FIELD)
    model_path = Path(model_path)
    path = (model_path if model_path.is_dir() else model_path.parent) / FILE_NAME
    if not path.is_file():
        return WORLD
    try:
        notes = msgspec.json.decode(path.read_bytes(), type=ModelNotes)
    except (msgspec.DecodeError, OSError) as error:
        raise TemplateError(FIELD, f"cannot read {path}: {error}") from error
    return _own(notes.chat_template, str(path))


def _own(choice: str | Template, where: str) -> Template:
    if isinstance(choice, str):
        return _named(choice, where)
    if choice.name in BUILTIN:
        raise TemplateError(FIELD, f"{where}: {choice.name!r} is the name of a built-in chat template; take another")
    return choice


def _named(name: str, where: str) -> Template:
    try:
        return BUILTIN[name]
    except KeyError:
        known = ", ".join(BUILTIN)
        raise TemplateError(FIELD, f"{where}: no chat template is called {name!r}; known are: {known}") from None

"""What a chat template is: the turns of one family of models, as data.

`server.templates.rendering` renders them all; the ones that are known are in `server.templates.builtin`, and a model
may bring its own (`server.templates.choice`). Everything in a template is text to be put down or looked for: there is
nothing to run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Literal

import msgspec

MAX_TEXT_CHARS = 256
MAX_STOP_STRINGS = 16

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]
Text = Annotated[str, msgspec.Meta(max_length=MAX_TEXT_CHARS)]
StopString = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_TEXT_CHARS)]
Name = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]


class TemplateError(Exception):
    """Messages that a template cannot render. `field` names the part of the request at fault."""

    def __init__(self, field: str, message: str) -> None:
        self.field = field
        super().__init__(message)


class Opening(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a prompt begins the answer it asks for, and how the model goes on before it says anything."""

    text: Text  # the end of the prompt; never ends in a space, which would be half of the next token
    thinking: bool = False  # the model writes a thought first, up to `</think>`
    completion: Text = ""  # what the model may write to complete the opening, and no reader should see
    skips_space: bool = False  # nor should they see white space after it
    hint: Text = ""  # said at the end of the user's message: how long to think

    def __post_init__(self) -> None:
        if self.text.endswith(" "):
            raise ValueError("an opening must not end in a space: it is half of the token the model would write next")

    @property
    def unshown(self) -> str:
        """Regular expression of what no reader should see at the beginning of what the model writes."""
        completion = f"(?:{re.escape(self.completion)})?" if self.completion else ""
        return completion + (r"\s*" if self.skips_space else "")


class ToolForm(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How tools are offered and how results come back. What a call looks like, `server.templates.calls` knows."""

    opening: Opening  # of an answer that must be a call: up to where its JSON begins
    title: Text = "Tools:"  # the line before the list
    offer: Text = "To use a tool, return only a JSON function call."  # the line after it, if the model may call
    demand: Text = "Return only a JSON function call."  # the same if it must
    result: Text = "Function output:"  # the line before a result, in the user's place


class Template(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The turns of one family of models."""

    name: Name
    system: Text  # what comes before a system text
    user: Text  # what comes before what a user says
    user_after_system: Text | None = None  # the same directly after a system text, where that differs
    border: Text  # what closes a turn that is followed by another
    past_opening: Text  # what comes before an answer that is sent as text, of which no thought is left
    lead: Text = ""  # what the model writes itself between `past_opening` and its answer
    opening: Opening  # if no effort is asked for
    efforts: Mapping[Effort, Opening] = {}
    stop_strings: Annotated[tuple[StopString, ...], msgspec.Meta(max_length=MAX_STOP_STRINGS)]  # see docs/templates.md
    verbatim: bool = False  # contents are not cleaned
    reserved: Text = ""  # only borders hold it; a content that does could forge a turn, and is refused
    tools: ToolForm | None = None  # None: the models know no tools

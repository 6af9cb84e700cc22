"""Chat messages as the text a model was trained on.

A conversation renders only its *new* messages. The model's state holds the text so far up to the last delivered token
of the last answer and nothing of what ended it, so what is rendered for a later turn begins with the border that
closes that answer, in one piece with the messages after it. Knows nothing of tokens.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


class TemplateError(Exception):
    """Messages that a template cannot render. `field` names the part of the request at fault."""

    def __init__(self, field: str, message: str) -> None:
        self.field = field
        super().__init__(message)


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a chat."""

    role: str  # system | developer | user | assistant
    content: str


@dataclass(frozen=True, slots=True)
class Opening:
    """How the prompt begins the answer it asks for."""

    text: str  # the end of the prompt; never ends in a space, which would be half of the next token
    thinking: bool = False  # the model writes a thought first, up to `</think>`
    unshown: str = ""  # regular expression: what the model writes to complete the opening, and no reader should see
    hint: str = ""  # said at the end of the user's message: how long to think


@dataclass(frozen=True, slots=True)
class Template:
    """The turns of one family of models. The built-in ones are in `server.templates.builtin`."""

    name: str
    headers: Mapping[str, str]  # what comes before a content, by role
    border: str  # what closes a turn that is followed by another
    openings: Mapping[str | None, Opening]  # by reasoning effort; None: not asked for
    stop_strings: tuple[str, ...]  # each ends an answer, and is neither shown nor kept
    verbatim: bool = False  # contents are not cleaned
    reserved: str = ""  # only borders hold it; a content that does could forge a turn, and is refused


@dataclass(frozen=True, slots=True)
class RenderedPrompt:
    """What the model is to read next, and how to read its answer."""

    text: str
    stop_strings: tuple[str, ...]
    opening: Opening


def render(
    messages: Sequence[Message], template: Template, *, first: bool, reasoning_effort: str | None = None
) -> RenderedPrompt:
    """Return the prompt for an answer to `messages`.

    `first` says that nothing came before them; otherwise the text begins with the border after the last answer.
    Raises `TemplateError` for what the template has no form for.
    """
    opening = _opening(template, reasoning_effort)
    if not messages:
        raise TemplateError("messages", "there is no message to answer")
    contents = [_content(template, message, index) for index, message in enumerate(messages)]
    last = len(messages) - 1
    if messages[last].role == "assistant":
        raise TemplateError(f"messages[{last}].role", "the last message is an answer already; it can't be continued")
    if messages[last].role == "user":
        contents[last] += opening.hint
    turns = [template.headers[message.role] + content for message, content in zip(messages, contents, strict=True)]
    closing = [] if first else [""]
    return RenderedPrompt(template.border.join([*closing, *turns, opening.text]), template.stop_strings, opening)


def _opening(template: Template, reasoning_effort: str | None) -> Opening:
    try:
        return template.openings[reasoning_effort]
    except KeyError:
        accepted = ", ".join(effort for effort in template.openings if effort is not None)
        message = f"chat template {template.name!r} has no {reasoning_effort!r}; accepted: {accepted}"
        raise TemplateError("reasoning_effort", message) from None


def _content(template: Template, message: Message, index: int) -> str:
    """Return the content as it stands in the prompt."""
    if message.role not in template.headers:
        accepted = ", ".join(template.headers)
        raise TemplateError(f"messages[{index}].role", f"unknown role {message.role!r}; known are: {accepted}")
    content = message.content if template.verbatim else _clean(message)
    field = f"messages[{index}].content"
    if not content:
        raise TemplateError(field, "the content is empty")
    if template.reserved and template.reserved in content:
        raise TemplateError(field, f"{template.reserved!r} marks the turns of this model and cannot be in a content")
    return content


def _clean(message: Message) -> str:
    """Return the content without what would look like a turn border.

    An answer may hold blank lines, since the models write them, but has no space around it.
    """
    if message.role == "assistant":
        return message.content.strip()
    return re.sub(r"\n{2,}", "\n", message.content.replace("\r\n", "\n")).strip()

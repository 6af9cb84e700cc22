"""Chat messages as the text a model was trained on.

A conversation renders only its *new* messages. The model's state holds the text so far up to the last delivered token
of the last answer and nothing of what ended it, so what is rendered for a later turn begins with the border that
closes that answer, in one piece with the messages after it.

A prompt comes in pieces that are tokenized each by itself, because that is how a conversation grows: what is rendered
is one piece, what the model answers the next. So a history that is sent whole gets the tokens it got turn by turn.
Knows nothing of tokens but that an answer may be given as the ids that were sampled.
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


_PREAMBLE_ROLES = frozenset({"system", "developer"})


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a chat."""

    role: str  # system | developer | user | assistant
    content: str


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer of the history exactly as the model wrote it, after the opening it was asked for with."""

    opening: str  # `Opening.text` of the prompt that it answered
    written: str | tuple[int, ...]  # everything the model wrote, nothing cleaned: its text, or the ids it sampled


Part = Message | Answer
Piece = str | tuple[int, ...]  # text, or token ids that are known already; never empty


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
    headers: Mapping[str, str]  # what comes before a content, by role; answers have openings instead
    border: str  # what closes a turn that is followed by another
    past_opening: str  # what comes before an answer that is sent as text, of which no thought is left
    lead: str  # what the model writes itself between `past_opening` and its answer
    openings: Mapping[str | None, Opening]  # by reasoning effort; None: not asked for
    stop_strings: tuple[str, ...]  # each ends an answer, and is neither shown nor kept
    verbatim: bool = False  # contents are not cleaned
    reserved: str = ""  # only borders hold it; a content that does could forge a turn, and is refused


@dataclass(frozen=True, slots=True)
class RenderedPrompt:
    """What the model is to read next, and how to read its answer.

    A piece ends after the opening of every answer and after every answer, and one after the system messages that begin
    a history: many prompts share these. Only the last piece ends a prompt.
    """

    pieces: tuple[Piece, ...]
    stop_strings: tuple[str, ...]
    opening: Opening
    has_preamble: bool = False  # the first piece is these system messages, and nothing else

    @property
    def text(self) -> str:
        """The whole prompt; raises `TypeError` if some of it is known as token ids only."""
        return "".join(map(_text, self.pieces))


def render(
    parts: Sequence[Part], template: Template, *, first: bool, reasoning_effort: str | None = None
) -> RenderedPrompt:
    """Return the prompt for an answer to `parts`: messages, and answers exactly as they were written.

    `first` says that nothing came before them; otherwise the text begins with the border after the last answer.
    Raises `TemplateError` for what the template has no form for.
    """
    opening = _opening(template, reasoning_effort)
    if not parts:
        raise TemplateError("messages", "there is no message to answer")
    last = parts[-1]
    if isinstance(last, Answer) or last.role == "assistant":
        field = f"messages[{len(parts) - 1}].role"
        raise TemplateError(field, "the last message is an answer already; it can't be continued")
    prompt = _Pieces()
    preamble_size = _preamble_size(parts, template) if first else 0
    for index, part in enumerate(parts):
        prompt.extend("" if first and index == 0 else template.border)
        if 0 < index == preamble_size:
            prompt.cut()
        if isinstance(part, Answer):
            prompt.answer(part)
        elif part.role == "assistant":
            prompt.answer(Answer(template.past_opening, template.lead + _content(template, part, index)))
        else:
            prompt.extend(_header(template, part, index) + _content(template, part, index))
    if last.role == "user":
        prompt.extend(opening.hint)
    prompt.extend(template.border + opening.text)
    return RenderedPrompt(prompt.finish(), template.stop_strings, opening, has_preamble=0 < preamble_size < len(parts))


def _preamble_size(parts: Sequence[Part], template: Template) -> int:
    """Return how many system messages begin the history; none if the template has nothing to part them by."""
    others = (index for index, part in enumerate(parts) if isinstance(part, Answer) or part.role not in _PREAMBLE_ROLES)
    return next(others, len(parts)) if template.border else 0


class _Pieces:
    """The pieces of a prompt, and the text that is still to become one."""

    def __init__(self) -> None:
        self._pieces: list[Piece] = []
        self._text = ""

    def extend(self, text: str) -> None:
        self._text += text

    def answer(self, answer: Answer) -> None:
        self._text += answer.opening
        self._pieces += [self._text, answer.written]
        self._text = ""

    def cut(self) -> None:
        self._pieces.append(self._text)
        self._text = ""

    def finish(self) -> tuple[Piece, ...]:
        return tuple(piece for piece in (*self._pieces, self._text) if piece)


def _text(piece: Piece) -> str:
    if not isinstance(piece, str):
        raise TypeError("a prompt with known token ids has no text of its own")
    return piece


def _opening(template: Template, reasoning_effort: str | None) -> Opening:
    try:
        return template.openings[reasoning_effort]
    except KeyError:
        accepted = ", ".join(effort for effort in template.openings if effort is not None)
        message = f"chat template {template.name!r} has no {reasoning_effort!r}; accepted: {accepted}"
        raise TemplateError("reasoning_effort", message) from None


def _header(template: Template, message: Message, index: int) -> str:
    try:
        return template.headers[message.role]
    except KeyError:
        known = ", ".join((*template.headers, "assistant"))
        raise TemplateError(f"messages[{index}].role", f"unknown role {message.role!r}; known are: {known}") from None


def _content(template: Template, message: Message, index: int) -> str:
    """Return the content as it stands in the prompt."""
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

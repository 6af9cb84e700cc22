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
from collections.abc import Sequence
from dataclasses import dataclass

from server.templates.calls import ToolCall, is_object
from server.templates.template import Opening, Template, TemplateError
from server.templates.tools import tool_form

SYSTEM_ROLES = ("system", "developer")


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a chat."""

    role: str  # system | developer | user | assistant | tool
    content: str
    call: ToolCall | None = None  # how an assistant's message ends


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer of the history exactly as the model wrote it, after the opening it was asked for with."""

    opening: str  # `Opening.text` of the prompt that it answered
    written: str | tuple[int, ...]  # everything the model wrote, nothing cleaned: its text, or the ids it sampled
    follows: bool = False  # directly what comes before, without a border: text that was continued as it stood


Part = Message | Answer
Piece = str | tuple[int, ...]  # text, or token ids that are known already; never empty


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
    parts: Sequence[Part],
    template: Template,
    *,
    first: bool,
    reasoning_effort: str | None = None,
    preamble: str = "",
    must_call: bool = False,
    num_known: int = 0,
) -> RenderedPrompt:
    """Return the prompt for an answer to `parts`: messages, and answers exactly as they were written.

    `first` says that nothing came before them; otherwise the text begins with the border after the last answer.
    `preamble` is a system text before all of them, in one with a system message that comes first. `must_call` opens the
    answer as a call of a tool. Raises `TemplateError` for what the template has no form for; it names a message by its
    place after the first `num_known`, which the client has not sent with this request.
    """
    if not parts:
        raise TemplateError("messages", "there is no message to answer")
    last = parts[-1]
    if isinstance(last, Answer) or last.role == "assistant":
        field = f"messages[{len(parts) - 1 - num_known}].role"
        raise TemplateError(field, "the last message is an answer already; it can't be continued")
    opening = _opening(template, reasoning_effort, must_call=must_call)
    prompt, has_preamble = _history(parts, template, first=first, preamble=preamble, num_known=num_known)
    if last.role == "user":
        prompt.extend(opening.hint)
    prompt.extend(template.border + opening.text)
    return RenderedPrompt(prompt.finish(), template.stop_strings, opening, has_preamble)


def render_remembered(
    parts: Sequence[Part], template: Template, answer: str, *, first: bool, preamble: str = "", num_known: int = 0
) -> tuple[tuple[Piece, ...], str]:
    """Return the prompt and the answer that a conversation remembers if it is to forget what was thought in between.

    They are what `render` makes of a history in which `answer` was said to `parts` without a thought; an empty one is
    nothing after its opening. Raises as `render`.
    """
    prompt, _ = _history(parts, template, first=first, preamble=preamble, num_known=num_known)
    prompt.extend(template.border + template.past_opening)
    written = answer if template.verbatim else answer.strip()
    return prompt.finish(), template.lead + written if written else ""


def _history(
    parts: Sequence[Part], template: Template, *, first: bool, preamble: str, num_known: int
) -> tuple[_Pieces, bool]:
    """Return the parts without the opening of a next answer, and whether the first piece is the preamble alone."""
    parts, offset = _with_preamble(parts, preamble, template)
    prompt = _Pieces()
    preamble_size = _preamble_size(parts, template) if first else 0
    for place, part in enumerate(parts):
        follows = isinstance(part, Answer) and part.follows
        prompt.extend("" if follows or (first and place == 0) else template.border)
        if 0 < place == preamble_size:
            prompt.cut()
        field = f"messages[{place - offset - num_known}]"
        if isinstance(part, Answer):
            prompt.answer(part)
        elif part.role == "assistant":
            written = _answer(template, part, field)
            # An answer may have been empty; its opening is completed all the same, and no space hangs on to it.
            prompt.answer(Answer(template.past_opening, template.lead + written if written else template.lead.rstrip()))
        else:
            prompt.extend(_turn(template, part, parts[place - 1] if place else None, field))
    return prompt, 0 < preamble_size < len(parts)


def _preamble_size(parts: Sequence[Part], template: Template) -> int:
    """Return how many system messages begin the history; none if the template has nothing to part them by."""
    others = (place for place, part in enumerate(parts) if isinstance(part, Answer) or part.role not in SYSTEM_ROLES)
    return next(others, len(parts)) if template.border else 0


def _with_preamble(parts: Sequence[Part], preamble: str, template: Template) -> tuple[Sequence[Part], int]:
    """Return the parts with the preamble before them, and how many places it has moved them."""
    if not preamble:
        return parts, 0
    if template.reserved and template.reserved in preamble:
        raise TemplateError(
            "tools", f"{template.reserved!r} marks the turns of this model and cannot be said of a tool"
        )
    first = parts[0]
    if isinstance(first, Message) and first.role in SYSTEM_ROLES:
        return [Message(first.role, f"{preamble}\n{first.content}"), *parts[1:]], 0
    return [Message("system", preamble), *parts], 1


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


def _opening(template: Template, reasoning_effort: str | None, *, must_call: bool) -> Opening:
    if must_call:
        if reasoning_effort not in (None, "none"):
            raise TemplateError("reasoning_effort", "there is no thought before a call that must be made")
        return tool_form(template).opening
    if reasoning_effort is None:
        return template.opening
    for effort, opening in template.efforts.items():
        if effort == reasoning_effort:
            return opening
    accepted = ", ".join(template.efforts) or "none at all"
    message = f"chat template {template.name!r} has no {reasoning_effort!r}; accepted: {accepted}"
    raise TemplateError("reasoning_effort", message)


def _turn(template: Template, message: Message, previous: Part | None, field: str) -> str:
    """Return a message that is no answer as it stands in the prompt."""
    header = _header(template, message, previous, field)
    content = _content(template, message, field)
    if message.role == "tool":
        return f"{header}\n{content}" if content else header
    return header + content


def _header(template: Template, message: Message, previous: Part | None, field: str) -> str:
    """Return what comes before the content of a message that is no answer."""
    if message.role in SYSTEM_ROLES:
        return template.system
    if message.role == "tool":
        if template.tools is None:
            raise TemplateError(f"{field}.role", f"chat template {template.name!r} has no form for results of tools")
        return template.user + template.tools.result
    if message.role != "user":
        known = ", ".join((*SYSTEM_ROLES, "user", "assistant", "tool"))
        raise TemplateError(f"{field}.role", f"unknown role {message.role!r}; known are: {known}")
    follows_system = isinstance(previous, Message) and previous.role in SYSTEM_ROLES
    if template.user_after_system is not None and follows_system:
        return template.user_after_system
    return template.user


def _answer(template: Template, message: Message, field: str) -> str:
    """Return an answer as the model would have written it, its call included."""
    if message.call is None:
        return _content(template, message, field)
    tool_form(template)
    if not is_object(message.call.arguments):
        raise TemplateError(f"{field}.tool_calls[0].function.arguments", "arguments must be the JSON of an object")
    words = message.content.strip()
    written = Message(message.role, f"{words}\n{message.call.text}" if words else message.call.text)
    return _content(template, written, field)


def _content(template: Template, message: Message, field: str) -> str:
    """Return the content as it stands in the prompt."""
    content = message.content if template.verbatim else _clean(message)
    field = f"{field}.content"
    if not content and message.role not in ("tool", "assistant"):  # which may have had nothing to say
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

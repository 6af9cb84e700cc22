"""The answer as its reader sees it: thought, words and call apart, and none of what only completes the template.

The tokens of a turn are kept exactly as the model wrote them; this is a view of their text.
"""

from __future__ import annotations

import msgspec

from server.templates.calls import CallReader, overlap
from server.templates.template import Opening
from server.templates.tools import Toolbox

END_OF_THOUGHT = "</think>"


class AnswerText(msgspec.Struct, frozen=True, gc=False):
    """A piece of an answer: of the thought, the words, the call, or of several where one ends and another begins."""

    reasoning: str = ""
    content: str = ""
    call_name: str | None = None  # a call of this tool begins
    call_arguments: str = ""  # its JSON, as it comes


def read_answer(text: str, opening: Opening, toolbox: Toolbox | None = None) -> AnswerText:
    """Return the parts of a whole answer."""
    reader = AnswerReader(opening, toolbox)
    first, last = reader.push(text), reader.flush()
    return AnswerText(
        first.reasoning + last.reasoning,
        first.content + last.content,
        last.call_name if first.call_name is None else first.call_name,
        first.call_arguments + last.call_arguments,
    )


class AnswerReader:
    """Splits the text of one answer while it arrives.

    The pieces do not depend on how the text was cut. An answer that ends inside its thought has no content. With a
    toolbox an answer may call one of its tools; see `CallReader` for what counts as a call.
    """

    def __init__(self, opening: Opening, toolbox: Toolbox | None = None) -> None:
        self._thinking = opening.thinking
        self._completion = opening.completion  # may still come, and is skipped
        self._skips_space = opening.skips_space  # white space may still come, and is skipped
        self._held = ""  # not decided yet: the beginning may be unshown, the end may begin END_OF_THOUGHT
        self._calls = None if toolbox is None else _call_reader(toolbox)

    @property
    def has_called(self) -> bool:
        """Whether the answer has made a whole call."""
        return self._calls is not None and self._calls.has_called

    def push(self, text: str) -> AnswerText:
        """Return what `text` adds."""
        if not (self._thinking or self._completion or self._skips_space or self._held or self._calls):
            return AnswerText(content=text)  # nearly always
        self._held += text
        reasoning = self._take_reasoning() if self._thinking else ""
        content = "" if self._thinking else self._take(len(self._held))
        if self._calls is None:
            return AnswerText(reasoning, content)
        call = self._calls.push(content)
        return AnswerText(reasoning, call.content, call.name, call.arguments)

    def flush(self) -> AnswerText:
        """Return what was held back, now that the text is at its end."""
        rest = self._take(len(self._held), whole=True)
        if self._thinking:
            return AnswerText(reasoning=rest)
        if self._calls is None:
            return AnswerText(content=rest)
        last, held = self._calls.push(rest), self._calls.flush()
        return AnswerText("", last.content + held.content, last.name, last.arguments)

    def _take_reasoning(self) -> str:
        """Take what is certainly part of the thought, and notice its end."""
        thought, end, after = self._held.partition(END_OF_THOUGHT)
        if not end:
            return self._take(len(self._held) - overlap(self._held, END_OF_THOUGHT))
        reasoning = self._take(len(thought), whole=True)
        self._thinking, self._completion, self._skips_space, self._held = False, "", True, after
        return reasoning

    def _take(self, size: int, *, whole: bool = False) -> str:
        """Take the first `size` held characters without what is not shown.

        Unless they are `whole`, that nothing more can change what they are, those that may be unshown stay held.
        """
        text, self._held = self._held[:size], self._held[size:]
        if self._completion and text:
            if self._completion.startswith(text) and text != self._completion and not whole:
                self._held = text + self._held
                return ""
            text, self._completion = text.removeprefix(self._completion), ""
        if self._skips_space and text:
            text = text.lstrip()
            self._skips_space = not text
        return text


def _call_reader(toolbox: Toolbox) -> CallReader:
    return CallReader([tool.name for tool in toolbox.callable_tools], is_open=toolbox.must_call)

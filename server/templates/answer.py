"""The answer as its reader sees it: the thought apart, and none of what only completes the template.

The tokens of a turn are kept exactly as the model wrote them; this is a view of their text.
"""

from __future__ import annotations

from dataclasses import dataclass

from server.templates.template import Opening

END_OF_THOUGHT = "</think>"


@dataclass(frozen=True, slots=True)
class AnswerText:
    """A piece of an answer: of the thought, of what is said, or of both where one ends and the other begins."""

    reasoning: str = ""
    content: str = ""


class AnswerReader:
    """Splits the text of one answer while it arrives.

    The pieces do not depend on how the text was cut. An answer that ends inside its thought has no content.
    """

    def __init__(self, opening: Opening) -> None:
        self._thinking = opening.thinking
        self._completion = opening.completion  # may still come, and is skipped
        self._skips_space = opening.skips_space  # white space may still come, and is skipped
        self._held = ""  # not decided yet: the beginning may be unshown, the end may begin END_OF_THOUGHT

    def push(self, text: str) -> AnswerText:
        """Return what `text` adds."""
        self._held += text
        reasoning = self._take_reasoning() if self._thinking else ""
        content = "" if self._thinking else self._take(len(self._held))
        return AnswerText(reasoning, content)

    def flush(self) -> AnswerText:
        """Return what was held back, now that the text is at its end."""
        rest = self._take(len(self._held), whole=True)
        return AnswerText(reasoning=rest) if self._thinking else AnswerText(content=rest)

    def _take_reasoning(self) -> str:
        """Take what is certainly part of the thought, and notice its end."""
        thought, end, after = self._held.partition(END_OF_THOUGHT)
        if not end:
            return self._take(len(self._held) - _overlap(self._held, END_OF_THOUGHT))
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


def _overlap(text: str, word: str) -> int:
    """Return how many characters at the end of `text` could be the beginning of `word`."""
    sizes = range(min(len(text), len(word) - 1), 0, -1)
    return next((size for size in sizes if text.endswith(word[:size])), 0)

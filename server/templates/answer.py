"""The answer as its reader sees it: the thought apart, and none of what only completes the template.

The tokens of a turn are kept exactly as the model wrote them; this is a view of their text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from server.templates.template import Opening

END_OF_THOUGHT = "</think>"

_WHITESPACE = re.compile(r"\s*")


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
        self._unshown: re.Pattern[str] | None = re.compile(opening.unshown)  # still to be skipped; None: done
        self._held = ""  # not decided yet: the beginning may be unshown, the end may begin END_OF_THOUGHT

    def push(self, text: str) -> AnswerText:
        """Return what `text` adds."""
        self._held += text
        reasoning = self._take_reasoning() if self._thinking else ""
        content = "" if self._thinking else self._take(len(self._held))
        return AnswerText(reasoning, content)

    def flush(self) -> AnswerText:
        """Return what was held back, now that the text is at its end."""
        rest = self._take(len(self._held))
        return AnswerText(reasoning=rest) if self._thinking else AnswerText(content=rest)

    def _take_reasoning(self) -> str:
        """Take what is certainly part of the thought, and notice its end."""
        thought, end, after = self._held.partition(END_OF_THOUGHT)
        if not end:
            return self._take(len(self._held) - _overlap(self._held, END_OF_THOUGHT))
        reasoning = self._take(len(thought))
        self._thinking, self._unshown, self._held = False, _WHITESPACE, after
        return reasoning

    def _take(self, size: int) -> str:
        """Take the first `size` held characters; nothing while they may all belong to what is not shown."""
        start = 0
        if self._unshown is not None:
            skipped = self._unshown.match(self._held, 0, size)
            start = skipped.end() if skipped else 0
            if start == size:
                return ""
            self._unshown = None
        taken, self._held = self._held[start:size], self._held[size:]
        return taken


def _overlap(text: str, word: str) -> int:
    """Return how many characters at the end of `text` could be the beginning of `word`."""
    sizes = range(min(len(text), len(word) - 1), 0, -1)
    return next((size for size in sizes if text.endswith(word[:size])), 0)

"""Chat templates as data, how messages are rendered with them, and how the answers are read."""

from server.templates.answer import END_OF_THOUGHT, AnswerReader, AnswerText
from server.templates.builtin import BUILTIN
from server.templates.choice import choose
from server.templates.template import Message, Opening, RenderedPrompt, Template, TemplateError, render

__all__ = [
    "BUILTIN",
    "END_OF_THOUGHT",
    "AnswerReader",
    "AnswerText",
    "Message",
    "Opening",
    "RenderedPrompt",
    "Template",
    "TemplateError",
    "choose",
    "render",
]

"""Chat templates as data, how messages are rendered with them, and how the answers are read."""

from server.templates.answer import AnswerReader, AnswerText
from server.templates.builtin import BUILTIN
from server.templates.choice import choose
from server.templates.rendering import Answer, Message, Part, Piece, RenderedPrompt, render
from server.templates.template import Opening, Template, TemplateError

__all__ = [
    "BUILTIN",
    "Answer",
    "AnswerReader",
    "AnswerText",
    "Message",
    "Opening",
    "Part",
    "Piece",
    "RenderedPrompt",
    "Template",
    "TemplateError",
    "choose",
    "render",
]

"""Chat templates as data, how messages are rendered with them, and how the answers are read."""

from server.templates.answer import END_OF_THOUGHT, AnswerReader, AnswerText, read_answer
from server.templates.builtin import BUILTIN
from server.templates.calls import ToolCall
from server.templates.choice import choose
from server.templates.rendering import Answer, Message, Part, Piece, RenderedPrompt, render, render_remembered
from server.templates.template import Opening, Template, TemplateError
from server.templates.tools import Tool, Toolbox, call_grammar, tool_schema, tools_text

__all__ = [
    "BUILTIN",
    "END_OF_THOUGHT",
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
    "Tool",
    "ToolCall",
    "Toolbox",
    "call_grammar",
    "choose",
    "read_answer",
    "render",
    "render_remembered",
    "tool_schema",
    "tools_text",
]

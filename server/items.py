"""Items: what was said, as OpenAI's Conversations and Responses APIs spell it, and as parts of a prompt.

The bodies are the JSON that clients get back. Knows no ledger beyond its `Item` and no model.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Any

import msgspec

from server.conversations.ledger import Answer, Item
from server.templates import Answer as WrittenAnswer
from server.templates import AnswerText, Message, Part, TemplateError, ToolCall


class TextContent(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="input_text"
):
    """What a client said."""

    text: str


class OutputContent(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="output_text"
):
    """What the model said."""

    text: str
    annotations: list[Any] = []
    logprobs: list[Any] = []


class MessageBody(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="message"
):
    """A message. The role `unknown` is of text that was continued as it stands, without a template."""

    id: str
    status: str = "completed"
    role: str
    content: list[TextContent | OutputContent]


class ReasoningText(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="reasoning_text"
):
    """What the model thought."""

    text: str


class ReasoningBody(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="reasoning"
):
    """A thought, apart from what was said."""

    id: str
    status: str = "completed"
    summary: list[Any] = []
    content: list[ReasoningText]


class FunctionCallBody(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="function_call"
):
    """A call of a tool by the model."""

    id: str
    status: str = "completed"
    call_id: str
    name: str
    arguments: str


class FunctionOutputBody(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="function_call_output"
):
    """What a tool answered."""

    id: str
    status: str = "completed"
    call_id: str
    output: str


ROLES = frozenset({"user", "system", "developer", "assistant", "unknown"})

Body = MessageBody | ReasoningBody | FunctionCallBody | FunctionOutputBody

_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Body)


def item_of(body: msgspec.Struct, item_id: str, answer_id: str = "") -> Item:
    """Return `body`, whose id is `item_id`, as an item."""
    return Item(item_id=item_id, body=_encoder.encode(body), answer_id=answer_id)


def item_from(body: bytes | msgspec.Raw, answer_id: str = "") -> Item:
    """Return an item that was kept elsewhere; raises `ValueError` for what is no item of ours."""
    try:
        read: Body = _decoder.decode(body)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise ValueError(str(error)) from error
    if not read.id:
        raise ValueError("it has no id")
    if isinstance(read, MessageBody) and read.role not in ROLES:
        raise ValueError("nobody has that role")
    return item_of(read, read.id, answer_id)


def new_id(prefix: str) -> str:
    """Return an id that nothing else has."""
    return f"{prefix}_{uuid.uuid4().hex}"


def said(role: str, text: str) -> Item:
    """Return what a client said."""
    item_id = new_id("msg")
    content: TextContent | OutputContent = OutputContent(text=text) if role == "assistant" else TextContent(text=text)
    return item_of(MessageBody(id=item_id, role=role, content=[content]), item_id)


def thought(text: str, item_id: str | None = None, answer_id: str = "") -> Item:
    """Return what the model thought."""
    item_id = item_id or new_id("rs")
    return item_of(ReasoningBody(id=item_id, content=[ReasoningText(text=text)]), item_id, answer_id)


def called(call_id: str, name: str, arguments: str, item_id: str | None = None, answer_id: str = "") -> Item:
    """Return the model's call of a tool."""
    item_id = item_id or new_id("fc")
    body = FunctionCallBody(id=item_id, call_id=call_id, name=name, arguments=arguments)
    return item_of(body, item_id, answer_id)


def returned(call_id: str, output: str) -> Item:
    """Return what a tool answered to a call."""
    item_id = new_id("fco")
    return item_of(FunctionOutputBody(id=item_id, call_id=call_id, output=output), item_id)


@dataclass(frozen=True, slots=True)
class AnswerIds:
    """The ids of an answer's items, known before they are."""

    thought: str = field(default_factory=partial(new_id, "rs"))
    message: str = field(default_factory=partial(new_id, "msg"))
    call_item: str = field(default_factory=partial(new_id, "fc"))
    call: str = field(default_factory=partial(new_id, "call"))


def answered(
    answer: AnswerText,
    answer_id: str,
    ids: AnswerIds,
    *,
    logprobs: Sequence[Any] = (),
    is_complete: bool = True,
) -> list[Item]:
    """Return what the model thought, if it did, what it said, and its call of a tool, if it made one."""
    items = [thought(answer.reasoning, ids.thought, answer_id)] if answer.reasoning else []
    if answer.content or answer.call_name is None:
        items.append(_message(answer.content, ids.message, answer_id, logprobs, is_complete=is_complete))
    if answer.call_name is not None:
        items.append(called(ids.call, answer.call_name, answer.call_arguments, ids.call_item, answer_id))
    return items


def _message(text: str, message_id: str, answer_id: str, logprobs: Sequence[Any], *, is_complete: bool) -> Item:
    status = "completed" if is_complete else "incomplete"
    content: list[TextContent | OutputContent] = [OutputContent(text=text, logprobs=list(logprobs))]
    message = MessageBody(id=message_id, role="assistant", status=status, content=content)
    return item_of(message, message_id, answer_id)


def parts_of(items: Iterable[Item], answers: Mapping[str, Answer]) -> list[Part]:
    """Return `items` as parts of a prompt; those of an answer whose tokens are known are that answer, as sampled.

    Raises `TemplateError` for what no template has a form for.
    """
    parts: list[Part] = []
    for answer_id, group in groupby(items, lambda item: item.answer_id):
        answer = answers.get(answer_id) if answer_id else None
        if answer is None:
            for item in group:
                _add_part(parts, msgspec.json.decode(item.body))
            continue
        if answer.hint and parts and isinstance(parts[-1], Message):
            parts[-1] = Message(parts[-1].role, parts[-1].content + answer.hint)
        last = parts[-1] if parts else None
        follows = isinstance(last, WrittenAnswer) and last.follows and not answer.opening
        parts.append(WrittenAnswer(answer.opening, tuple(answer.output_ids), follows))
    return parts


def _add_part(parts: list[Part], body: dict[str, Any]) -> None:
    match body["type"]:
        case "message" if body["role"] == "unknown":
            parts.append(WrittenAnswer("", text_of(body["content"]), follows=True))
        case "message":
            parts.append(Message(body["role"], text_of(body["content"])))
        case "function_call":
            call = ToolCall(body["name"], body["arguments"])
            last = parts[-1] if parts else None
            if isinstance(last, Message) and last.role == "assistant" and last.call is None:
                parts[-1] = Message(last.role, last.content, call)  # an answer may say something and call
            else:
                parts.append(Message("assistant", "", call))
        case "function_call_output":
            parts.append(Message("tool", body["output"]))
        case "reasoning":
            pass  # a thought whose answer is not known as tokens any more is not thought again
        case other:
            raise TemplateError("input", f"an item of type {other!r} cannot be rendered")


def text_of(content: Sequence[Mapping[str, Any]]) -> str:
    """Return the text in a message's content."""
    return "".join(part["text"] for part in content)

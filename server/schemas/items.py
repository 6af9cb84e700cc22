"""Items as clients send them, to responses and to conversations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from pydantic import BeforeValidator, Discriminator, Field, StringConstraints, Tag

from server.conversations.ledger import Item
from server.errors import BadRequest
from server.items import called, returned, said, thought
from server.schemas.generation import MAX_PROMPT_CHARS
from server.schemas.strict import StrictModel

MAX_ITEMS = 4096

_ANNOTATIONS: dict[str, tuple[object, ...]] = {"annotations": ([],), "logprobs": ([],)}


class ItemPart(StrictModel):
    """A piece of text. Images, audio and files are refused by their type."""

    neutral_values: ClassVar[dict[str, tuple[object, ...]]] = {**_ANNOTATIONS, "prompt_cache_breakpoint": ()}
    without_effect: ClassVar[frozenset[str]] = frozenset({"annotations", "logprobs"})  # of an answer that is sent back

    type: Literal["input_text", "output_text", "text"]
    text: str


def _as_parts(value: Any) -> Any:
    return [{"type": "input_text", "text": value}] if isinstance(value, str) else value


class MessageItem(StrictModel):
    """A message. An answer of an earlier response may be sent back as it came."""

    without_effect: ClassVar[frozenset[str]] = frozenset({"id", "status", "phase"})

    type: Literal["message"] = "message"
    role: Literal["user", "system", "developer", "assistant"]
    content: Annotated[list[ItemPart], BeforeValidator(_as_parts)]

    @property
    def text(self) -> str:
        """What it says."""
        return "".join(part.text for part in self.content)

    def item(self) -> Item:
        """Return it as an item of the log."""
        return said(self.role, self.text)


class ThoughtPart(StrictModel):
    """A piece of a thought or of its summary."""

    type: Literal["reasoning_text", "summary_text"]
    text: str


class ReasoningItem(StrictModel):
    """A thought that an earlier response came with. It is kept, and not thought again."""

    without_effect: ClassVar[frozenset[str]] = frozenset({"id", "status", "summary"})
    neutral_values: ClassVar[dict[str, tuple[object, ...]]] = {"encrypted_content": ()}

    type: Literal["reasoning"]
    content: list[ThoughtPart] = []

    @property
    def text(self) -> str:
        """What was thought."""
        return "".join(part.text for part in self.content)

    def item(self) -> Item:
        """Return it as an item of the log."""
        return thought(self.text)


class FunctionCallItem(StrictModel):
    """A call of a tool by the model."""

    without_effect: ClassVar[frozenset[str]] = frozenset({"id", "status"})
    neutral_values: ClassVar[dict[str, tuple[object, ...]]] = {"namespace": (), "caller": ()}

    type: Literal["function_call"]
    call_id: Annotated[str, StringConstraints(min_length=1, max_length=128)]
    name: Annotated[str, StringConstraints(min_length=1, max_length=128)]
    arguments: str

    @property
    def text(self) -> str:
        """Its arguments."""
        return self.arguments

    def item(self) -> Item:
        """Return it as an item of the log."""
        return called(self.call_id, self.name, self.arguments)


class FunctionOutputItem(StrictModel):
    """What a tool answered."""

    without_effect: ClassVar[frozenset[str]] = frozenset({"id", "status"})
    neutral_values: ClassVar[dict[str, tuple[object, ...]]] = {"caller": ()}

    type: Literal["function_call_output"]
    call_id: Annotated[str, StringConstraints(min_length=1, max_length=128)]
    output: Annotated[list[ItemPart], BeforeValidator(_as_parts)]

    @property
    def text(self) -> str:
        """What it says."""
        return "".join(part.text for part in self.output)

    def item(self) -> Item:
        """Return it as an item of the log."""
        return returned(self.call_id, self.text)


def _tag(value: Any) -> str:
    """Return the type of an item; a message may leave it out."""
    found = value.get("type", "message") if isinstance(value, dict) else getattr(value, "type", "message")
    return f"<{found}>" if isinstance(found, str) else "<message>"


InputItem = Annotated[
    Annotated[MessageItem, Tag("<message>")]
    | Annotated[ReasoningItem, Tag("<reasoning>")]
    | Annotated[FunctionCallItem, Tag("<function_call>")]
    | Annotated[FunctionOutputItem, Tag("<function_call_output>")],
    Discriminator(
        _tag,
        custom_error_type="item_type",
        custom_error_message="type must be message, reasoning, function_call or function_call_output",
    ),
]

InputItems = Annotated[list[InputItem], Field(max_length=MAX_ITEMS)]


class ItemList(msgspec.Struct, frozen=True, kw_only=True):
    """A page of items."""

    object: str = "list"
    data: list[msgspec.Raw]
    first_id: str | None
    last_id: str | None
    has_more: bool


def check_size(name: str, items: Sequence[InputItem]) -> None:
    """Raise `BadRequest` if the items say more than a prompt may."""
    if sum(len(item.text) for item in items) > MAX_PROMPT_CHARS:
        raise BadRequest(f"{name}: at most {MAX_PROMPT_CHARS} characters.", name)

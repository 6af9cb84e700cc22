"""Bodies of `/v1/conversations`."""

from __future__ import annotations

from typing import Annotated

import msgspec
from pydantic import Field, StringConstraints, model_validator

from server.conversations.history import name_of
from server.conversations.ledger import Conversation
from server.errors import BadRequest
from server.schemas.generation import ConversationId
from server.schemas.items import InputItem
from server.schemas.strict import StrictModel

MetadataKey = Annotated[str, StringConstraints(min_length=1, max_length=64)]
MetadataValue = Annotated[str, StringConstraints(max_length=512)]
Metadata = Annotated[dict[MetadataKey, MetadataValue], Field(max_length=16)]

MAX_NEW_ITEMS = 20
NewItems = Annotated[list[InputItem], Field(max_length=MAX_NEW_ITEMS)]

YEAR_SECONDS = 366 * 86_400.0
MAX_TTL_SECONDS = 10 * YEAR_SECONDS
PINNED_SECONDS = 100 * YEAR_SECONDS  # stores know times, not "never"


class ConversationRequest(StrictModel):
    """Begin a conversation. Responses, chat and completions add turns."""

    id: ConversationId | None = None  # ours; drawn at random if absent
    metadata: Metadata = {}
    items: NewItems = []
    initial_state: str | None = None  # name of a tuned state to begin from


class ConversationUpdate(StrictModel):
    """Change what a conversation is apart from what was said. What is absent stays."""

    metadata: Metadata | None = None
    ttl_seconds: float | None = Field(None, gt=0, le=MAX_TTL_SECONDS)
    pinned: bool | None = None

    @model_validator(mode="after")
    def _check_update(self) -> ConversationUpdate:
        if self.pinned and self.ttl_seconds is not None:
            raise BadRequest("ttl_seconds: what is pinned does not expire.", "ttl_seconds")
        return self


class ItemsRequest(StrictModel):
    """Say something without asking for an answer."""

    items: NewItems = Field(min_length=1)


class ForkRequest(StrictModel):
    """Begin another conversation with the history of this one."""

    id: ConversationId | None = None
    version: int | None = Field(None, ge=0)  # the head's, if absent
    metadata: Metadata | None = None  # the origin's, if absent


class ExportRequest(StrictModel):
    """Take a conversation out as a file."""

    version: int | None = Field(None, ge=0)  # the head's, if absent
    include_state: bool = False


class RewindRequest(StrictModel):
    """Go on from an earlier version; 0 is the beginning."""

    version: int = Field(ge=0)


class ConversationReply(msgspec.Struct, frozen=True, kw_only=True):
    """A conversation's head."""

    id: str
    object: str = "conversation"
    created_at: int
    metadata: dict[str, str]
    version: int
    num_tokens: int
    model: str
    initial_state: str | None
    pinned: bool
    ttl_seconds: float | None  # since the last turn; null: it does not expire

    @classmethod
    def of(cls, head: Conversation) -> ConversationReply:
        """Say what the ledger says."""
        pinned = head.ttl_seconds >= PINNED_SECONDS
        return cls(
            id=name_of(head.conversation_id),
            created_at=int(head.created_at),
            metadata=head.metadata,
            version=head.version,
            num_tokens=head.num_tokens,
            model=head.model,
            pinned=pinned,
            ttl_seconds=None if pinned else head.ttl_seconds,
            initial_state=None if head.initial_state is None else head.initial_state.name,
        )


class ConversationDeleted(msgspec.Struct, frozen=True, kw_only=True):
    """A conversation is gone."""

    id: str
    object: str = "conversation.deleted"
    deleted: bool = True

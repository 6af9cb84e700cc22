"""Bodies of `/v1/conversations`."""

from __future__ import annotations

from typing import Annotated, ClassVar

import msgspec
from pydantic import Field, StringConstraints

from server.conversations.ledger import Conversation
from server.schemas.generation import ConversationId
from server.schemas.strict import StrictModel

MetadataKey = Annotated[str, StringConstraints(min_length=1, max_length=64)]
MetadataValue = Annotated[str, StringConstraints(max_length=512)]


class ConversationRequest(StrictModel):
    """Begin a conversation. It has no turns yet; completions and chat add them."""

    neutral_values: ClassVar[dict[str, tuple[object, ...]]] = {"items": ([],)}

    id: ConversationId | None = None  # ours; drawn at random if absent
    metadata: dict[MetadataKey, MetadataValue] = Field({}, max_length=16)
    initial_state: str | None = None  # name of a tuned state to begin from


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

    @classmethod
    def of(cls, head: Conversation) -> ConversationReply:
        """Say what the ledger says."""
        return cls(
            id=head.conversation_id,
            created_at=int(head.created_at),
            metadata=head.metadata,
            version=head.version,
            num_tokens=head.num_tokens,
            model=head.model,
            initial_state=None if head.initial_state is None else head.initial_state.name,
        )


class ConversationDeleted(msgspec.Struct, frozen=True, kw_only=True):
    """A conversation is gone."""

    id: str
    object: str = "conversation.deleted"
    deleted: bool = True

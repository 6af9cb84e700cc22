"""`/v1/conversations`: begin one, look at it, delete it. Turns are added by completions and chat."""

from __future__ import annotations

import re
import uuid
from typing import Annotated

from fastapi import Depends, Path, Response

from server.api.operations import Router
from server.conversations.ledger import ConversationNotFound
from server.parsing import json_body
from server.schemas.conversations import ConversationDeleted, ConversationReply, ConversationRequest
from server.schemas.generation import CONVERSATION_ID
from server.services import ServicesOf
from server.streaming import json_response

router = Router()

_IS_ID = re.compile(CONVERSATION_ID)


InPath = Annotated[str, Path(json_schema_extra={"pattern": f"^{CONVERSATION_ID}$"})]


def _existing(conversation_id: InPath) -> str:
    """Return the id in a request's path; what no conversation can be called does not exist."""
    if _IS_ID.fullmatch(conversation_id) is None:
        raise ConversationNotFound(conversation_id)
    return conversation_id


Id = Annotated[str, Depends(_existing)]


LINK = {"conversation_id": "$response.body#/id"}


@router.operation(
    "POST",
    "/v1/conversations",
    body=ConversationRequest,
    reply=ConversationReply,
    errors=[409],
    links={"retrieve_conversation": LINK, "delete_conversation": LINK},
)
async def create_conversation(
    body: Annotated[ConversationRequest, Depends(json_body(ConversationRequest))], services: ServicesOf
) -> Response:
    """Begin a conversation without turns."""
    conversation_id = body.id or f"conv_{uuid.uuid4().hex}"
    head = await services.turns.create(conversation_id, body.metadata)
    return json_response(ConversationReply.of(head))


@router.operation("GET", "/v1/conversations/{conversation_id}", reply=ConversationReply, errors=[404, 410])
async def retrieve_conversation(conversation_id: Id, services: ServicesOf) -> Response:
    """Describe a conversation."""
    head = await services.turns.get(conversation_id)
    reply = json_response(ConversationReply.of(head))
    reply.headers["etag"] = f'"{head.version}"'
    return reply


@router.operation(
    "DELETE",
    "/v1/conversations/{conversation_id}",
    reply=ConversationDeleted,
    errors=[404, 410],
    links={"retrieve_conversation": LINK},
)
async def delete_conversation(conversation_id: Id, services: ServicesOf) -> Response:
    """Delete a conversation, its turns and its states; a turn in progress will not be applied."""
    await services.turns.delete(conversation_id)
    return json_response(ConversationDeleted(id=conversation_id))

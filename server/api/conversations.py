"""`/v1/conversations`: begin one, look at it, delete it. Turns are added by completions and chat."""

from __future__ import annotations

import re
import uuid
from typing import Annotated

from fastapi import APIRouter, Depends, Response

from server.api.requests import initial_state_of
from server.conversations.ledger import ConversationNotFound
from server.parsing import json_body
from server.schemas.conversations import ConversationDeleted, ConversationReply, ConversationRequest
from server.schemas.generation import CONVERSATION_ID
from server.services import ServicesOf
from server.streaming import json_response

router = APIRouter()

_IS_ID = re.compile(CONVERSATION_ID)


def _existing(conversation_id: str) -> str:
    """Return the id in a request's path; what no conversation can be called does not exist."""
    if _IS_ID.fullmatch(conversation_id) is None:
        raise ConversationNotFound(conversation_id)
    return conversation_id


Id = Annotated[str, Depends(_existing)]


@router.post("/v1/conversations")
async def create_conversation(
    body: Annotated[ConversationRequest, Depends(json_body(ConversationRequest))], services: ServicesOf
) -> Response:
    """Begin a conversation without turns."""
    conversation_id = body.id or f"conv_{uuid.uuid4().hex}"
    initial_state = initial_state_of(body.initial_state, services)
    head = await services.turns.create(conversation_id, body.metadata, initial_state)
    return json_response(ConversationReply.of(head))


@router.get("/v1/conversations/{conversation_id}")
async def retrieve_conversation(conversation_id: Id, services: ServicesOf) -> Response:
    """Describe a conversation."""
    head = await services.turns.get(conversation_id)
    reply = json_response(ConversationReply.of(head))
    reply.headers["etag"] = f'"{head.version}"'
    return reply


@router.delete("/v1/conversations/{conversation_id}")
async def delete_conversation(conversation_id: Id, services: ServicesOf) -> Response:
    """Delete a conversation, its turns and its states; a turn in progress will not be applied."""
    await services.turns.delete(conversation_id)
    return json_response(ConversationDeleted(id=conversation_id))

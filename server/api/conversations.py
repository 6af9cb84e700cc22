"""`/v1/conversations`: begin one, look at it and at what was said, change that, fork it, go back, delete it."""

from __future__ import annotations

import re
import uuid
from typing import Annotated, Literal

import msgspec
from fastapi import Depends, Path, Query, Request, Response

from server.api.operations import IF_MATCH, Router
from server.api.replies import page_of
from server.api.requests import initial_state_of, version_in_header
from server.conversations import edits
from server.conversations.history import name_of, scoped
from server.conversations.ledger import Conversation, ConversationNotFound, Item
from server.parsing import json_body
from server.schemas.conversations import (
    PINNED_SECONDS,
    ConversationDeleted,
    ConversationReply,
    ConversationRequest,
    ConversationUpdate,
    ForkRequest,
    ItemsRequest,
    RewindRequest,
)
from server.schemas.generation import CONVERSATION_ID
from server.schemas.items import ItemList
from server.services import ServicesOf
from server.streaming import json_response
from server.tenants import tenant_of

router = Router()

_IS_ID = re.compile(CONVERSATION_ID)


InPath = Annotated[str, Path(json_schema_extra={"pattern": f"^{CONVERSATION_ID}$"})]


def _existing(request: Request, conversation_id: InPath) -> str:
    """Return the ledger's id for the one in a request's path; what no conversation can be called does not exist."""
    if _IS_ID.fullmatch(conversation_id) is None:
        raise ConversationNotFound(conversation_id)
    return scoped(tenant_of(request), conversation_id)


Id = Annotated[str, Depends(_existing)]
After = Annotated[str | None, Query()]
Limit = Annotated[int, Query(ge=1, le=100)]
Order = Literal["asc", "desc"]
# Names what else to say of an item; our items say everything they have.
Include = Annotated[list[str] | None, Query(alias="include[]")]


LINK = {"conversation_id": "$response.body#/id"}
SAME = {"conversation_id": "$request.path.conversation_id"}
ITEM = {**SAME, "item_id": "$response.body#/first_id"}
ITEM_LINKS = {"retrieve_item": ITEM, "delete_item": ITEM, "list_items": SAME}


@router.operation(
    "POST",
    "/v1/conversations",
    body=ConversationRequest,
    reply=ConversationReply,
    errors=[409],
    links=dict.fromkeys(
        (
            "retrieve_conversation",
            "update_conversation",
            "delete_conversation",
            "create_items",
            "list_items",
            "fork_conversation",
            "rewind_conversation",
        ),
        LINK,
    ),
)
async def create_conversation(
    request: Request,
    body: Annotated[ConversationRequest, Depends(json_body(ConversationRequest))],
    services: ServicesOf,
) -> Response:
    """Begin a conversation, without turns; what `items` say its first turn will read."""
    conversation_id = scoped(tenant_of(request), body.id or f"conv_{uuid.uuid4().hex}")
    items = [item.item() for item in body.items]
    initial_state = initial_state_of(body.initial_state, services)
    head = await services.turns.create(conversation_id, body.metadata, items=items, initial_state=initial_state)
    return described(head)


@router.operation("GET", "/v1/conversations/{conversation_id}", reply=ConversationReply, errors=[404, 410])
async def retrieve_conversation(conversation_id: Id, services: ServicesOf) -> Response:
    """Describe a conversation."""
    return described(await services.turns.get(conversation_id))


@router.operation(
    "POST",
    "/v1/conversations/{conversation_id}",
    body=ConversationUpdate,
    reply=ConversationReply,
    errors=[404, 410],
)
async def update_conversation(
    conversation_id: Id,
    body: Annotated[ConversationUpdate, Depends(json_body(ConversationUpdate))],
    services: ServicesOf,
) -> Response:
    """Change a conversation's metadata, how long it lives unused, or whether it lives for ever."""
    ttl_seconds = body.ttl_seconds
    if body.pinned is not None:
        ttl_seconds = PINNED_SECONDS if body.pinned else services.turns.conversation_ttl_seconds
    head = await services.turns.ledger.update(conversation_id, metadata=body.metadata, ttl_seconds=ttl_seconds)
    return described(head)


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
    return json_response(ConversationDeleted(id=name_of(conversation_id)))


# -- what was said ----------------------------------------------------------------------------------------------------


@router.operation(
    "POST",
    "/v1/conversations/{conversation_id}/items",
    body=ItemsRequest,
    reply=ItemList,
    errors=[404, 409, 410, 412],
    headers=[IF_MATCH],
    links=ITEM_LINKS,
)
async def create_items(
    request: Request,
    conversation_id: Id,
    body: Annotated[ItemsRequest, Depends(json_body(ItemsRequest))],
    services: ServicesOf,
    include: Include = None,
) -> Response:
    """Say something without asking for an answer; the next turn reads it."""
    items = [item.item() for item in body.items]
    await edits.add_items(services.turns, conversation_id, items, version_in_header(request))
    bodies = [msgspec.Raw(item.body) for item in items]
    return json_response(page_of(bodies, after=None, limit=len(bodies), newest_first=False))


@router.operation(
    "GET",
    "/v1/conversations/{conversation_id}/items",
    reply=ItemList,
    errors=[400, 404, 410],
    links=ITEM_LINKS,
)
async def list_items(
    conversation_id: Id,
    services: ServicesOf,
    after: After = None,
    limit: Limit = 20,
    order: Order = "desc",
    include: Include = None,
) -> Response:
    """Return a page of what was said."""
    _, history = await services.turns.history(conversation_id)
    bodies = [msgspec.Raw(item.body) for item in history.items]
    return json_response(page_of(bodies, after=after, limit=limit, newest_first=order == "desc"))


@router.operation(
    "GET", "/v1/conversations/{conversation_id}/items/{item_id}", media_type="application/json", errors=[404, 410]
)
async def retrieve_item(conversation_id: Id, item_id: str, services: ServicesOf, include: Include = None) -> Response:
    """Return one thing that was said."""
    _, history = await services.turns.history(conversation_id)
    return Response(_find(history.items, item_id).body, media_type="application/json")


@router.operation(
    "DELETE",
    "/v1/conversations/{conversation_id}/items/{item_id}",
    reply=ConversationReply,
    errors=[400, 404, 409, 410, 412],
    headers=[IF_MATCH],
)
async def delete_item(request: Request, conversation_id: Id, item_id: str, services: ServicesOf) -> Response:
    """Take something back; the next turn goes on from the state before it, and reads again what came after."""
    await edits.delete_item(services.turns, conversation_id, item_id, version_in_header(request))
    return described(await services.turns.get(conversation_id))


# -- where it goes on -------------------------------------------------------------------------------------------------


@router.operation(
    "POST",
    "/v1/conversations/{conversation_id}/fork",
    body=ForkRequest,
    reply=ConversationReply,
    errors=[404, 409, 410],
    links={"list_items": LINK, "delete_conversation": LINK},
)
async def fork_conversation(
    request: Request,
    conversation_id: Id,
    body: Annotated[ForkRequest, Depends(json_body(ForkRequest))],
    services: ServicesOf,
) -> Response:
    """Begin another conversation with the history of this one, up to any of its versions."""
    fork_id = scoped(tenant_of(request), body.id or f"conv_{uuid.uuid4().hex}")
    head = await services.turns.fork(conversation_id, fork_id, version=body.version, metadata=body.metadata)
    return described(head)


@router.operation(
    "POST",
    "/v1/conversations/{conversation_id}/rewind",
    body=RewindRequest,
    reply=ConversationReply,
    errors=[404, 409, 410, 412],
    headers=[IF_MATCH],
)
async def rewind_conversation(
    request: Request,
    conversation_id: Id,
    body: Annotated[RewindRequest, Depends(json_body(RewindRequest))],
    services: ServicesOf,
) -> Response:
    """Go on from an earlier version. That is a new version, and the ones between can still be gone back to."""
    await edits.rewind(services.turns, conversation_id, body.version, version_in_header(request))
    return described(await services.turns.get(conversation_id))


def described(head: Conversation) -> Response:
    """Return the reply that describes a conversation."""
    reply = json_response(ConversationReply.of(head))
    reply.headers["etag"] = f'"{head.version}"'
    return reply


def _find(items: list[Item], item_id: str) -> Item:
    for item in items:
        if item.item_id == item_id:
            return item
    raise edits.ItemNotFound(item_id)

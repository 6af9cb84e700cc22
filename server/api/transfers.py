"""`/v1/conversations/{id}/export` and `/v1/conversations/import`: a conversation as a file, out and in."""

from __future__ import annotations

import re
import uuid
from typing import Annotated

from fastapi import Depends, Query, Request, Response

from server.api.conversations import LINK, Id, described
from server.api.operations import Router
from server.conversations.history import name_of, scoped
from server.conversations.portable import MEDIA_TYPE
from server.errors import BadRequest
from server.parsing import body_of, json_body
from server.schemas.conversations import ConversationReply, ExportRequest
from server.schemas.generation import CONVERSATION_ID
from server.services import ServicesOf
from server.tenants import budget_of, tenant_of

router = Router()

IMPORT_PATH = "/v1/conversations/import"
SUFFIX = ".sostenuto"

_IS_ID = re.compile(CONVERSATION_ID)


@router.operation(
    "POST",
    "/v1/conversations/{conversation_id}/export",
    body=ExportRequest,
    media_type=MEDIA_TYPE,
    errors=[404, 409, 410],
)
async def export_conversation(
    request: Request,
    conversation_id: Id,
    body: Annotated[ExportRequest, Depends(json_body(ExportRequest))],
    services: ServicesOf,
) -> Response:
    """Return a conversation as a file, up to any of its versions, with the state after it if that is asked for."""
    budget = budget_of(request)
    if body.include_state:
        budget.begin()  # it may have to be computed
    try:
        file = await services.transfers.export(
            conversation_id, body.version, include_state=body.include_state, spend_tokens=budget.spend_tokens
        )
    finally:
        if body.include_state:
            budget.end()
    disposition = f'attachment; filename="{name_of(conversation_id)}{SUFFIX}"'
    return Response(file, media_type=MEDIA_TYPE, headers={"content-disposition": disposition})


@router.operation(
    "POST",
    IMPORT_PATH,
    file=MEDIA_TYPE,
    reply=ConversationReply,
    errors=[409, 410],
    links={"retrieve_conversation": LINK, "delete_conversation": LINK},
)
async def import_conversation(
    request: Request,
    services: ServicesOf,
    conversation_id: Annotated[str | None, Query(alias="id", pattern=f"^{CONVERSATION_ID}$")] = None,
    without_state: bool = False,
) -> Response:
    """Begin a conversation with what an exported file holds, all of it verified; or nothing."""
    name = conversation_id or f"conv_{uuid.uuid4().hex}"
    if _IS_ID.fullmatch(name) is None:
        raise BadRequest("id: no conversation can have this name.", "id")
    data = await body_of(request)
    head = await services.transfers.import_file(data, scoped(tenant_of(request), name), without_state=without_state)
    return described(head)

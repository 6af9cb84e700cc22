"""`/v1/chat/completions/{id}`: chat completions that were stored."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import msgspec
from fastapi import Depends, Query, Request, Response

from server.api.operations import Router
from server.api.replies import page_of
from server.errors import ChatCompletionNotFound
from server.items import text_of
from server.parsing import json_body
from server.schemas.chat import ChatCompletion, ChatCompletionDeleted, ChatCompletionUpdate
from server.schemas.items import ItemList
from server.services import ServicesOf
from server.stored_chats import StoredChat
from server.streaming import json_response
from server.tenants import tenant_of

router = Router()

_METADATA = re.compile(r"metadata\[(.+)\]")

_IS_ID = re.compile(r"chatcmpl-[A-Za-z0-9]{1,64}")


def _existing(completion_id: str) -> str:
    """Return the id in a request's path; what no completion can be called does not exist."""
    if _IS_ID.fullmatch(completion_id) is None:
        raise ChatCompletionNotFound(completion_id)
    return completion_id


Id = Annotated[str, Depends(_existing)]
Limit = Annotated[int, Query(ge=1, le=100)]
Order = Literal["asc", "desc"]


@router.operation("GET", "/v1/chat/completions", reply=ItemList, errors=[400])
async def list_chat_completions(
    request: Request,
    services: ServicesOf,
    after: str | None = None,
    limit: Limit = 20,
    order: Order = "asc",
    model: str | None = None,
) -> Response:
    """Return a page of the stored completions, of those with the metadata `metadata[KEY]=VALUE` if any is asked for."""
    wanted = {found[1]: value for name, value in request.query_params.items() if (found := _METADATA.fullmatch(name))}

    def matches(stored: StoredChat) -> bool:
        has_model = model is None or msgspec.json.decode(stored.reply, type=_Named).model == model
        return has_model and wanted.items() <= stored.metadata.items()

    page, has_more = await services.stored_chats.page(
        tenant_of(request), matches, after=after, limit=limit, newest_first=order == "desc"
    )
    return json_response(
        ItemList(
            data=[msgspec.Raw(msgspec.json.encode(_completion_of(stored))) for stored in page],
            first_id=page[0].completion_id if page else None,
            last_id=page[-1].completion_id if page else None,
            has_more=has_more,
        )
    )


class _Named(msgspec.Struct):
    model: str


def _completion_of(stored: StoredChat) -> ChatCompletion:
    completion = msgspec.json.decode(stored.reply, type=ChatCompletion)
    completion.metadata = stored.metadata
    return completion


@router.operation("GET", "/v1/chat/completions/{completion_id}", reply=ChatCompletion, errors=[404])
async def retrieve_chat_completion(request: Request, completion_id: Id, services: ServicesOf) -> Response:
    """Return a stored completion."""
    return json_response(_completion_of(await services.stored_chats.find(tenant_of(request), completion_id)))


@router.operation(
    "POST", "/v1/chat/completions/{completion_id}", body=ChatCompletionUpdate, reply=ChatCompletion, errors=[404]
)
async def update_chat_completion(
    request: Request,
    completion_id: Id,
    body: Annotated[ChatCompletionUpdate, Depends(json_body(ChatCompletionUpdate))],
    services: ServicesOf,
) -> Response:
    """Change the metadata of a stored completion."""
    stored = await services.stored_chats.update(tenant_of(request), completion_id, body.metadata)
    return json_response(_completion_of(stored))


@router.operation("DELETE", "/v1/chat/completions/{completion_id}", reply=ChatCompletionDeleted, errors=[404])
async def delete_chat_completion(request: Request, completion_id: Id, services: ServicesOf) -> Response:
    """Delete a stored completion; a conversation that it was a turn of remembers the turn."""
    await services.stored_chats.delete(tenant_of(request), completion_id)
    return json_response(ChatCompletionDeleted(id=completion_id))


@router.operation("GET", "/v1/chat/completions/{completion_id}/messages", reply=ItemList, errors=[400, 404])
async def list_chat_messages(
    request: Request,
    completion_id: Id,
    services: ServicesOf,
    after: str | None = None,
    limit: Limit = 20,
    order: Order = "asc",
) -> Response:
    """Return a page of the messages that the completion answers."""
    stored = await services.stored_chats.find(tenant_of(request), completion_id)
    messages = [_message_of(msgspec.json.decode(body)) for body in stored.inputs]
    bodies = [msgspec.Raw(msgspec.json.encode(message)) for message in messages]
    return json_response(page_of(bodies, after=after, limit=limit, newest_first=order == "desc"))


def _message_of(item: dict[str, Any]) -> dict[str, Any]:
    """Return an item as OpenAI's stored messages are; a call is a message of its own."""
    message = {"id": item["id"], "role": "assistant", "content": None, "content_parts": None, "refusal": None}
    match item["type"]:
        case "function_call":
            function = {"name": item["name"], "arguments": item["arguments"]}
            return {**message, "tool_calls": [{"id": item["call_id"], "type": "function", "function": function}]}
        case "function_call_output":
            return {**message, "role": "tool", "content": item["output"], "tool_call_id": item["call_id"]}
        case _:
            return {**message, "role": item["role"], "content": text_of(item["content"])}

"""`/v1/responses`: answers that can be continued, asked for again, and picked up where a connection broke."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator
from functools import partial
from typing import Annotated, Literal

import msgspec
from fastapi import Depends, Query, Request
from fastapi import Response as HttpResponse

from server.api.operations import IDEMPOTENCY_KEY, Router
from server.api.replays import replayed
from server.api.replies import page_of
from server.api.requests import begin, check_model
from server.conversations.history import scoped
from server.conversations.ledger import (
    ConversationBusy,
    ConversationExpired,
    ConversationNotFound,
    LedgerError,
    LedgerUnavailable,
)
from server.errors import BadRequest, IdempotencyInProgress
from server.frames import KEEP_ALIVE
from server.idempotency import REPLAYED, Kept, key_of
from server.parsing import json_body
from server.responses.answering import Answering
from server.responses.archive import POLL_SECONDS, UNFINISHED, Archive, Stored, is_hidden
from server.responses.errors import ResponseNotFound
from server.responses.writer import Event, frames_after
from server.runs import END_OF_FRAME
from server.schemas.items import ItemList
from server.schemas.responses import (
    RESPONSE_ID,
    InputTokensReply,
    InputTokensRequest,
    Response,
    ResponseDeleted,
    ResponseFailure,
    ResponseRequest,
)
from server.services import Services, ServicesOf
from server.streaming import RecordedStream, json_response, respond
from server.tenants import tenant_of

router = Router()

_IS_ID = re.compile(RESPONSE_ID)


def _existing(response_id: str) -> str:
    if _IS_ID.fullmatch(response_id) is None:
        raise ResponseNotFound(response_id)
    return response_id


Id = Annotated[str, Depends(_existing)]


LINK = {"response_id": "$response.body#/id"}


@router.operation(
    "POST",
    "/v1/responses",
    body=ResponseRequest,
    reply=Response,
    chunk=Event,
    errors=[404, 409, 410, 422],
    headers=[IDEMPOTENCY_KEY],
    links={"retrieve_response": LINK, "list_input_items": LINK, "delete_response": LINK, "cancel_response": LINK},
)
async def create_response(
    request: Request, body: Annotated[ResponseRequest, Depends(json_body(ResponseRequest))], services: ServicesOf
) -> HttpResponse:
    """Answer the input."""
    check_model(body.model, services)
    tenant = tenant_of(request)
    answering = Answering(services, body, tenant)
    key = await key_of(request, "" if body.conversation is None else scoped(tenant, body.conversation.id))
    try:
        attempt = await services.claims.attempt(key, answering.draft.response_id)
    except IdempotencyInProgress as error:
        if not body.background:
            raise
        return await _as_it_stands(error, body, tenant, services)
    if isinstance(attempt, Kept):
        return replayed(attempt.reply, _frames_of, stream=body.stream)
    answering.attempt_as(attempt)
    begin_work = partial(begin, request, services, body, attempt, answering.work)
    if not body.background:
        generation = await begin_work()
        return await respond(request, generation, answering.writer, services.metrics.http, stream=body.stream)
    try:
        await answering.announce("queued")
        run = await services.runs.start(answering.draft.response_id, begin_work, answering.writer)
    except BaseException:
        with contextlib.suppress(LedgerError):  # then it is queued for nobody until it expires
            await answering.withdraw()
        await attempt.release()
        raise
    if body.stream:
        return RecordedStream(run.read(), services.metrics.http)
    return json_response(answering.draft.begun("queued"))


async def _as_it_stands(
    error: IdempotencyInProgress, body: ResponseRequest, tenant: str, services: Services
) -> HttpResponse:
    """Return the response that an equal request has begun in the background; raises `error` if it can't be had yet."""
    run = services.runs.find(error.reply_id)
    try:
        stored = await services.archive.find(tenant, error.reply_id)
    except ResponseNotFound:
        raise error from None
    if not body.stream:
        return replayed(msgspec.json.encode(stored.response), _frames_of, stream=False)
    if run is None:
        raise error
    return RecordedStream(run.read(), services.metrics.http, REPLAYED)


def _frames_of(reply: bytes) -> bytes:
    return frames_after(msgspec.json.decode(reply, type=Response), 0)


@router.operation(
    "POST", "/v1/responses/input_tokens", body=InputTokensRequest, reply=InputTokensReply, errors=[404, 409, 410]
)
async def count_input_tokens(
    request: Request, body: Annotated[InputTokensRequest, Depends(json_body(InputTokensRequest))], services: ServicesOf
) -> HttpResponse:
    """Say how many tokens the model would read for an input, history included."""
    check_model(body.model, services)
    answering = Answering(services, body.model_copy(update={"store": False}), tenant_of(request))
    return json_response(InputTokensReply(input_tokens=await answering.count()))


@router.operation("GET", "/v1/responses/{response_id}", reply=Response, chunk=Event, errors=[400, 404])
async def retrieve_response(
    request: Request,
    response_id: Id,
    services: ServicesOf,
    stream: bool = False,
    starting_after: Annotated[int | None, Query(ge=0)] = None,
) -> HttpResponse:
    """Return a response as it stands, or its events from behind number `starting_after` on."""
    tenant = tenant_of(request)
    stored = await services.archive.find(tenant, response_id)
    if not stream:
        return json_response(stored.response)
    start = 0 if starting_after is None else starting_after + 1
    run = services.runs.find(response_id)
    if run is not None:
        return RecordedStream(run.read(start), services.metrics.http)
    return RecordedStream(_followed(services.archive, tenant, stored.response, start), services.metrics.http)


async def _followed(archive: Archive, tenant: str, response: Response, start: int) -> AsyncIterator[bytes]:
    """Yield the events of a response that is not generated here, its end as soon as the ledger knows of it."""
    if response.status in UNFINISHED and start == 0:
        yield (begun := frames_after(response, 0))
        start = begun.count(END_OF_FRAME)
    while response.status in UNFINISHED:
        try:
            async for stored in archive.followed(tenant, response.id):
                response = stored.response
                yield KEEP_ALIVE
        except LedgerUnavailable:
            await asyncio.sleep(POLL_SECONDS)
        except ResponseNotFound:
            gone = ResponseFailure(code="response_not_found", message="The response was deleted.")
            response = msgspec.structs.replace(response, status="failed", error=gone)
    yield frames_after(response, start)


async def _ended(services: Services, tenant: str, response_id: str) -> Stored:
    """End a response that is being generated, wherever that is, and return how it stands then."""
    stored = await services.archive.find(tenant, response_id)  # first: nobody ends what is another tenant's
    run = services.runs.find(response_id)
    if run is not None:
        run.cancel()
        await run.wait()
        return await services.archive.find(tenant, response_id)
    if stored.response.background and stored.response.status in UNFINISHED:
        await services.archive.ask_for_end(tenant, response_id)
        stored = [stood async for stood in services.archive.followed(tenant, response_id)][-1]
    return stored


@router.operation("DELETE", "/v1/responses/{response_id}", reply=ResponseDeleted, errors=[404])
async def delete_response(request: Request, response_id: Id, services: ServicesOf) -> HttpResponse:
    """Delete a response. What it said stays while its chain is continued, and goes with the last response of that."""
    tenant = tenant_of(request)
    await _ended(services, tenant, response_id)
    stored = await services.archive.delete(tenant, response_id)
    if is_hidden(stored.log_id):
        await _drop_log(services, tenant, stored)
    return json_response(ResponseDeleted(id=response_id))


async def _drop_log(services: Services, tenant: str, deleted: Stored) -> None:
    """Delete the log of a deleted response if that was the last to be found there, and nobody continues it now.

    What is being continued stays; if that comes to nothing, until it expires.
    """
    is_forgotten = partial(services.archive.is_forgotten, tenant, deleted.log_id)
    with contextlib.suppress(ConversationNotFound, ConversationExpired, ConversationBusy):
        if deleted.response.status not in UNFINISHED:
            await services.turns.delete_if(deleted.log_id, is_forgotten)
        elif await is_forgotten():  # its own turn holds the log, and is not to be applied any more
            await services.turns.delete(deleted.log_id)


@router.operation("POST", "/v1/responses/{response_id}/cancel", reply=Response, errors=[400, 404])
async def cancel_response(request: Request, response_id: Id, services: ServicesOf) -> HttpResponse:
    """End a response that is generated in the background; one that has ended stays as it is."""
    tenant = tenant_of(request)
    stored = await services.archive.find(tenant, response_id)
    if not stored.response.background:
        raise BadRequest("response_id: only a response in the background can be cancelled.", "response_id")
    return json_response((await _ended(services, tenant, response_id)).response)


@router.operation("GET", "/v1/responses/{response_id}/input_items", reply=ItemList, errors=[400, 404])
async def list_input_items(
    request: Request,
    response_id: Id,
    services: ServicesOf,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> HttpResponse:
    """Return a page of what the response was asked."""
    stored = await services.archive.find(tenant_of(request), response_id)
    return json_response(page_of(stored.inputs, after=after, limit=limit, newest_first=order == "desc"))

"""Which log a response becomes an entry of: a conversation's, the one its predecessor ends, or one of its own."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass

from engine.messages import CheckpointRef
from server.conversations.history import scoped
from server.conversations.ledger import ConversationBusy, LedgerError, VersionConflict
from server.conversations.open_turn import OpenTurn
from server.conversations.turns import ConversationSelector, Turns
from server.responses.archive import HIDDEN, Archive, is_hidden
from server.responses.errors import PreviousResponseNotFound, PreviousResponseUnfinished, ResponseNotFound
from server.schemas.responses import ResponseRequest

KIND = "responses"


def _new_log_id(tenant: str) -> str:
    return scoped(tenant, f"{HIDDEN}{uuid.uuid4().hex}")


@dataclass(frozen=True, slots=True)
class Predecessor:
    """The entry that a response continues."""

    log_id: str
    version: int


async def predecessor_of(body: ResponseRequest, archive: Archive, tenant: str) -> Predecessor | None:
    """Return what `previous_response_id` names; raises `PreviousResponseNotFound`, `PreviousResponseUnfinished`."""
    if body.previous_response_id is None:
        return None
    try:
        stored = await archive.find(tenant, body.previous_response_id)
    except ResponseNotFound:
        raise PreviousResponseNotFound(body.previous_response_id) from None
    if stored.turn is None:
        raise PreviousResponseUnfinished(body.previous_response_id)
    return Predecessor(stored.log_id, stored.turn.version)


@contextlib.asynccontextmanager
async def opened(
    turns: Turns, body: ResponseRequest, tenant: str, predecessor: Predecessor | None
) -> AsyncGenerator[OpenTurn]:
    """Hold the log that the response becomes an entry of. A log that was made for it goes if nothing is committed.

    A chain that goes on where it ends grows; one that is continued elsewhere, or by two at once, branches.
    """
    async with contextlib.AsyncExitStack() as stack:
        if body.conversation is not None:
            selector = ConversationSelector(scoped(tenant, body.conversation.id))
            yield await stack.enter_async_context(turns.open(selector))
            return
        if predecessor is not None and is_hidden(predecessor.log_id) and body.store:
            try:
                selector = ConversationSelector(predecessor.log_id)
                turn = await stack.enter_async_context(turns.open(selector, if_match=predecessor.version))
            except (ConversationBusy, VersionConflict):
                pass
            else:
                yield turn
                return
        yield await stack.enter_async_context(_of_its_own(turns, _new_log_id(tenant), predecessor))


@contextlib.asynccontextmanager
async def _of_its_own(turns: Turns, log_id: str, predecessor: Predecessor | None) -> AsyncGenerator[OpenTurn]:
    is_committed = False
    borrowed: Mapping[int, CheckpointRef] = {}
    try:
        if predecessor is not None:
            borrowed = await turns.branch(predecessor.log_id, log_id, version=predecessor.version, kind=KIND)
        async with turns.open(ConversationSelector(log_id, create=True, kind=KIND)) as turn:
            turn.borrow(borrowed)
            try:
                yield turn
            finally:
                is_committed = turn.committed
    finally:
        if not is_committed:
            with contextlib.suppress(LedgerError):  # then it expires, empty
                await asyncio.shield(turns.discard(log_id))

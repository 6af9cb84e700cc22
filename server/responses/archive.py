"""Responses that can be asked for again.

A finished response is part of its turn, and so committed with it. Beside it stands a pointer, written before the turn
begins: which log to look in, and what is known of a response that has not come to an end, or to a bad one.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

import msgspec

from server.conversations.history import name_of, scoped
from server.conversations.ledger import (
    ConversationExpired,
    ConversationNotFound,
    Document,
    Item,
    Ledger,
    LedgerUnavailable,
    Turn,
)
from server.presence import Presence
from server.responses.errors import ResponseNotFound
from server.schemas.responses import Response, ResponseFailure

KIND = "response"
END_KIND = "response_end"  # of a response that somebody asked another server to end
END_TTL_SECONDS = 3600.0
POLL_SECONDS = 0.5  # how often to ask the ledger what another server does


HIDDEN = "~"  # no client's name for a conversation begins like this


def is_hidden(log_id: str) -> bool:
    """Say whether the log is one of responses, which has no name."""
    return name_of(log_id).startswith(HIDDEN)


class Pointer(msgspec.Struct, frozen=True, kw_only=True):
    """Where a response will be, and what it is until then."""

    log_id: str
    owner: str  # the server that generates it
    response: Response
    inputs: list[msgspec.Raw]


@dataclass(frozen=True, slots=True)
class Stored:
    """A response as it stands, and the turn that it is part of once it has one."""

    log_id: str
    response: Response
    inputs: list[msgspec.Raw]
    turn: Turn | None = None


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Pointer)
_response_decoder = msgspec.json.Decoder(Response)

UNFINISHED = ("queued", "in_progress")
UNTOLD = ResponseFailure(code="store_unavailable", message="The response ended while the ledger did not answer.")
LOST = ResponseFailure(code="server_restarted", message="The server ended before the response was complete.")


class Archive:
    """The responses of all tenants."""

    def __init__(self, ledger: Ledger, presence: Presence, ttl_seconds: float) -> None:
        self._ledger = ledger
        self._presence = presence
        self._ttl_seconds = ttl_seconds
        self._generated_here: set[str] = set()  # the documents of responses that this server is at work on

    async def note(self, tenant: str, log_id: str, response: Response, inputs: Sequence[Item]) -> None:
        """Remember how a response stands that is not, or never will be, part of a turn of the log."""
        pointer = Pointer(
            log_id=log_id,
            owner=self._presence.owner,
            response=response,
            inputs=[msgspec.Raw(item.body) for item in inputs],
        )
        document = Document(
            kind=KIND,
            document_id=scoped(tenant, response.id),
            body=_encoder.encode(pointer),
            created_at=time.time(),
            ttl_seconds=self._ttl_seconds,
        )
        if response.status in UNFINISHED:
            self._generated_here.add(document.document_id)  # before anybody can read it
        await self._ledger.put_document(document)

    async def is_noted(self, tenant: str, response_id: str) -> bool:
        """Say whether anything was noted of the response, and not deleted since."""
        return await self._ledger.get_document(KIND, scoped(tenant, response_id)) is not None

    def ended(self, tenant: str, response_id: str) -> None:
        """Say that this server works on the response no more, whether or not that could be noted."""
        self._generated_here.discard(scoped(tenant, response_id))

    async def find(self, tenant: str, response_id: str) -> Stored:
        """Return a response; raises `ResponseNotFound`."""
        is_generated_here = scoped(tenant, response_id) in self._generated_here  # first: if it ends now, it is not lost
        document = await self._ledger.get_document(KIND, scoped(tenant, response_id))
        if document is None:
            raise ResponseNotFound(response_id)
        pointer = _decoder.decode(document.body)
        response = pointer.response
        try:
            turn = await self._ledger.find_reply(pointer.log_id, response_id) if pointer.log_id else None
        except (ConversationNotFound, ConversationExpired):
            if not is_hidden(pointer.log_id):
                raise ResponseNotFound(response_id) from None  # it went with its conversation
            turn = None  # the log was its own, and went when the response came to nothing
        if turn is not None:
            inputs = [msgspec.Raw(item.body) for item in turn.items[turn.num_carried :] if not item.answer_id]
            return Stored(pointer.log_id, _response_decoder.decode(turn.reply), inputs, turn)
        if response.status in UNFINISHED and not is_generated_here:
            if pointer.owner == self._presence.owner:
                response = msgspec.structs.replace(response, status="failed", error=UNTOLD)
            elif not await self._presence.lives(pointer.owner):
                response = msgspec.structs.replace(response, status="failed", error=LOST)
        return Stored(pointer.log_id, response, pointer.inputs)

    async def delete(self, tenant: str, response_id: str) -> Stored:
        """Let nobody find the response any more; returns it as it was; raises `ResponseNotFound`."""
        stored = await self.find(tenant, response_id)
        await self.forget(tenant, response_id)
        return stored

    async def forget(self, tenant: str, response_id: str) -> None:
        """Let nobody find the response, if anybody could."""
        self.ended(tenant, response_id)
        await self._ledger.delete_document(KIND, scoped(tenant, response_id))

    # -- what another server generates --------------------------------------------------------------------------------

    async def ask_for_end(self, tenant: str, response_id: str) -> None:
        """Let the server that generates the response end it soon."""
        document = Document(
            kind=END_KIND,
            document_id=scoped(tenant, response_id),
            body=b"",
            created_at=time.time(),
            ttl_seconds=END_TTL_SECONDS,
        )
        await self._ledger.put_document(document)

    async def asked_to_end(self, tenant: str, response_id: str) -> None:
        """Return when another server asks for the end of the response; an outage of the ledger delays that."""
        while True:
            await asyncio.sleep(POLL_SECONDS)
            with contextlib.suppress(LedgerUnavailable):
                if await self._ledger.get_document(END_KIND, scoped(tenant, response_id)) is not None:
                    return

    async def followed(self, tenant: str, response_id: str) -> AsyncGenerator[Stored]:
        """Yield how a response stands, again and again, until it has ended; raises as `find`."""
        while True:
            yield (stored := await self.find(tenant, response_id))
            if stored.response.status not in UNFINISHED:
                return
            await asyncio.sleep(POLL_SECONDS)

    async def is_forgotten(self, tenant: str, log_id: str) -> bool:
        """Say whether no response of the log can be found any more; looks for the newest first."""
        for turn in reversed(await self._ledger.turns(log_id)):
            if turn.reply_id and await self.is_noted(tenant, turn.reply_id):
                return False
        return True

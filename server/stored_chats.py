"""Chat completions that were asked to be stored, until somebody deletes them or their time to live runs out.

One without a conversation is stored whole. Of a turn only its place is: reply and messages are in the conversation's
log, committed with the turn, and gone when the conversation is deleted (promise P20). A place without a turn, as a
killed server may leave, is nothing.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

import msgspec

from server.conversations.history import scoped
from server.conversations.ledger import ConversationExpired, ConversationNotFound, Document, Item, Ledger
from server.errors import ChatCompletionNotFound

KIND = "chat_completion"
PAGE = 100


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """A stored completion, or in which log it is."""

    metadata: dict[str, str]
    log_id: str = ""
    reply: msgspec.Raw = msgspec.Raw(b"null")
    inputs: list[msgspec.Raw] = []


@dataclass(frozen=True, slots=True)
class StoredChat:
    """A stored completion."""

    completion_id: str
    metadata: dict[str, str]
    reply: bytes  # JSON
    inputs: Sequence[msgspec.Raw]  # items: the messages of the request


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Place)


class StoredChats:
    """The stored completions of all tenants."""

    def __init__(self, ledger: Ledger, ttl_seconds: float) -> None:
        self._ledger = ledger
        self._ttl_seconds = ttl_seconds

    async def put(
        self, tenant: str, completion_id: str, metadata: dict[str, str], reply: bytes, inputs: Sequence[Item]
    ) -> None:
        """Store a completion that belongs to no conversation."""
        place = Place(metadata=metadata, reply=msgspec.Raw(reply), inputs=[msgspec.Raw(item.body) for item in inputs])
        await self._write(tenant, completion_id, place, time.time())

    async def expect(self, tenant: str, completion_id: str, metadata: dict[str, str], log_id: str) -> None:
        """Say that the next turn of the log is to be a stored completion."""
        await self._write(tenant, completion_id, Place(metadata=metadata, log_id=log_id), time.time())

    async def find(self, tenant: str, completion_id: str) -> StoredChat:
        """Return a stored completion; raises `ChatCompletionNotFound`."""
        document = await self._ledger.get_document(_kind(tenant), completion_id)
        stored = None if document is None else await self._stored(document)
        if stored is None:
            raise ChatCompletionNotFound(completion_id)
        return stored

    async def update(self, tenant: str, completion_id: str, metadata: dict[str, str]) -> StoredChat:
        """Replace the metadata; its time to live begins anew; raises as `find`."""
        await self.find(tenant, completion_id)
        document = await self._ledger.get_document(_kind(tenant), completion_id)
        if document is None:
            raise ChatCompletionNotFound(completion_id)
        place = msgspec.structs.replace(_decoder.decode(document.body), metadata=metadata)
        await self._write(tenant, completion_id, place, document.created_at)
        return await self.find(tenant, completion_id)

    async def delete(self, tenant: str, completion_id: str) -> None:
        """Let nobody find it any more; raises as `find`. A conversation remembers its turn all the same."""
        await self.find(tenant, completion_id)
        await self.forget(tenant, completion_id)

    async def forget(self, tenant: str, completion_id: str) -> None:
        """Remove what is there, if anything is."""
        await self._ledger.delete_document(_kind(tenant), completion_id)

    async def page(
        self,
        tenant: str,
        matches: Callable[[StoredChat], bool],
        *,
        after: str | None,
        limit: int,
        newest_first: bool,
    ) -> tuple[list[StoredChat], bool]:
        """Return up to `limit` of those that match, behind the one called `after`, and whether there are more.

        Raises `DocumentNotFound`.
        """
        page: list[StoredChat] = []
        async for document in self._documents(tenant, after, newest_first):
            stored = await self._stored(document)
            if stored is None or not matches(stored):
                continue
            if len(page) == limit:
                return page, True
            page.append(stored)
        return page, False

    async def _documents(self, tenant: str, after: str | None, newest_first: bool) -> AsyncIterator[Document]:
        while True:
            documents = await self._ledger.documents(_kind(tenant), after=after, limit=PAGE, newest_first=newest_first)
            for document in documents:
                yield document
            if len(documents) < PAGE:
                return
            after = documents[-1].document_id

    async def _stored(self, document: Document) -> StoredChat | None:
        place = _decoder.decode(document.body)
        if not place.log_id:
            return StoredChat(document.document_id, place.metadata, bytes(place.reply), place.inputs)
        try:
            turn = await self._ledger.find_reply(place.log_id, document.document_id)
        except (ConversationNotFound, ConversationExpired):
            return None
        if turn is None:
            return None
        inputs = [msgspec.Raw(item.body) for item in turn.items[turn.num_carried :] if not item.answer_id]
        return StoredChat(document.document_id, place.metadata, turn.reply, inputs)

    async def _write(self, tenant: str, completion_id: str, place: Place, created_at: float) -> None:
        document = Document(
            kind=_kind(tenant),
            document_id=completion_id,
            body=_encoder.encode(place),
            created_at=created_at,
            ttl_seconds=self._ttl_seconds,
        )
        await self._ledger.put_document(document)


def _kind(tenant: str) -> str:
    """Return the kind of the tenant's documents: lists are of a kind, and nobody may see others'."""
    return scoped(tenant, KIND)

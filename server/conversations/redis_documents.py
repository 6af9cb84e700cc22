"""The documents in the ledger's Redis. Knows no conversation."""

from __future__ import annotations

from urllib.parse import quote

from server.conversations import records
from server.conversations.ledger import Document, DocumentNotFound, LedgerCorrupt
from server.conversations.redis_scripts import RedisScripts, milliseconds, new_call_id

DOCUMENT_SCRIPTS = ("put_document", "delete_document", "list_documents")


class RedisDocuments:
    """Documents as hashes that expire by themselves, and two sorted sets for each kind: by creation and by expiry.

    All keys of one kind share a hash tag.
    """

    def __init__(self, redis: RedisScripts) -> None:
        self._redis = redis

    async def put(self, document: Document, if_absent: bool) -> bool:
        """See `Ledger.put_document`."""
        status, *_ = await self._redis.run(
            "put_document",
            _keys(document.kind, document.document_id),
            new_call_id(),
            document.document_id.encode(),
            records.encode_document(document),
            repr(document.created_at),
            milliseconds(document.ttl_seconds),
            "absent" if if_absent else "any",
        )
        return bool(status == b"ok")

    async def get(self, kind: str, document_id: str) -> Document | None:
        """See `Ledger.get_document`."""
        record = await self._redis.command("HGET", _keys(kind, document_id)[0], "record")
        return None if record is None else records.decode_document(record, kind, document_id)

    async def delete(self, kind: str, document_id: str) -> bool:
        """See `Ledger.delete_document`."""
        _, was_there = await self._redis.run("delete_document", _keys(kind, document_id), document_id.encode())
        return bool(was_there)

    async def list(self, kind: str, after: str | None, limit: int, newest_first: bool) -> list[Document]:
        """See `Ledger.documents`."""
        prefix, *sets = _keys(kind, "")
        status, *reply = await self._redis.run(
            "list_documents",
            sets,
            prefix,
            "first" if after is None else "after",
            (after or "").encode(),
            limit,
            "newest" if newest_first else "oldest",
        )
        if status == b"missing":
            raise DocumentNotFound(f"there is no {kind} document {after!r}")
        return [
            records.decode_document(record, kind, _decode_id(document_id))
            for document_id, record in zip(reply[::2], reply[1::2], strict=True)
        ]


def _keys(kind: str, document_id: str) -> list[str]:
    """Return the keys of a document, of its kind's order of creation, and of its kind's order of expiry."""
    # The kind is quoted, so that it cannot break the hash tag; what follows the tag may be anything.
    tag = f"{{{quote(kind, safe='')}}}"
    return [f"rk:d:{tag}:{document_id}", f"rk:dc:{tag}", f"rk:de:{tag}"]


def _decode_id(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise LedgerCorrupt(f"the list of documents holds what is no id: {error}") from error

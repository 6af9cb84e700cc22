"""The ledger's contract: conversations, their turns, and who may add the next one; and small documents beside them.

The turn log is the truth. A turn is applied exactly once or not at all (P2), turns form one sequence (P5), and only the
holder of the current lease can append (P7); all three are decided inside the store, never by a client's clock or
memory. Implementations: SQLite (embedded) and Redis; one conformance suite tests both.

A log only grows. Its entries name their parents, so they form a tree, and the history of a conversation is the path
from its head to the empty history (`server.conversations.history`). A rewind or an edit is an entry, too.

LedgerError
├── ConversationNotFound     never existed, or its tombstone is gone too
├── ConversationExpired      existed; its time to live ran out or it was deleted (410)
├── ConversationExists       the id is taken
├── ConversationBusy         another turn holds the lease; says for how long at most
├── VersionConflict          the conversation is not at the version the turn was built on
├── LeaseLost                the lease ended or was taken over: fenced, nothing was written
├── DocumentNotFound         a list is to begin behind a document that is not there
├── LedgerCorrupt            a record is not what was asked for; nothing is continued from it
└── LedgerUnavailable        the store did not answer, or refused to write
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Sequence
from typing import Protocol

import msgspec

from engine.messages import CheckpointRef, InitialStateRef


class Durability(enum.StrEnum):
    """What a committed turn survives (promise P4)."""

    MEMORY = "memory"  # nothing
    ACKED = "acked"  # a kill of the server; a crash of the store's machine may lose about the last two seconds
    FSYNCED = "fsynced"  # a crash of the machine


class Item(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One message, thought, tool call or tool result, as clients see it."""

    item_id: str
    body: bytes  # JSON object, with its id
    answer_id: str = ""  # the answer it was read from; empty for what a client sent


class Answer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The tokens of an answer, where its items have been carried away from the turn that generated it."""

    answer_id: str  # the request id of that turn
    output_ids: list[int]
    opening: str = ""  # what its prompt ended with
    hint: str = ""  # what its prompt added to the user's message


class Turn(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of the log: exactly the tokens that were consumed and produced. Immutable.

    An entry without tokens is a *marker*: it moves the head to another parent, adds items that the next turn will
    render, or both. Its chain and number of tokens are its parent's.
    """

    version: int  # 1, 2, 3, ...
    parent_version: int = -1  # the entry it continues, 0 for the empty history; -1: the one before it (format 1)
    prompt_ids: list[int]  # turn border and new messages, as rendered and tokenized
    output_ids: list[int]  # exactly the delivered tokens
    chain: bytes  # of the whole history up to and including this turn
    num_tokens: int  # of the whole history up to and including this turn
    finish_reason: str  # empty for a marker
    seed: int
    created_at: float  # seconds since the epoch, for people; nothing is decided by it
    request_id: str
    items: list[Item] = []  # what it adds to the items of its path: carried ones, inputs, outputs
    num_carried: int = 0  # so many of `items` were said on another path, and are said again on this one
    answers: list[Answer] = []  # of the carried items that are answers
    opening: str = ""  # what the prompt ends with
    hint: str = ""  # what the prompt adds to the last user message
    preamble: str = ""  # the system text that the path begins with: instructions and tools
    reply_id: str = ""  # the id under which a client may ask for the reply again
    reply: bytes = b""  # the reply as JSON, if it may be asked for again


class Conversation(msgspec.Struct, frozen=True, kw_only=True):
    """The head of a log."""

    conversation_id: str
    version: int  # 0: no turn yet
    chain: bytes
    num_tokens: int
    model: str  # served name when it was created
    fingerprint: str  # of the weights its tokens belong to
    template: str  # chat template its borders are written in
    created_at: float
    ttl_seconds: float  # sliding: renewed by each turn (P14)
    metadata: dict[str, str] = {}
    kind: str = "conversation"  # or "responses": a chain of responses, which no client can name
    checkpoints: dict[int, CheckpointRef] = {}  # the known states, by the version after which they were taken
    initial_state: InitialStateRef | None = None  # what its history begins from; None: the zero state


class Document(msgspec.Struct, frozen=True, kw_only=True):
    """A small record beside the logs: a reply that can be asked for again, or what is known of one that is not done."""

    kind: str
    document_id: str
    body: bytes
    created_at: float  # seconds since the epoch; lists are in this order, then by id
    ttl_seconds: float


class Lease(msgspec.Struct, frozen=True, kw_only=True):
    """The right to append the next turn, until the store's clock says otherwise."""

    conversation_id: str
    owner: str
    fence: int  # grows with every lease of the conversation; the store refuses lower ones
    ttl_seconds: float


class LedgerError(Exception):
    """Base of everything a ledger raises."""


class ConversationNotFound(LedgerError):
    """No conversation of that id exists."""


class ConversationExpired(LedgerError):
    """The conversation existed and is gone: deleted, or its time to live ran out."""


class ConversationExists(LedgerError):
    """The id is taken."""


class ConversationBusy(LedgerError):
    """Another turn runs. `retry_after_seconds` is how long its lease can last at most without renewal."""

    def __init__(self, conversation_id: str, retry_after_seconds: float) -> None:
        self.conversation_id = conversation_id
        self.retry_after_seconds = retry_after_seconds
        super().__init__(f"conversation {conversation_id!r} has a turn in progress")


class VersionConflict(LedgerError):
    """The conversation is not at the expected version. `version` is where it is."""

    def __init__(self, conversation_id: str, expected: int, version: int) -> None:
        self.conversation_id = conversation_id
        self.expected = expected
        self.version = version
        super().__init__(f"conversation {conversation_id!r} is at version {version}, not {expected}")


class LeaseLost(LedgerError):
    """The lease ended or was taken over; nothing was written."""


class DocumentNotFound(LedgerError):
    """There is no document of that kind and id."""


class LedgerCorrupt(LedgerError):
    """A record is unreadable, belongs to another conversation, or does not fit its head. Never continued from."""


class LedgerUnavailable(LedgerError):
    """The store did not answer in time, or refused to write."""


class Ledger(Protocol):
    """Where conversations live. All methods may raise `LedgerUnavailable` and `LedgerCorrupt`."""

    durability: Durability  # of a commit that returned
    is_shared: bool  # whether other servers may have it open

    async def open(self) -> None:
        """Connect, check that promises can be kept, and recover from whatever ended the last process."""
        ...

    async def close(self) -> None:
        """Release everything."""
        ...

    async def create(self, conversation: Conversation, turns: Sequence[Turn] = ()) -> None:
        """Add a log with its first entries, all or nothing; raises `ConversationExists`.

        The head is that of the last entry, whatever `conversation` says; without one it is at version 0. It has no
        checkpoints. An expired or deleted id raises `ConversationExpired` while its tombstone lasts. Raises
        `ValueError` unless the entries have the versions 1, 2, 3, ...
        """
        ...

    async def get(self, conversation_id: str) -> Conversation:
        """Return the head; raises `ConversationNotFound` or `ConversationExpired`."""
        ...

    async def update(
        self, conversation_id: str, *, metadata: dict[str, str] | None = None, ttl_seconds: float | None = None
    ) -> Conversation:
        """Replace the metadata, or the time to live, which begins anew; return the head; raises as `get`."""
        ...

    async def turns(self, conversation_id: str, after_version: int = 0) -> list[Turn]:
        """Return all entries with a version above `after_version`, in order, on the path or not; raises as `get`."""
        ...

    async def find_reply(self, conversation_id: str, reply_id: str) -> Turn | None:
        """Return the entry with that `reply_id`, if there is one; raises as `get`."""
        ...

    async def acquire(self, conversation_id: str, owner: str, ttl_seconds: float) -> tuple[Lease, Conversation]:
        """Take the lease and read the head in one atomic step; raises as `get`, and `ConversationBusy`."""
        ...

    async def renew(self, lease: Lease) -> None:
        """Make the lease last `ttl_seconds` from now, by the store's clock; raises `LeaseLost`."""
        ...

    async def release(self, lease: Lease) -> None:
        """Give the lease back; no error if it is already lost."""
        ...

    async def commit(self, lease: Lease, turn: Turn) -> None:
        """Append `turn` if the lease is current and the head is at `turn.version - 1`, and end the lease, in one step.

        Renews the time to live. Raises `LeaseLost` or `VersionConflict`, and then nothing was written. A turn that is
        already there with the same `request_id` counts as committed: a commit whose reply was lost may be sent again.
        """
        ...

    async def point(
        self, conversation_id: str, version: int, checkpoint: CheckpointRef, drop: Collection[int] = ()
    ) -> list[CheckpointRef]:
        """Record the checkpoint of the state after entry `version`, and forget those of the versions in `drop`.

        Returns the references that nothing points to any more, for their blobs to be deleted: the dropped ones, one
        that was recorded for `version` before, or `checkpoint` itself when its chain is not that entry's or the log is
        gone (then nothing is dropped). What another version still points to is not among them. Needs no lease.
        """
        ...

    async def delete(self, conversation_id: str) -> Conversation:
        """Remove the conversation, turns and lease, leave a tombstone, return the last head; raises as `get`."""
        ...

    async def sweep(self) -> list[CheckpointRef]:
        """Turn expired conversations into tombstones; forget old tombstones and documents; returns checkpoints to
        delete.
        """
        ...

    async def put_document(self, document: Document, *, if_absent: bool = False) -> bool:
        """Write a document in place of any of the same kind and id, or only where there is none; durable as a commit.

        Says whether it was written; of several that are written `if_absent` at once exactly one is.
        """
        ...

    async def get_document(self, kind: str, document_id: str) -> Document | None:
        """Return the document, unless there is none or its time to live has run out."""
        ...

    async def delete_document(self, kind: str, document_id: str) -> bool:
        """Remove the document; say whether there was one."""
        ...

    async def documents(
        self, kind: str, *, after: str | None = None, limit: int = 100, newest_first: bool = False
    ) -> list[Document]:
        """Return up to `limit` documents of a kind in order of creation, beginning behind the one called `after`.

        Raises `DocumentNotFound` if there is none called `after`.
        """
        ...

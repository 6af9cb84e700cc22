"""The ledger's contract: conversations, their turns, and who may add the next one.

The turn log is the truth. A turn is applied exactly once or not at all (P2), turns form one sequence (P5), and only the
holder of the current lease can append (P7); all three are decided inside the store, never by a client's clock or
memory. Implementations: SQLite (embedded) and Redis; one conformance suite tests both.

LedgerError
├── ConversationNotFound     never existed, or its tombstone is gone too
├── ConversationExpired      existed; its time to live ran out or it was deleted (410)
├── ConversationExists       the id is taken
├── ConversationBusy         another turn holds the lease; says for how long at most
├── VersionConflict          the conversation is not at the version the turn was built on
├── LeaseLost                the lease ended or was taken over: fenced, nothing was written
├── LedgerCorrupt            a record is not what was asked for; nothing is continued from it
└── LedgerUnavailable        the store did not answer, or refused to write
"""

from __future__ import annotations

import enum
from typing import Protocol

import msgspec

from engine.messages import CheckpointRef, InitialStateRef
from engine.token_chain import root_digest


class Durability(enum.StrEnum):
    """What a committed turn survives (promise P4)."""

    MEMORY = "memory"  # nothing
    ACKED = "acked"  # a kill of the server; a crash of the store's machine may lose about the last two seconds
    FSYNCED = "fsynced"  # a crash of the machine


class Turn(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of the log: exactly the tokens that were consumed and produced. Immutable."""

    version: int  # 1, 2, 3, ...
    prompt_ids: list[int]  # turn border and new messages, as rendered and tokenized
    output_ids: list[int]  # exactly the delivered tokens
    chain: bytes  # of the whole history up to and including this turn
    num_tokens: int  # of the whole history up to and including this turn
    finish_reason: str
    seed: int
    created_at: float  # seconds since the epoch, for people; nothing is decided by it
    request_id: str


class Conversation(msgspec.Struct, frozen=True, kw_only=True):
    """The head of a conversation's log."""

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
    checkpoint: CheckpointRef | None = None  # the newest known state, at checkpoint_version
    checkpoint_version: int = 0
    initial_state: InitialStateRef | None = None  # what its history begins from; None: the zero state

    @property
    def root(self) -> bytes:
        """The chain of its empty history."""
        return root_digest(initial_state="" if self.initial_state is None else self.initial_state.fingerprint)


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


class LedgerCorrupt(LedgerError):
    """A record is unreadable, belongs to another conversation, or does not fit its head. Never continued from."""


class LedgerUnavailable(LedgerError):
    """The store did not answer in time, or refused to write."""


class Ledger(Protocol):
    """Where conversations live. All methods may raise `LedgerUnavailable` and `LedgerCorrupt`."""

    durability: Durability  # of a commit that returned

    async def open(self) -> None:
        """Connect, check that promises can be kept, and recover from whatever ended the last process."""
        ...

    async def close(self) -> None:
        """Release everything."""
        ...

    async def create(self, conversation: Conversation) -> None:
        """Add a conversation at version 0; raises `ConversationExists`.

        An expired or deleted id raises `ConversationExpired` while its tombstone lasts.
        """
        ...

    async def get(self, conversation_id: str) -> Conversation:
        """Return the head; raises `ConversationNotFound` or `ConversationExpired`."""
        ...

    async def turns(self, conversation_id: str, after_version: int = 0) -> list[Turn]:
        """Return the turns with a version above `after_version`, in order; raises as `get`."""
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

    async def point(self, conversation_id: str, version: int, checkpoint: CheckpointRef) -> CheckpointRef | None:
        """Record the checkpoint of the state after turn `version`, if it is newer than the recorded one.

        Returns the reference that nothing points to any more, for its blob to be deleted: the old one, or `checkpoint`
        itself when it came too late or the conversation is gone. Needs no lease.
        """
        ...

    async def delete(self, conversation_id: str) -> Conversation:
        """Remove the conversation, turns and lease, leave a tombstone, return the last head; raises as `get`."""
        ...

    async def sweep(self) -> list[CheckpointRef]:
        """Turn expired conversations into tombstones and forget old tombstones; returns checkpoints to delete."""
        ...

"""Records as the first release wrote them, before entries had parents. For tests that they are still read."""

from __future__ import annotations

import msgspec

from engine.messages import CheckpointRef
from server.conversations.ledger import Conversation, Turn

# The schema of version 1, as it was.
SCHEMA = """
CREATE TABLE conversations (
    conversation_id TEXT PRIMARY KEY,
    head BLOB NOT NULL,
    version INTEGER NOT NULL,
    chain BLOB NOT NULL,
    num_tokens INTEGER NOT NULL,
    request_id TEXT,
    ttl_seconds REAL NOT NULL,
    expires_at REAL NOT NULL,
    checkpoint BLOB,
    checkpoint_version INTEGER NOT NULL
) STRICT;
CREATE INDEX conversations_by_expiry ON conversations (expires_at);
CREATE TABLE turns (
    conversation_id TEXT NOT NULL,
    version INTEGER NOT NULL,
    record BLOB NOT NULL,
    PRIMARY KEY (conversation_id, version)
) STRICT;
CREATE TABLE tombstones (conversation_id TEXT PRIMARY KEY, until REAL NOT NULL) STRICT;
CREATE TABLE epoch (number INTEGER NOT NULL) STRICT;
INSERT INTO epoch VALUES (7);
PRAGMA user_version = 1;
"""


def head_record(conversation: Conversation) -> bytes:
    """Return the record of a conversation at its creation."""
    fields = {
        "conversation_id": conversation.conversation_id,
        "version": 0,
        "chain": conversation.chain,
        "num_tokens": 0,
        "model": conversation.model,
        "fingerprint": conversation.fingerprint,
        "template": conversation.template,
        "created_at": conversation.created_at,
        "ttl_seconds": conversation.ttl_seconds,
        "metadata": conversation.metadata,
        "checkpoint": None,
        "checkpoint_version": 0,
    }
    return msgspec.msgpack.encode([1, fields])


def turn_record(conversation_id: str, turn: Turn) -> bytes:
    """Return the record of a turn."""
    fields = {
        "version": turn.version,
        "prompt_ids": turn.prompt_ids,
        "output_ids": turn.output_ids,
        "chain": turn.chain,
        "num_tokens": turn.num_tokens,
        "finish_reason": turn.finish_reason,
        "seed": turn.seed,
        "created_at": turn.created_at,
        "request_id": turn.request_id,
    }
    return turn.chain + msgspec.msgpack.encode([1, conversation_id, fields])


def checkpoint_record(checkpoint: CheckpointRef) -> bytes:
    """Return the record of a checkpoint's name."""
    return msgspec.msgpack.encode(
        {
            "checkpoint_id": checkpoint.checkpoint_id,
            "num_tokens": checkpoint.num_tokens,
            "chain": checkpoint.chain,
            "num_bytes": checkpoint.num_bytes,
        }
    )

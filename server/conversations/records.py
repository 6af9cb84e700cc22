"""The ledger's records as bytes. Knows no store.

Every record begins with its format and names its conversation. A record that is damaged, newer than this code, or
that belongs elsewhere raises `LedgerCorrupt` on reading; it is never continued from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeVar

import msgspec

from engine.messages import CheckpointRef
from engine.token_chain import DIGEST_BYTES
from server.conversations.ledger import Conversation, LedgerCorrupt, Turn

Record = TypeVar("Record")


class HeadRecord(msgspec.Struct, frozen=True, array_like=True):
    """What a conversation is from its creation on; what its turns change is kept beside it."""

    format: Literal[1]
    conversation: Conversation


class TurnRecord(msgspec.Struct, frozen=True, array_like=True):
    """One turn, and whose it is."""

    format: Literal[1]
    conversation_id: str
    turn: Turn


_encoder = msgspec.msgpack.Encoder()
_head_decoder = msgspec.msgpack.Decoder(HeadRecord)
_turn_decoder = msgspec.msgpack.Decoder(TurnRecord)
_checkpoint_decoder = msgspec.msgpack.Decoder(CheckpointRef)


def encode_head(conversation: Conversation) -> bytes:
    """Return the record of a conversation as it is created."""
    return _encoder.encode(HeadRecord(1, conversation))


def decode_head(
    data: bytes,
    conversation_id: str,
    *,
    version: int,
    chain: bytes,
    num_tokens: int,
    checkpoint: bytes | None,
    checkpoint_version: int,
) -> Conversation:
    """Return the head of `conversation_id`: its record, brought to where its turns have taken it."""
    created = _decode(_head_decoder, data, f"the head of conversation {conversation_id!r}").conversation
    if created.conversation_id != conversation_id:
        raise LedgerCorrupt(f"the head of conversation {conversation_id!r} is another conversation's")
    return msgspec.structs.replace(
        created,
        version=version,
        chain=chain,
        num_tokens=num_tokens,
        checkpoint=None if checkpoint is None else decode_checkpoint(checkpoint),
        checkpoint_version=checkpoint_version,
    )


def encode_turn(conversation_id: str, turn: Turn) -> bytes:
    """Return the record of one turn. It begins with the turn's chain, which a store can compare without decoding."""
    if len(turn.chain) != DIGEST_BYTES:
        raise ValueError(f"a chain is {DIGEST_BYTES} bytes, not {len(turn.chain)}")
    return turn.chain + _encoder.encode(TurnRecord(1, conversation_id, turn))


def decode_turns(records: Sequence[bytes], head: Conversation, after_version: int) -> list[Turn]:
    """Return the turns after `after_version` up to the head; raises `LedgerCorrupt` unless they are exactly those."""
    whose = f"conversation {head.conversation_id!r}"
    decoded = [_decode(_turn_decoder, data[DIGEST_BYTES:], f"a turn of {whose}") for data in records]
    if any(record.conversation_id != head.conversation_id for record in decoded):
        raise LedgerCorrupt(f"{whose} holds a turn of another conversation")
    turns = [record.turn for record in decoded]
    if [turn.version for turn in turns] != list(range(after_version + 1, head.version + 1)):
        raise LedgerCorrupt(f"{whose} is at version {head.version}, and its turns are not those that led there")
    if any(turn.chain != data[:DIGEST_BYTES] for turn, data in zip(turns, records, strict=True)):
        raise LedgerCorrupt(f"{whose} holds a turn that does not begin with its chain")
    if turns and (turns[-1].chain, turns[-1].num_tokens) != (head.chain, head.num_tokens):
        raise LedgerCorrupt(f"{whose} and its last turn disagree about its history")
    return turns


def encode_checkpoint(checkpoint: CheckpointRef) -> bytes:
    """Return the record of a checkpoint's name."""
    return _encoder.encode(checkpoint)


def decode_checkpoint(data: bytes) -> CheckpointRef:
    """Return the checkpoint's name in `data`; raises `LedgerCorrupt`."""
    return _decode(_checkpoint_decoder, data, "the name of a checkpoint")


def _decode(decoder: msgspec.msgpack.Decoder[Record], data: bytes, what: str) -> Record:
    try:
        return decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise LedgerCorrupt(f"{what} is unreadable: {error}") from error

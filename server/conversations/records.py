"""The ledger's records as bytes. Knows no store.

Every record begins with its format and says what it belongs to. A record that is damaged, newer than this code, or
that belongs elsewhere raises `LedgerCorrupt` on reading; it is never continued from.

Format 1 knew neither parents nor items: each turn continued the one before it. Its records are read as such.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, TypeVar

import msgspec

from engine.messages import CheckpointRef
from engine.token_chain import DIGEST_BYTES
from server.conversations.ledger import Conversation, Document, LedgerCorrupt, Turn

Record = TypeVar("Record")


class HeadRecord(msgspec.Struct, frozen=True, array_like=True):
    """What a conversation is from its creation on; what may change is kept beside it."""

    format: Literal[1, 2]
    conversation: Conversation


class TurnRecord(msgspec.Struct, frozen=True, array_like=True):
    """One entry of a log, and whose it is."""

    format: Literal[1, 2]
    conversation_id: str
    turn: Turn


class DocumentRecord(msgspec.Struct, frozen=True, array_like=True):
    """One document."""

    format: Literal[2]
    document: Document


_encoder = msgspec.msgpack.Encoder()
_head_decoder = msgspec.msgpack.Decoder(HeadRecord)
_turn_decoder = msgspec.msgpack.Decoder(TurnRecord)
_document_decoder = msgspec.msgpack.Decoder(DocumentRecord)
_metadata_decoder = msgspec.msgpack.Decoder(dict[str, str])
_checkpoint_decoder = msgspec.msgpack.Decoder(CheckpointRef)


def encode_head(conversation: Conversation) -> bytes:
    """Return the record of a conversation as it is created; the checkpoints it names stay those of another one."""
    return _encoder.encode(HeadRecord(2, msgspec.structs.replace(conversation, checkpoints={})))


def decode_head(
    data: bytes,
    conversation_id: str,
    *,
    version: int,
    chain: bytes,
    num_tokens: int,
    ttl_seconds: float,
    metadata: bytes | None,
    checkpoints: Mapping[int, bytes],
) -> Conversation:
    """Return the head of `conversation_id`: its record, brought to where its entries and updates have taken it.

    `metadata` is None if it was never updated.
    """
    created = _decode(_head_decoder, data, f"the head of conversation {conversation_id!r}").conversation
    if created.conversation_id != conversation_id:
        raise LedgerCorrupt(f"the head of conversation {conversation_id!r} is another conversation's")
    return msgspec.structs.replace(
        created,
        version=version,
        chain=chain,
        num_tokens=num_tokens,
        ttl_seconds=ttl_seconds,
        metadata=created.metadata if metadata is None else decode_metadata(metadata),
        checkpoints={after: decode_checkpoint(checkpoints[after]) for after in sorted(checkpoints)},
    )


def encode_turn(conversation_id: str, turn: Turn) -> bytes:
    """Return the record of one entry. It begins with its chain, which a store can compare without decoding.

    Raises `ValueError` for what could not be read again.
    """
    if len(turn.chain) != DIGEST_BYTES:
        raise ValueError(f"a chain is {DIGEST_BYTES} bytes, not {len(turn.chain)}")
    turn = _with_parent(turn)
    if not 0 <= turn.parent_version < turn.version:
        raise ValueError(f"the parent of entry {turn.version} is one before it, not {turn.parent_version}")
    return turn.chain + _encoder.encode(TurnRecord(2, conversation_id, turn))


def encode_first_turns(conversation_id: str, turns: Sequence[Turn]) -> list[bytes]:
    """Return the records of the entries that a log begins with; raises `ValueError` if they are not its first ones."""
    if [turn.version for turn in turns] != list(range(1, len(turns) + 1)):
        raise ValueError("the first entries of a log have the versions 1, 2, 3, ...")
    return [encode_turn(conversation_id, turn) for turn in turns]


def decode_turn(data: bytes, conversation_id: str, version: int) -> Turn:
    """Return entry `version` of a log; raises `LedgerCorrupt` unless the record is that entry's."""
    whose = f"conversation {conversation_id!r}"
    record = _decode(_turn_decoder, data[DIGEST_BYTES:], f"a turn of {whose}")
    if record.conversation_id != conversation_id:
        raise LedgerCorrupt(f"{whose} holds a turn of another conversation")
    turn = _with_parent(record.turn) if record.format == 1 else record.turn
    if turn.version != version:
        raise LedgerCorrupt(f"{whose} holds turn {turn.version} where turn {version} should be")
    if turn.chain != data[:DIGEST_BYTES]:
        raise LedgerCorrupt(f"{whose} holds a turn that does not begin with its chain")
    if not 0 <= turn.parent_version < version:
        raise LedgerCorrupt(f"{whose}: turn {version} continues {turn.parent_version}, which is not before it")
    return turn


def decode_reply(data: bytes, conversation_id: str, version: int, reply_id: str) -> Turn:
    """Return entry `version` of a log, which has that reply; raises `LedgerCorrupt` unless the record is that one's."""
    turn = decode_turn(data, conversation_id, version)
    if turn.reply_id != reply_id:
        raise LedgerCorrupt(f"conversation {conversation_id!r} finds turn {version} by a reply that is not its own")
    return turn


def decode_turns(records: Sequence[bytes], head: Conversation, after_version: int) -> list[Turn]:
    """Return the entries after `after_version` up to the head; raises `LedgerCorrupt` unless they are exactly those."""
    whose = f"conversation {head.conversation_id!r}"
    if len(records) != max(0, head.version - after_version):
        raise LedgerCorrupt(f"{whose} is at version {head.version}, and its turns are not those that led there")
    turns = [
        decode_turn(data, head.conversation_id, version) for version, data in enumerate(records, after_version + 1)
    ]
    if turns and (turns[-1].chain, turns[-1].num_tokens) != (head.chain, head.num_tokens):
        raise LedgerCorrupt(f"{whose} and its last turn disagree about its history")
    for turn in turns:
        if turn.parent_version > after_version:
            _check_marker(turn, turns[turn.parent_version - after_version - 1], whose)
    return turns


def encode_document(document: Document) -> bytes:
    """Return the record of a document."""
    return _encoder.encode(DocumentRecord(2, document))


def decode_document(data: bytes, kind: str, document_id: str) -> Document:
    """Return the document of that kind and id; raises `LedgerCorrupt` if the record is not that document's."""
    document = _decode(_document_decoder, data, f"the {kind} document {document_id!r}").document
    if (document.kind, document.document_id) != (kind, document_id):
        raise LedgerCorrupt(f"the {kind} document {document_id!r} is another document")
    return document


def encode_metadata(metadata: dict[str, str]) -> bytes:
    """Return the record of a conversation's metadata."""
    return _encoder.encode(metadata)


def decode_metadata(data: bytes) -> dict[str, str]:
    """Return the metadata in `data`; raises `LedgerCorrupt`."""
    return _decode(_metadata_decoder, data, "the metadata of a conversation")


def encode_checkpoint(checkpoint: CheckpointRef) -> bytes:
    """Return the record of a checkpoint's name; equal names have equal records."""
    return _encoder.encode(checkpoint)


def decode_checkpoint(data: bytes) -> CheckpointRef:
    """Return the checkpoint's name in `data`; raises `LedgerCorrupt`."""
    return _decode(_checkpoint_decoder, data, "the name of a checkpoint")


def _with_parent(turn: Turn) -> Turn:
    """Return the turn with its parent named, if it only says that it is the one before."""
    if turn.parent_version != -1:
        return turn
    return msgspec.structs.replace(turn, parent_version=turn.version - 1)


def _check_marker(turn: Turn, parent: Turn, whose: str) -> None:
    is_marker = not turn.prompt_ids and not turn.output_ids
    if is_marker and (turn.chain, turn.num_tokens) != (parent.chain, parent.num_tokens):
        raise LedgerCorrupt(f"{whose}: turn {turn.version} adds no token, and has another history than its parent")


def _decode(decoder: msgspec.msgpack.Decoder[Record], data: bytes, what: str) -> Record:
    try:
        return decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise LedgerCorrupt(f"{what} is unreadable: {error}") from error

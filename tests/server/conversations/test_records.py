from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.conversations import records
from server.conversations.ledger import Conversation, Document, LedgerCorrupt, Turn
from tests.server.conversations import first_format
from tests.server.conversations.ledgers import (
    DAY,
    checkpoint_of,
    document,
    full_turn,
    marker,
    new_conversation,
    next_turn,
)

HEAD = new_conversation("acme:talk")
TURN = full_turn(HEAD)


def decode_head(data: bytes, conversation_id: str = "acme:talk", metadata: bytes | None = None) -> Conversation:
    """Decode the head of a conversation after its first turn."""
    return records.decode_head(
        data,
        conversation_id,
        version=1,
        chain=TURN.chain,
        num_tokens=TURN.num_tokens,
        ttl_seconds=DAY,
        metadata=metadata,
        checkpoints={1: records.encode_checkpoint(checkpoint_of(TURN, "a"))},
    )


def decode_turns(data: bytes) -> list[Turn]:
    """Decode the log of a conversation that has one turn."""
    return records.decode_turns([data], decode_head(records.encode_head(HEAD)), 0)


def decode_log(turns: list[Turn], after_version: int = 0) -> list[Turn]:
    """Encode entries and decode them as the log that leads to the last one."""
    last = turns[-1]
    head = msgspec.structs.replace(HEAD, version=last.version, chain=last.chain, num_tokens=last.num_tokens)
    encoded = [records.encode_turn("acme:talk", turn) for turn in turns]
    return records.decode_turns(encoded[after_version:], head, after_version)


def decode_document(data: bytes) -> Document:
    """Decode a document."""
    return records.decode_document(data, "completion", "chatcmpl-1")


def test_a_head_is_its_record_brought_up_to_date() -> None:
    """What never changes comes from the record, the rest from beside it; metadata only once they were updated."""
    expected = msgspec.structs.replace(
        HEAD,
        version=1,
        chain=TURN.chain,
        num_tokens=TURN.num_tokens,
        ttl_seconds=DAY,
        checkpoints={1: checkpoint_of(TURN, "a")},
    )
    assert decode_head(records.encode_head(HEAD)) == expected
    updated = decode_head(records.encode_head(HEAD), metadata=records.encode_metadata({}))
    assert updated == msgspec.structs.replace(expected, metadata={})


def test_a_turn_comes_back_unchanged() -> None:
    """Encoding loses nothing, the largest seed and token included."""
    assert decode_turns(records.encode_turn("acme:talk", TURN)) == [TURN]


def test_a_head_of_another_conversation_is_refused() -> None:
    """A record says whose it is."""
    with pytest.raises(LedgerCorrupt, match="another conversation"):
        decode_head(records.encode_head(HEAD), "acme:other")


def test_a_record_of_another_format_is_refused() -> None:
    """A record of a later release is not read as if it were one of ours."""
    head = records.encode_head(HEAD)
    turn = records.encode_turn("acme:talk", TURN)
    with pytest.raises(LedgerCorrupt):
        decode_head(head.replace(b"\x92\x02", b"\x92\x03", 1))
    with pytest.raises(LedgerCorrupt):
        decode_turns(turn.replace(b"\x93\x02", b"\x93\x03", 1))
    with pytest.raises(LedgerCorrupt):
        decode_document(records.encode_document(document()).replace(b"\x92\x02", b"\x92\x03", 1))


def test_records_of_the_first_format_are_read() -> None:
    """A turn of the first release continues the one before it, and has no items."""
    first, second = next_turn(HEAD), next_turn(next_turn(HEAD))
    head = msgspec.structs.replace(
        decode_head(first_format.head_record(HEAD)), version=2, chain=second.chain, num_tokens=second.num_tokens
    )
    assert (head.model, head.metadata, head.kind) == (HEAD.model, HEAD.metadata, "conversation")
    log = [first_format.turn_record("acme:talk", turn) for turn in (first, second)]
    assert records.decode_turns(log, head, 0) == [first, second]
    assert records.decode_turns(log[1:], head, 1) == [second]


def test_a_parent_must_come_before_its_entry() -> None:
    """An entry that names no entry before it as its parent is neither written nor read."""
    for parent_version in (1, 2, -2):
        with pytest.raises(ValueError, match="parent"):
            records.encode_turn("acme:talk", msgspec.structs.replace(TURN, parent_version=parent_version))
    for parent_version in (1, 7, -1, -2):
        turn = msgspec.structs.replace(TURN, parent_version=parent_version)
        with pytest.raises(LedgerCorrupt, match="continues"):
            decode_turns(turn.chain + msgspec.msgpack.encode([2, "acme:talk", turn]))


def test_a_marker_has_its_parents_history() -> None:
    """An entry without tokens whose chain or length is not its parent's is corrupt, if the parent is at hand."""
    second = next_turn(TURN)
    back = marker(second, TURN)
    assert decode_log([TURN, second, back]) == [TURN, second, back]
    for wrong in ({"chain": second.chain}, {"num_tokens": second.num_tokens}):
        other = msgspec.structs.replace(back, **wrong)
        with pytest.raises(LedgerCorrupt, match="parent"):
            decode_log([TURN, second, other])
        assert decode_log([TURN, second, other], after_version=1) == [second, other]


def test_a_reply_is_its_entrys() -> None:
    """An index that leads to an entry with another reply is damaged."""
    data = records.encode_turn("acme:talk", TURN)
    assert records.decode_reply(data, "acme:talk", 1, "resp_1") == TURN
    for conversation_id, version, reply_id in (
        ("acme:other", 1, "resp_1"),
        ("acme:talk", 2, "resp_1"),
        ("acme:talk", 1, "resp_2"),
    ):
        with pytest.raises(LedgerCorrupt):
            records.decode_reply(data, conversation_id, version, reply_id)


def test_a_document_is_the_one_that_was_asked_for() -> None:
    """A record says which document it is."""
    assert decode_document(records.encode_document(document())) == document()
    for other in (document("chatcmpl-2"), document(kind="response")):
        with pytest.raises(LedgerCorrupt, match="another document"):
            decode_document(records.encode_document(other))


def test_a_chain_of_another_length_is_not_written() -> None:
    """What could not be read again is refused when it is written."""
    with pytest.raises(ValueError, match="16 bytes"):
        records.encode_turn("acme:talk", msgspec.structs.replace(TURN, chain=b"short"))


@given(st.binary(max_size=64))
def test_arbitrary_bytes_are_no_record(data: bytes) -> None:
    """Whatever a store returns, reading it gives a record or `LedgerCorrupt`."""
    for decode in (decode_head, decode_turns, decode_document, records.decode_checkpoint):
        with pytest.raises(LedgerCorrupt):
            decode(data)


@given(st.data())
def test_a_truncated_record_is_no_record(data: st.DataObject) -> None:
    """A turn that was cut anywhere is refused."""
    whole = records.encode_turn("acme:talk", TURN)
    length = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(LedgerCorrupt):
        decode_turns(whole[:length])

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.conversations import records
from server.conversations.ledger import Conversation, LedgerCorrupt, Turn
from tests.server.conversations.ledgers import checkpoint_of, new_conversation, next_turn

HEAD = new_conversation("acme:talk")
TURN = next_turn(HEAD)


def decode_head(data: bytes, conversation_id: str = "acme:talk") -> Conversation:
    """Decode the head of a conversation after its first turn."""
    return records.decode_head(
        data,
        conversation_id,
        version=1,
        chain=TURN.chain,
        num_tokens=TURN.num_tokens,
        checkpoint=records.encode_checkpoint(checkpoint_of(TURN, "a")),
        checkpoint_version=1,
    )


def decode_turns(data: bytes) -> list[Turn]:
    """Decode the log of a conversation that has one turn."""
    return records.decode_turns([data], decode_head(records.encode_head(HEAD)), 0)


def test_a_head_is_its_record_brought_up_to_date() -> None:
    """What never changes comes from the record, the rest from beside it."""
    assert decode_head(records.encode_head(HEAD)) == msgspec.structs.replace(
        HEAD,
        version=1,
        chain=TURN.chain,
        num_tokens=TURN.num_tokens,
        checkpoint=checkpoint_of(TURN, "a"),
        checkpoint_version=1,
    )


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
        decode_head(head.replace(b"\x92\x01", b"\x92\x02", 1))
    with pytest.raises(LedgerCorrupt):
        decode_turns(turn.replace(b"\x93\x01", b"\x93\x02", 1))


def test_a_chain_of_another_length_is_not_written() -> None:
    """What could not be read again is refused when it is written."""
    with pytest.raises(ValueError, match="16 bytes"):
        records.encode_turn("acme:talk", msgspec.structs.replace(TURN, chain=b"short"))


@given(st.binary(max_size=64))
def test_arbitrary_bytes_are_no_record(data: bytes) -> None:
    """Whatever a store returns, reading it gives a record or `LedgerCorrupt`."""
    for decode in (decode_head, decode_turns, records.decode_checkpoint):
        with pytest.raises(LedgerCorrupt):
            decode(data)


@given(st.data())
def test_a_truncated_record_is_no_record(data: st.DataObject) -> None:
    """A turn that was cut anywhere is refused."""
    whole = records.encode_turn("acme:talk", TURN)
    length = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(LedgerCorrupt):
        decode_turns(whole[:length])

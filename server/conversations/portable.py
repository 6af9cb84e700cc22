"""A conversation as one file that any server of its model can take in: docs/state-format.md. No I/O.

The file holds the log of one history, straightened, and possibly the state after it, as the engine encodes it. Reading
verifies all that can be told without the model: every byte is under a digest, and every entry's chain is computed again
from its tokens. The state itself is the engine's to verify.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from engine.token_chain import DIGEST_BYTES, extend_digest
from server.conversations.history import History, is_marker, name_of
from server.conversations.ledger import Answer, Conversation, Item, Turn
from server.items import item_from

MEDIA_TYPE = "application/vnd.sostenuto.conversation"
FORMAT_VERSION = 1
MAX_LOG_BYTES = 16 << 20  # of JSON, two million tokens or more: it is parsed at one go

_MAGIC = b"SOSTCONV"
_PRELUDE = struct.Struct("<8sIQ")  # magic, format version, size of the log
_LOG_DIGEST_BYTES = hashlib.sha256().digest_size


class FileRejected(Exception):
    """A file is not a conversation that can be taken in here. Says what is wrong with it, never what it holds."""


TokenId = Annotated[int, Meta(ge=0, lt=2**32)]
Hex16 = Annotated[str, Meta(pattern=r"^[0-9a-f]{32}\Z")]
Hex32 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
Fingerprint = Annotated[str, Meta(min_length=1, max_length=128)]  # hex; what matters is whether it is the served one
ShortText = Annotated[str, Meta(max_length=256)]
Metadata = Annotated[
    dict[Annotated[str, Meta(min_length=1, max_length=64)], Annotated[str, Meta(max_length=512)]], Meta(max_length=16)
]


class PortableItem(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """One thing that was said."""

    body: msgspec.Raw  # as clients see it
    answer_id: ShortText = ""


class PortableAnswer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """The tokens of an answer that was carried here from another path."""

    answer_id: ShortText
    output_ids: list[TokenId]
    opening: str = ""
    hint: str = ""


class PortableTurn(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """One entry of the log; see `server.conversations.ledger.Turn`. Its parent is the one before it."""

    prompt_ids: list[TokenId]
    output_ids: list[TokenId]
    chain: Hex16
    num_tokens: Annotated[int, Meta(ge=0)]
    finish_reason: Literal["", "stop", "length"]
    seed: Annotated[int, Meta(ge=0)]
    created_at: float
    request_id: Annotated[str, Meta(min_length=1, max_length=64)]
    items: list[PortableItem] = []
    num_carried: Annotated[int, Meta(ge=0)] = 0
    answers: list[PortableAnswer] = []
    opening: str = ""
    hint: str = ""
    preamble: str = ""


class StateSeal(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the bytes after the log must be."""

    num_bytes: Annotated[int, Meta(gt=0)]
    sha256: Hex32


class PortableInitialState(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The tuned state that the history begins from."""

    name: ShortText  # where it came from, for people
    fingerprint: Fingerprint  # of its content


class PortableLog(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """A conversation without its state."""

    id: Annotated[str, Meta(max_length=128)]  # what it was called where it came from
    model: ShortText  # served name, for people
    fingerprint: Fingerprint  # of the weights
    template: ShortText
    root: Hex16  # chain of the empty history where it came from
    metadata: Metadata
    turns: list[PortableTurn]
    initial_state: PortableInitialState | None = None  # None: the zero state
    state: StateSeal | None = None

    @property
    def num_tokens(self) -> int:
        """Of the whole history."""
        return self.turns[-1].num_tokens if self.turns else 0

    @property
    def chain(self) -> bytes:
        """Of the whole history, where it came from."""
        return bytes.fromhex(self.turns[-1].chain if self.turns else self.root)


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(PortableLog)


@dataclass(frozen=True, slots=True)
class PortableFile:
    """What a file says, its digest verified."""

    log: PortableLog
    after_log: memoryview  # the state, if all is well

    def state(self) -> memoryview | None:
        """Return the state's bytes, if the file has one; raises `FileRejected` unless they are those that belong to it.

        Without a state nothing may follow the log.
        """
        seal = self.log.state
        num_bytes = 0 if seal is None else seal.num_bytes
        if len(self.after_log) != num_bytes:
            raise FileRejected(f"The file has {len(self.after_log)} bytes after its log, not {num_bytes}.")
        if seal is None:
            return None
        if hashlib.sha256(self.after_log).hexdigest() != seal.sha256:
            raise FileRejected("The state in the file is damaged.")
        return self.after_log


def write(head: Conversation, history: History, state: bytes | bytearray | None = None) -> bytes:
    """Return `history`, which is one of `head`'s log, and the state after it as a file.

    Raises `FileRejected` for a log that is too long for one.
    """
    seal = None if state is None else StateSeal(num_bytes=len(state), sha256=hashlib.sha256(state).hexdigest())
    begun = head.initial_state
    log = PortableLog(
        id=name_of(head.conversation_id),
        model=head.model,
        fingerprint=head.fingerprint,
        template=head.template,
        root=history.root.hex(),
        metadata=head.metadata,
        turns=[_portable(entry) for entry in history.path],
        initial_state=None if begun is None else PortableInitialState(name=begun.name, fingerprint=begun.fingerprint),
        state=seal,
    )
    text = _encoder.encode(log)
    if len(text) > MAX_LOG_BYTES:
        raise FileRejected(f"The log has {len(text)} bytes; a file holds at most {MAX_LOG_BYTES}.")
    begin = _PRELUDE.pack(_MAGIC, FORMAT_VERSION, len(text)) + text
    return b"".join((begin, hashlib.sha256(begin).digest(), state or b""))


def read(data: bytes) -> PortableFile:
    """Return what the file says, if its log is whole; raises `FileRejected`."""
    if len(data) < _PRELUDE.size:
        raise FileRejected("The file is too short to be a conversation.")
    magic, version, num_bytes = _PRELUDE.unpack_from(data)
    if magic != _MAGIC:
        raise FileRejected("The file is not an exported conversation.")
    if version != FORMAT_VERSION:
        raise FileRejected(f"The file is of format {version}; this server reads format {FORMAT_VERSION}.")
    if num_bytes > MAX_LOG_BYTES:
        raise FileRejected(f"The log has {num_bytes} bytes; a file holds at most {MAX_LOG_BYTES}.")
    end = _PRELUDE.size + num_bytes
    whole = memoryview(data)
    digest = whole[end : end + _LOG_DIGEST_BYTES]
    if len(digest) < _LOG_DIGEST_BYTES:
        raise FileRejected("The file is cut short.")
    if hashlib.sha256(whole[:end]).digest() != digest:
        raise FileRejected("The file is damaged.")
    try:
        log = _decoder.decode(whole[_PRELUDE.size : end])
    except (msgspec.MsgspecError, RecursionError) as error:
        raise FileRejected("The log is not what the format says.") from error
    return PortableFile(log, whole[end + _LOG_DIGEST_BYTES :])


def turns_of(log: PortableLog, root: bytes, *, vocab_size: int, templates: Collection[str]) -> list[Turn]:
    """Return the entries of `log` for a conversation whose empty history has the chain `root`.

    Raises `FileRejected` unless everything in it fits together.
    """
    if log.template not in templates:
        raise FileRejected("The conversation is written in a chat template that this server does not have.")
    origin, chain, num_tokens = bytes.fromhex(log.root), root, 0
    turns: list[Turn] = []
    item_ids: set[str] = set()
    for number, entry in enumerate(log.turns, start=1):
        token_ids = entry.prompt_ids + entry.output_ids
        for known in (token_ids, *(answer.output_ids for answer in entry.answers)):
            if known and max(known) >= vocab_size:
                raise FileRejected(f"turns[{number - 1}]: a token is not one of this model's.")
        same_root = origin == chain
        origin = extend_digest(origin, token_ids)
        chain = origin if same_root else extend_digest(chain, token_ids)
        num_tokens += len(token_ids)
        if (bytes.fromhex(entry.chain), entry.num_tokens) != (origin, num_tokens):
            raise FileRejected(f"turns[{number - 1}]: its tokens are not those of its chain.")
        turn = _turn(entry, number, chain)
        _check(turn, item_ids)
        turns.append(turn)
    return turns


def _check(turn: Turn, item_ids: set[str]) -> None:
    """Raise `FileRejected` unless the entry can follow those that said `item_ids`, to which it adds its own."""
    where = f"turns[{turn.version - 1}]"
    if is_marker(turn) != (not turn.finish_reason) or (turn.output_ids and not turn.prompt_ids):
        raise FileRejected(f"{where}: it neither ended nor is without tokens.")
    if turn.seed >= 2**64 or turn.num_carried > len(turn.items):
        raise FileRejected(f"{where}: a number is out of range.")
    for item in turn.items:
        if item.item_id in item_ids:
            raise FileRejected(f"{where}: two items have the same id.")
        item_ids.add(item.item_id)


def _portable(entry: Turn) -> PortableTurn:
    return PortableTurn(
        prompt_ids=entry.prompt_ids,
        output_ids=entry.output_ids,
        chain=entry.chain.hex(),
        num_tokens=entry.num_tokens,
        finish_reason=entry.finish_reason,  # type: ignore[arg-type]  # the ledger has no others; read again, it is checked
        seed=entry.seed,
        created_at=entry.created_at,
        request_id=entry.request_id,
        items=[PortableItem(body=msgspec.Raw(item.body), answer_id=item.answer_id) for item in entry.items],
        num_carried=entry.num_carried,
        answers=[
            PortableAnswer(
                answer_id=answer.answer_id, output_ids=answer.output_ids, opening=answer.opening, hint=answer.hint
            )
            for answer in entry.answers
        ],
        opening=entry.opening,
        hint=entry.hint,
        preamble=entry.preamble,
    )


def _turn(entry: PortableTurn, version: int, chain: bytes) -> Turn:
    assert len(chain) == DIGEST_BYTES
    return Turn(
        version=version,
        parent_version=version - 1,
        prompt_ids=entry.prompt_ids,
        output_ids=entry.output_ids,
        chain=chain,
        num_tokens=entry.num_tokens,
        finish_reason=entry.finish_reason,
        seed=entry.seed,
        created_at=entry.created_at,
        request_id=entry.request_id,
        items=_items(entry.items, version),
        num_carried=entry.num_carried,
        answers=[
            Answer(answer_id=answer.answer_id, output_ids=answer.output_ids, opening=answer.opening, hint=answer.hint)
            for answer in entry.answers
        ],
        opening=entry.opening,
        hint=entry.hint,
        preamble=entry.preamble,
    )


def _items(items: Sequence[PortableItem], version: int) -> list[Item]:
    try:
        return [item_from(item.body, item.answer_id) for item in items]
    except ValueError as error:
        raise FileRejected(f"turns[{version - 1}]: an item is none of ours.") from error

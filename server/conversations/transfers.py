"""Conversations out of a server and into another: as files, with their states if asked.

No state crosses the seam to the engine. What is exported the engine writes to the state store under a fresh id, from
where it is read; what is imported lies in the store, under an id that nothing points to, until the engine has verified
it and written it anew as a checkpoint of its own.

TransferError
├── StateRejected      the state in a file is not the one after its log
└── StoreNotShared     the state store is in the engine's memory, where nobody else reaches it
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
import uuid
from collections.abc import Callable, Collection, Iterable

from engine.errors import CheckpointMissing, CheckpointRejected, InitialStateUnavailable, StateUnavailable
from engine.messages import (
    CheckpointRef,
    CheckpointStored,
    GenerationRequest,
    InitialStateRef,
    SamplingParams,
    StateSource,
    StopRules,
)
from engine.state.store import StateStore
from engine.token_chain import extend_digest
from server.conversations import portable
from server.conversations.history import History, is_marker, root_of
from server.conversations.ledger import Conversation, LedgerError, Turn
from server.conversations.open_turn import LogCorrupt, ModelMismatch
from server.conversations.turns import Turns

logger = logging.getLogger(__name__)

UPLOAD_SECONDS = 600.0  # what an import leaves in the store if the server dies in the middle of it


class TransferError(Exception):
    """Base of what transfers raise, besides `portable.FileRejected`."""


class StateRejected(TransferError):
    """The state in a file is not the one after its log."""


class StoreNotShared(TransferError):
    """The state store is in the engine's memory."""


class Transfers:
    """Exports and imports. `store` is the engine's state store, if another process can reach it."""

    def __init__(self, turns: Turns, store: StateStore | None, *, vocab_size: int, templates: Collection[str]) -> None:
        self._turns = turns
        self._store = store
        self._vocab_size = vocab_size
        self._templates = frozenset(templates)

    # -- out ----------------------------------------------------------------------------------------------------------

    async def export(
        self,
        conversation_id: str,
        version: int | None = None,
        *,
        include_state: bool = False,
        spend_tokens: Callable[[int], None] = lambda num_tokens: None,
    ) -> bytes:
        """Return the history that leads to `version`, or to the head, as a file; with the state after it, if asked.

        A state that is nowhere any more is computed again, for tokens that `spend_tokens` is told; the empty history
        has none. Raises as `Turns.history`, `LogCorrupt`, `FileRejected` for a log that is too long, `StoreNotShared`,
        and what computing it may raise.
        """
        if include_state:
            self._require_store()
        head, history = await self._turns.history(conversation_id, version)
        if head.fingerprint != self._turns.model.fingerprint and include_state:
            raise ModelMismatch("only the model that a conversation was held with can give its state")
        if await asyncio.to_thread(extend_digest, history.root, history.token_ids()) != history.chain:
            raise LogCorrupt(f"the log of conversation {conversation_id!r} does not match its chain")
        state = None
        if include_state and history.num_tokens:
            state = await self._state(head, history, spend_tokens)
        return await asyncio.to_thread(portable.write, head, history, state)

    async def _state(self, head: Conversation, history: History, spend_tokens: Callable[[int], None]) -> bytearray:
        engine, store = self._turns.engine, self._require_store()
        newest = history.newest(head.checkpoints)
        copy_of = newest[1] if newest is not None and newest[1].chain == history.chain else None
        try:
            stored = await engine.save_state(history.chain, history.num_tokens, copy_of)
        except CheckpointMissing:
            spend_tokens(await self._compute(head, history, None if copy_of is not None else newest))
            stored = await self._save_computed(history)
        try:
            return await asyncio.to_thread(store.get, stored.ref.checkpoint_id)
        finally:
            engine.delete_checkpoints([stored.ref.checkpoint_id])

    async def _save_computed(self, history: History) -> CheckpointStored:
        try:
            return await self._turns.engine.save_state(history.chain, history.num_tokens)
        except CheckpointMissing as missing:
            raise StateUnavailable("the engine has no memory for a state that nothing runs with") from missing

    async def _compute(self, head: Conversation, history: History, newest: tuple[int, CheckpointRef] | None) -> int:
        """Let the engine consume the history, from a checkpoint of it on, so that it has the state in memory.

        Returns how many tokens that took.
        """
        if newest is not None:
            version, checkpoint = newest
            source = StateSource(
                num_tokens=checkpoint.num_tokens,
                chain=checkpoint.chain,
                checkpoint=checkpoint,
                initial_state=head.initial_state,
            )
            with contextlib.suppress(StateUnavailable):
                return await self._consume(source, history.token_ids(version))
        beginning = StateSource(num_tokens=0, chain=history.root, initial_state=head.initial_state)
        return await self._consume(beginning, history.token_ids())

    async def _consume(self, source: StateSource, token_ids: list[int]) -> int:
        request = GenerationRequest(
            request_id=uuid.uuid4().hex,
            prompt_ids=token_ids,
            sampling=SamplingParams(seed=0),
            stop=StopRules(max_tokens=0),
            source=source,
            keep_state=True,
        )
        await self._turns.engine.run(request, hear=lambda _: None)
        return len(token_ids)

    # -- in -----------------------------------------------------------------------------------------------------------

    async def import_file(self, data: bytes, conversation_id: str, *, without_state: bool = False) -> Conversation:
        """Begin a conversation with the history in a file, and the state in it if there is one.

        All or nothing: whatever is wrong with the file, nothing of it is left. `without_state` does not look at the
        state. Raises `FileRejected`, `ModelMismatch`, `InitialStateUnavailable`, `StateRejected`, `StoreNotShared`,
        `CheckpointError`, and as `Ledger.create`.
        """
        file = await asyncio.to_thread(portable.read, data)
        if file.log.fingerprint != self._turns.model.fingerprint:
            raise ModelMismatch("the conversation in the file was held with another model")
        initial_state = self._initial_state_of(file.log)
        root = root_of(conversation_id, initial_state)
        entries = await asyncio.to_thread(
            portable.turns_of, file.log, root, vocab_size=self._vocab_size, templates=self._templates
        )
        state = None if without_state else await asyncio.to_thread(file.state)
        conversation = self._conversation(file.log, entries, conversation_id, initial_state)
        checkpoint = None if state is None else await self._adopt(file.log, state, conversation.chain)
        try:
            await self._turns.ledger.create(conversation, entries)
        except BaseException:
            self._delete([checkpoint] if checkpoint else [])
            raise
        if checkpoint is not None:
            await self._point(conversation_id, entries, checkpoint)
        return conversation

    async def _point(self, conversation_id: str, entries: list[Turn], checkpoint: CheckpointRef) -> None:
        version = max(entry.version for entry in entries if not is_marker(entry))
        try:
            self._delete(await self._turns.ledger.point(conversation_id, version, checkpoint))
        except LedgerError as error:  # the conversation is there, and will be replayed
            logger.warning("imported state not pointed to: it expires unused", extra={"reason": str(error)})

    def _delete(self, checkpoints: Iterable[CheckpointRef]) -> None:
        if checkpoint_ids := [checkpoint.checkpoint_id for checkpoint in checkpoints]:
            self._turns.engine.delete_checkpoints(checkpoint_ids)

    def _initial_state_of(self, log: portable.PortableLog) -> InitialStateRef | None:
        """Return what the history begins from, by the name that it has here; raises `InitialStateUnavailable`."""
        if log.initial_state is None:
            return None
        for known in self._turns.model.initial_states:
            if known.fingerprint == log.initial_state.fingerprint:
                return known
        raise InitialStateUnavailable("this server does not have the state that the conversation began from")

    def _conversation(
        self,
        log: portable.PortableLog,
        entries: list[Turn],
        conversation_id: str,
        initial_state: InitialStateRef | None,
    ) -> Conversation:
        return Conversation(
            conversation_id=conversation_id,
            version=len(entries),
            chain=entries[-1].chain if entries else root_of(conversation_id, initial_state),
            num_tokens=log.num_tokens,
            model=self._turns.model.name,
            fingerprint=log.fingerprint,
            template=log.template,
            created_at=time.time(),
            ttl_seconds=self._turns.conversation_ttl_seconds,
            metadata=log.metadata,
            initial_state=initial_state,
        )

    async def _adopt(self, log: portable.PortableLog, state: memoryview, chain: bytes) -> CheckpointRef:
        engine, store = self._turns.engine, self._require_store()
        if log.num_tokens == 0:
            raise StateRejected("the empty history has no state")
        uploaded = CheckpointRef(
            checkpoint_id=secrets.token_hex(16), num_tokens=log.num_tokens, chain=log.chain, num_bytes=len(state)
        )
        try:
            await asyncio.to_thread(store.put, uploaded.checkpoint_id, state, UPLOAD_SECONDS)
            return (await engine.adopt_checkpoint(uploaded, chain)).ref
        except CheckpointRejected as rejected:
            raise StateRejected(str(rejected)) from rejected
        finally:
            engine.delete_checkpoints([uploaded.checkpoint_id])

    def _require_store(self) -> StateStore:
        if self._store is None:
            raise StoreNotShared("the state store is in the engine's memory")
        return self._store

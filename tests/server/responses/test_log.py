"""Which log a response becomes an entry of, and what is left of a log that was made for nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping

import pytest

from engine.client import AsyncEngine
from engine.messages import CheckpointRef
from server.conversations.ledger import ConversationExpired, Ledger
from server.conversations.open_ledger import open_ledger
from server.conversations.turns import ModelIdentity, Turns
from server.items import said
from server.responses.log import KIND, Predecessor, opened
from server.schemas.responses import ResponseRequest
from tests.engine.stub_engine import StubEngine
from tests.server.conversations.test_turns import Observer

ORIGIN = "~origin"
NEXT = ResponseRequest.model_validate({"input": "And?"})


class LeftTurns(Turns):
    """The turn protocol, for a client that leaves as soon as a branch is made."""

    branch_id = ""

    async def branch(
        self, conversation_id: str, branch_id: str, *, version: int, kind: str
    ) -> Mapping[int, CheckpointRef]:
        """Make the branch, and be cancelled."""
        await super().branch(conversation_id, branch_id, version=version, kind=kind)
        self.branch_id = branch_id
        await self.ledger.get(branch_id)  # it is there
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await asyncio.sleep(0)
        raise AssertionError


@pytest.fixture
async def turns() -> AsyncIterator[LeftTurns]:
    """The protocol on a ledger in memory and a stub engine."""
    ledger: Ledger = open_ledger("memory:")
    await ledger.open()
    engine = AsyncEngine.in_process(StubEngine())
    await engine.start()
    yield LeftTurns(ledger, engine, ModelIdentity("tiny", "f00d", "raw"), Observer())
    await engine.close()
    await ledger.close()


async def test_a_branch_goes_with_the_client_it_was_made_for(turns: LeftTurns) -> None:
    """Also if that leaves before a turn is opened: no copy of what was said stays behind. The origin stays."""
    await turns.create(ORIGIN, kind=KIND, items=[said("user", "Hello.")])
    with pytest.raises(asyncio.CancelledError):
        async with opened(turns, NEXT.model_copy(update={"store": False}), "", Predecessor(ORIGIN, 1)):
            raise AssertionError
    with pytest.raises(ConversationExpired):
        await turns.get(turns.branch_id)
    assert (await turns.get(ORIGIN)).version == 1

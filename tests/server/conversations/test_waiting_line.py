from __future__ import annotations

import asyncio

import pytest

from server.conversations.ledger import ConversationBusy
from server.conversations.waiting_line import MAX_WAITING, WaitingLine


class Room:
    """Something only one can hold, that wakes its line when it is left."""

    def __init__(self) -> None:
        self.line = WaitingLine()
        self.taken = False
        self.order: list[int] = []

    async def take(self, name: int) -> int:
        if self.taken:
            raise ConversationBusy("room", 1.0)
        self.taken = True
        self.order.append(name)
        return name

    def leave(self) -> None:
        self.taken = False
        self.line.wake("room")

    async def wait(self, name: int, max_seconds: float) -> int:
        return await self.line.wait("room", lambda: self.take(name), max_seconds)


async def test_a_free_conversation_is_taken_at_once() -> None:
    """Nobody waits when nobody is there."""
    room = Room()
    assert await room.wait(1, 0.0) == 1


async def test_without_patience_a_busy_conversation_refuses_at_once() -> None:
    """A turn that does not want to wait is told that the conversation is busy."""
    room = Room()
    await room.wait(1, 0.0)
    with pytest.raises(ConversationBusy):
        await room.wait(2, 0.0)


async def test_waiting_turns_run_in_order_of_arrival() -> None:
    """The line is first come, first served."""
    room = Room()
    await room.wait(0, 0.0)
    waiting = []
    for name in range(1, MAX_WAITING + 1):
        waiting.append(asyncio.create_task(room.wait(name, 10.0)))
        await asyncio.sleep(0)
    for task in waiting:
        room.leave()
        await task
    assert room.order == list(range(MAX_WAITING + 1))


async def test_an_impatient_turn_does_not_overtake_the_line() -> None:
    """While others wait, a turn without patience is refused even in the moment the conversation is free."""
    room = Room()
    await room.wait(0, 0.0)
    waiting = asyncio.create_task(room.wait(1, 10.0))
    await asyncio.sleep(0)
    room.leave()
    with pytest.raises(ConversationBusy):
        await room.wait(2, 0.0)
    assert await waiting == 1


async def test_a_full_line_refuses() -> None:
    """No more than the stated number of turns can wait."""
    room = Room()
    await room.wait(0, 0.0)
    waiting = [asyncio.create_task(room.wait(name, 10.0)) for name in range(MAX_WAITING)]
    await asyncio.sleep(0)
    with pytest.raises(ConversationBusy):
        await room.wait(99, 10.0)
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)


async def test_patience_ends() -> None:
    """A turn that waited as long as it wanted is told that the conversation is busy."""
    room = Room()
    await room.wait(0, 0.0)
    with pytest.raises(ConversationBusy):
        await room.wait(1, 0.05)


async def test_a_turn_that_gives_up_lets_the_next_one_through() -> None:
    """Cancelling the head of the line does not block those behind it."""
    room = Room()
    await room.wait(0, 0.0)
    first = asyncio.create_task(room.wait(1, 10.0))
    await asyncio.sleep(0)
    second = asyncio.create_task(room.wait(2, 10.0))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    room.leave()
    assert await second == 2


async def test_another_process_leaving_is_noticed() -> None:
    """The head of the line asks again by itself: a release elsewhere wakes nobody here."""
    room = Room()
    await room.wait(0, 0.0)
    waiting = asyncio.create_task(room.wait(1, 10.0))
    await asyncio.sleep(0)
    room.taken = False
    assert await waiting == 1

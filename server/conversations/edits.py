"""What can be done to a conversation besides taking a turn: say something, take it back, go back.

Each is one entry of the log, and costs no computation: what it changes is rendered and consumed by the next turn, from
the state before the change. Nothing is overwritten; the versions before remain, and can be gone back to.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from server.conversations.history import History
from server.conversations.ledger import Item, Turn
from server.conversations.open_turn import TurnError
from server.conversations.turns import ConversationSelector, Turns


class ItemNotFound(TurnError):
    """The conversation's history has no item of that id."""


async def add_items(turns: Turns, conversation_id: str, items: Sequence[Item], if_match: int | None = None) -> Turn:
    """Say `items`; raises as `Turns.open` and `OpenTurn.commit`."""
    async with turns.open(ConversationSelector(conversation_id), if_match=if_match) as turn:
        return await turn.mark(await turn.history(), items)


async def rewind(turns: Turns, conversation_id: str, version: int, if_match: int | None = None) -> Turn:
    """Let the conversation go on from any version of its log; raises as `add_items`, and `VersionUnknown`."""
    async with turns.open(ConversationSelector(conversation_id), if_match=if_match) as turn:
        return await turn.mark(await turn.history(version))


async def delete_item(turns: Turns, conversation_id: str, item_id: str, if_match: int | None = None) -> Turn:
    """Take an item back: the conversation goes on from before it, and says again what came after.

    Raises as `add_items`, and `ItemNotFound`.
    """
    async with turns.open(ConversationSelector(conversation_id), if_match=if_match) as turn:
        history = await turn.history()
        before, after = _around(history, item_id)
        items = _without(after, item_id)
        answer_ids = {item.answer_id for item in items}
        answers = [answer for answer_id, answer in history.answers.items() if answer_id in answer_ids]
        return await turn.mark(before, items, answers, num_carried=len(items))


def _around(history: History, item_id: str) -> tuple[History, list[Item]]:
    """Return the history before the entry that has the item, and all items from that entry on."""
    for number, entry in enumerate(history.path):
        if any(item.item_id == item_id for item in entry.items):
            before = history.until(history.path[number - 1].version if number else 0)
            assert before is not None, "it ends on the path"
            return before, [item for later in history.path[number:] for item in later.items]
    raise ItemNotFound(f"there is no item {item_id!r}")


def _without(items: Sequence[Item], item_id: str) -> list[Item]:
    """Return the others. An answer of which a part is gone is no longer the one that was generated: it becomes text."""
    broken = {item.answer_id for item in items if item.item_id == item_id}
    return [
        msgspec.structs.replace(item, answer_id="") if item.answer_id in broken else item
        for item in items
        if item.item_id != item_id
    ]

"""Which tokens of a conversation penalties count: a function of its turn log, so they survive what that survives."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from server.conversations.history import tail_to
from server.conversations.ledger import Turn

NUM_COUNTED_TOKENS = 2048  # with RWKV's decay of 0.996 what is older than that counts for nothing

FIRST_WINDOW = 32  # entries that are read at first: most answers have more than 64 tokens


async def counted_tokens(read: Callable[[int], Awaitable[Sequence[Turn]]], version: int, limit: int) -> list[int]:
    """Return the last `limit` tokens that were generated on the path to `version`, oldest first.

    `read(base)` returns all entries of the log after `base`. Of a long log only its end is read.
    """
    window = FIRST_WINDOW
    while True:
        base = max(0, version - window)
        path, begin = tail_to(await read(base), version, base)
        outputs = newest_outputs(path, limit)
        if begin == 0 or len(outputs) == limit:
            return outputs
        window *= 8


def newest_outputs(turns: Sequence[Turn], limit: int) -> list[int]:
    """Return the last `limit` tokens that were generated in `turns`, oldest first."""
    newest: list[list[int]] = []
    for turn in reversed(turns):
        if limit <= 0:
            break
        newest.append(turn.output_ids[-limit:])
        limit -= len(turn.output_ids)
    return [token_id for output_ids in reversed(newest) for token_id in output_ids]

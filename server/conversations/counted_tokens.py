"""Which tokens of a conversation penalties count: a function of its turn log, so they survive what that survives."""

from __future__ import annotations

from collections.abc import Sequence

from server.conversations.ledger import Turn

NUM_COUNTED_TOKENS = 2048  # with RWKV's decay of 0.996 what is older than that counts for nothing


def newest_outputs(turns: Sequence[Turn], limit: int) -> list[int]:
    """Return the last `limit` tokens that were generated in `turns`, oldest first."""
    newest: list[list[int]] = []
    for turn in reversed(turns):
        if limit <= 0:
            break
        newest.append(turn.output_ids[-limit:])
        limit -= len(turn.output_ids)
    return [token_id for output_ids in reversed(newest) for token_id in output_ids]

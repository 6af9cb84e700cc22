"""Which tokens of a log penalties count."""

from __future__ import annotations

import msgspec
import pytest

from server.conversations.counted_tokens import newest_outputs
from server.conversations.ledger import Turn


def turn(version: int, prompt_ids: list[int], output_ids: list[int]) -> Turn:
    """Return a turn of a log."""
    return msgspec.convert(
        {
            "version": version,
            "prompt_ids": prompt_ids,
            "output_ids": output_ids,
            "chain": b"",
            "num_tokens": 0,
            "finish_reason": "stop",
            "seed": 0,
            "created_at": 0.0,
            "request_id": "",
        },
        Turn,
    )


LOG = [turn(1, [9], [1, 2, 3]), turn(2, [9, 9], []), turn(3, [9], [4, 5])]


@pytest.mark.parametrize(
    ("limit", "counted"), [(100, [1, 2, 3, 4, 5]), (5, [1, 2, 3, 4, 5]), (4, [2, 3, 4, 5]), (2, [4, 5]), (1, [5])]
)
def test_the_newest_outputs_are_counted_oldest_first(limit: int, counted: list[int]) -> None:
    """Prompts are not; a turn may be counted in part."""
    assert newest_outputs(LOG, limit) == counted


def test_an_empty_log_counts_nothing() -> None:
    """A first turn."""
    assert newest_outputs([], 10) == []

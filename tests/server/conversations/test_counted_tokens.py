"""Which tokens of a log penalties count."""

from __future__ import annotations

import msgspec
import pytest

from server.conversations.counted_tokens import FIRST_WINDOW, counted_tokens, newest_outputs
from server.conversations.history import path_to
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


class Log:
    """A log that remembers what was read of it."""

    def __init__(self, turns: list[Turn]) -> None:
        self.turns = turns
        self.bases: list[int] = []

    async def read(self, base: int) -> list[Turn]:
        """Return the entries after `base`."""
        self.bases.append(base)
        return self.turns[base:]


def tree(num_turns: int, num_tokens: int) -> list[Turn]:
    """Return a log whose every 40th entry goes on from 39 entries before."""
    turns = [turn(version, [9], [version] * num_tokens) for version in range(1, num_turns + 1)]
    parents = {each.version: each.version - (40 if each.version % 40 == 0 else 1) for each in turns}
    return [msgspec.structs.replace(each, parent_version=parents[each.version]) for each in turns]


async def test_of_a_long_log_only_the_end_is_read() -> None:
    """As much of it as has the tokens."""
    log = Log([msgspec.structs.replace(turn(v, [9], [v] * 10), parent_version=v - 1) for v in range(1, 1001)])
    counted = await counted_tokens(log.read, 1000, 200)
    assert counted == newest_outputs(log.turns, 200)
    assert log.bases == [1000 - FIRST_WINDOW]


@pytest.mark.parametrize("version", [1, 31, 39, 40, 41, 79, 80, 500, 999, 1000])
@pytest.mark.parametrize("limit", [1, 100, 2048])
async def test_what_is_counted_is_what_the_whole_path_says(version: int, limit: int) -> None:
    """However little of the log has it, and wherever the path leads."""
    log = Log(tree(1000, 3)[:version])
    path = path_to(log.turns, version)
    assert path is not None
    assert await counted_tokens(log.read, version, limit) == newest_outputs(path, limit)

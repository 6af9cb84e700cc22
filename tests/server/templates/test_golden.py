"""Every template against the committed prompts, and these against an independent tokenizer."""

from __future__ import annotations

import json

import pytest
from pyrwkv_tokenizer import RWKVTokenizer

from server.templates import BUILTIN
from tests.server.templates import golden

GOLDEN: golden.Golden = {
    case: [(text, token_ids) for text, token_ids in pieces]
    for case, pieces in json.loads(golden.PATH.read_text()).items()
}


@pytest.mark.parametrize("name", BUILTIN)
def test_prompts_are_the_committed_ones(name: str) -> None:
    """Text and token ids of every turn border and every opening; no case is missing and none is left over."""
    assert golden.rendered(BUILTIN[name]) == {
        case: pieces for case, pieces in GOLDEN.items() if case.partition(" ")[0] == name
    }


def test_the_committed_ids_are_right() -> None:
    """A tokenizer that is not ours gives every piece the same ids."""
    independent = RWKVTokenizer()
    for pieces in GOLDEN.values():
        for text, token_ids in pieces:
            assert list(independent.encode(text)) == token_ids


# The ids that are known from the model's own documentation.
BLANK_LINE, NEWLINE, USER, COLON, ASSISTANT, FLOWER = 261, 11, 24281, 59, [5585, 41693], 10060


@pytest.mark.parametrize(
    ("case", "first", "last"),
    [
        ("world later", [BLANK_LINE, USER, COLON], [BLANK_LINE, *ASSISTANT, COLON]),
        ("world-v4 later", [BLANK_LINE, USER, COLON], [BLANK_LINE, *ASSISTANT, COLON]),
        ("g1 later", [BLANK_LINE, USER, COLON], [*ASSISTANT, COLON, 295, 35762]),
        ("g1 none", [USER, COLON], [295, 35762, 5439, 35762]),
        ("g1h later", [FLOWER, NEWLINE, USER, FLOWER], [FLOWER, 61, 35762]),
        ("world tools", [40812, COLON], [BLANK_LINE]),  # of the tools' own turn
        ("raven later", [BLANK_LINE], [BLANK_LINE, 32890, COLON]),
        ("instruction later", [BLANK_LINE], [BLANK_LINE, 53671, COLON]),
    ],
)
def test_borders_are_the_tokens_of_training(case: str, first: list[int], last: list[int]) -> None:
    """A turn begins and ends in the ids under which the models have seen it."""
    token_ids = GOLDEN[case][0][1]
    assert token_ids[: len(first)] == first
    assert token_ids[-len(last) :] == last

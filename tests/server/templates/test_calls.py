"""Calls of tools: how they are written, and found in an answer that is still arriving."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.templates import BUILTIN, AnswerReader, Tool, Toolbox, ToolCall
from server.templates.template import Opening

WORLD = BUILTIN["world"].opening
THINK = BUILTIN["g1"].opening
TOOLS = (Tool("get_weather", "", {}), Tool("get", "", {}))
MAY = Toolbox(TOOLS)
MUST = Toolbox(TOOLS, must_call=True)
OPEN = Opening("Assistant: ```json\n")

PARIS = '{"city": "Paris {\\"}\\" }", "days": [1, {"n": 2}]}'


def read(opening: Opening, toolbox: Toolbox | None, pieces: list[str]) -> tuple[str, str, list[tuple[str, str]], bool]:
    """Return reasoning, content, calls and whether one is whole, of an answer that arrives in `pieces`."""
    reader = AnswerReader(opening, toolbox)
    reasoning, content = "", ""
    calls: list[tuple[str, str]] = []
    for text in [*map(reader.push, pieces), reader.flush()]:
        reasoning += text.reasoning
        content += text.content
        if text.call_name is not None:
            calls.append((text.call_name, ""))
        if text.call_arguments:
            name, arguments = calls[-1]
            calls[-1] = (name, arguments + text.call_arguments)
    return reasoning, content, calls, reader.has_called


@pytest.mark.parametrize(
    ("opening", "toolbox", "text", "content", "calls", "has_called"),
    [
        # a call, in the form of training and in others that mean the same
        (OPEN, MUST, '{"name":"get","arguments":{}}\n```', "", [("get", "{}")], True),
        (OPEN, MUST, '\n{"name": "get_weather", "arguments": ' + PARIS + "}", "", [("get_weather", PARIS)], True),
        (WORLD, MAY, ' ```json\n{"name":"get","arguments":{"a":1}}\n```', "", [("get", '{"a":1}')], True),
        (WORLD, MAY, '\n```json\n{ "name" :\n"get", "arguments" : {} }\n```\n\n', "", [("get", "{}")], True),
        (WORLD, MAY, '{"name":"get","arguments":{}}', "", [("get", "{}")], True),
        (WORLD, MAY, '```json\n{"name":"get"}\n```', "", [("get", "{}")], True),
        # words before it, and after it
        (
            WORLD,
            MAY,
            ' Let me see.\n```json\n{"name":"get","arguments":{}}\n```\nSo.',
            "Let me see.\nSo.",
            [("get", "{}")],
            True,
        ),
        (WORLD, MAY, '```json\n{"name":"get","arguments":{}}\n```\n```json\n{}', "```json\n{}", [("get", "{}")], True),
        (
            WORLD,
            MAY,
            '```json\n{"x":1}\n```\n```json\n{"name":"get"}',
            '```json\n{"x":1}\n```\n',
            [("get", "{}")],
            True,
        ),
        (WORLD, MAY, '{"name":"get","arguments":{}, "id":1}', ', "id":1}', [("get", "{}")], True),
        # what only looks like one
        (WORLD, MAY, ' Hello {"name":"get","arguments":{}}', 'Hello {"name":"get","arguments":{}}', [], False),
        (
            WORLD,
            MAY,
            '```json\n{"name":"got","arguments":{}}\n```',
            '```json\n{"name":"got","arguments":{}}\n```',
            [],
            False,
        ),
        (WORLD, MAY, '```json\n{"name":"get","arguments":[]}', '```json\n{"name":"get","arguments":[]}', [], False),
        (WORLD, MAY, '```json\n{"arguments":{},"name":"get"}', '```json\n{"arguments":{},"name":"get"}', [], False),
        (WORLD, MAY, '```js\n{"name":"get"}', '```js\n{"name":"get"}', [], False),
        (WORLD, MAY, "{get}", "{get}", [], False),
        (OPEN, MUST, "I will not.", "I will not.", [], False),
        (OPEN, MUST, '["name"]', '["name"]', [], False),
        (
            WORLD,
            None,
            '```json\n{"name":"get","arguments":{}}\n```',
            '```json\n{"name":"get","arguments":{}}\n```',
            [],
            False,
        ),
        # cut off
        (WORLD, MAY, '```json\n{"name":"ge', '```json\n{"name":"ge', [], False),
        (WORLD, MAY, " a ``", "a ``", [], False),
        (WORLD, MAY, "  ", " ", [], False),
        (WORLD, MAY, '```json\n{"name":"get","arguments":{"a', "", [("get", '{"a')], False),
        (WORLD, MAY, '```json\n{"name":"get","arguments":{}', "", [("get", "{}")], True),
        (WORLD, MAY, '```json\n{"name":"get","arguments":{}}\n``', "", [("get", "{}")], True),
        # arguments that are not JSON are delivered as they are, and the call does not count
        (WORLD, MAY, '```json\n{"name":"get","arguments":{a]}\n```', "}\n```", [("get", "{a]")], False),
        (WORLD, MAY, '{"name":"get","arguments":{"a":NaN}}', "}", [("get", '{"a":NaN}')], False),
    ],
)
def test_answer(
    opening: Opening,
    toolbox: Toolbox | None,
    text: str,
    content: str,
    calls: list[tuple[str, str]],
    has_called: bool,
) -> None:
    """Words and calls are told apart, all at once or character by character; nothing that was said is lost."""
    assert read(opening, toolbox, [text]) == ("", content, calls, has_called)
    assert read(opening, toolbox, list(text)) == ("", content, calls, has_called)


def test_a_thought_comes_before_a_call() -> None:
    """And may look like one."""
    text = '>```json\n{"name":"get"}</think>\n```json\n{"name":"get","arguments":{"a":2}}\n```'
    expected = ('```json\n{"name":"get"}', "", [("get", '{"a":2}')], True)
    assert read(THINK, MAY, [text]) == expected
    assert read(THINK, MAY, list(text)) == expected


FRAGMENTS = ["```", "```json", "json", "\n", " ", "{", "}", '"', '"name"', ":", '"get"', '"get', "_weather", ","]
FRAGMENTS += [
    '"arguments"',
    "[",
    "\\",
    "a",
    "</think>",
    '{"name":"get","arguments":{',
    '{"name": "get"',
    "好",
    "\u00a0",
]


@pytest.mark.parametrize(("opening", "toolbox"), [(WORLD, MAY), (OPEN, MUST), (THINK, MAY)])
@given(data=st.data())
def test_any_cut_gives_the_same(opening: Opening, toolbox: Toolbox, data: st.DataObject) -> None:
    """How the text was cut does not show in what is read."""
    text = "".join(data.draw(st.lists(st.sampled_from(FRAGMENTS), max_size=24)))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert read(opening, toolbox, pieces) == read(opening, toolbox, [text])


ARGUMENTS = st.dictionaries(st.text(), st.recursive(st.text() | st.integers(), st.lists, max_leaves=4), max_size=4)


@given(
    arguments=ARGUMENTS,
    words=st.text(st.sampled_from("ab .\n")),
    ascii_only=st.booleans(),
    indent=st.none() | st.just(2),
)
def test_every_call_that_is_written_is_found(
    arguments: dict[str, object], words: str, ascii_only: bool, indent: int | None
) -> None:
    """Whatever the arguments hold and however they are laid out, they come out as they went in."""
    text = json.dumps(arguments, ensure_ascii=ascii_only, indent=indent)
    words = words.strip() and words.strip() + "\n"
    _, content, calls, has_called = read(WORLD, MAY, list(f"{words}{ToolCall('get', text).text}"))
    assert (content, calls, has_called) == (words, [("get", text)], True)


def test_arguments_are_passed_on_as_they_come() -> None:
    """Nothing of them is held back."""
    reader = AnswerReader(OPEN, MUST)
    texts = [reader.push(piece) for piece in ('{"name":"get","arguments":', '{"ci', 'ty":"', "Par", 'is"}', "}\n```")]
    assert [text.call_name for text in texts] == [None, "get", None, None, None, None]
    assert [text.call_arguments for text in texts] == ["", '{"ci', 'ty":"', "Par", 'is"}', ""]


def test_words_are_held_no_longer_than_needed() -> None:
    """Text that cannot begin a call is passed on at once."""
    reader = AnswerReader(WORLD, MAY)
    assert [reader.push(piece).content for piece in (" Hi", "\n", "`", "`x", "```json\n", '{"name": "g', "o")] == [
        "Hi",
        "\n",
        "",
        "``x",
        "",
        "",
        '```json\n{"name": "go',
    ]

"""Tools: what a model is told of them, how calls and results stand in a prompt, and what a call must satisfy."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import llguidance
import pytest

from server.templates import (
    BUILTIN,
    Message,
    Template,
    TemplateError,
    Tool,
    Toolbox,
    ToolCall,
    call_grammar,
    render,
    tool_schema,
    tools_text,
)

WORLD, G1, G1H = (BUILTIN[name] for name in ("world", "g1", "g1h"))
WITHOUT = [template for template in BUILTIN.values() if template.tools is None]

WEATHER = Tool(
    "get_weather",
    "",
    {
        "type": "object",
        "properties": {"location": {"type": "string"}, "unit": {"enum": ["celsius", "fahrenheit"]}},
        "required": ["location"],
        "additionalProperties": False,
    },
)
STOCK = Tool(
    "get_stock_price", "", {"type": "object", "properties": {"ticker": {"type": "string"}}, "required": ["ticker"]}
)
NOW = Tool("now", "The  time\n\nof day. ", {})

HI = Message("user", "hi")
CALL = Message("assistant", "", ToolCall("now", "{}"))
RESULT = Message("tool", '{"time":\n\n"noon"}')


# -- what the model is told -------------------------------------------------------------------------------------------


def test_tools_are_told_in_the_form_of_training() -> None:
    """The author's own example, character by character."""
    toolbox = Toolbox((WEATHER, STOCK), must_call=True)
    prompt = render([HI], WORLD, first=True, preamble=tools_text(toolbox, WORLD), must_call=True)
    assert prompt.text == (
        "System: Tools:\n"
        '- get_weather(location: string, unit?: "celsius" | "fahrenheit")\n'
        "- get_stock_price(ticker: string)\n"
        "Return only a JSON function call.\n\n"
        "User: hi\n\nAssistant: ```json\n"
    )


def test_a_model_that_may_call_is_told_so() -> None:
    """And its answer opens like any other, with a thought where asked for."""
    text = tools_text(Toolbox((STOCK,)), G1)
    assert text.endswith("\nTo use a tool, return only a JSON function call.")
    assert render([HI], G1, first=True, preamble=text, reasoning_effort="low").text.endswith("Assistant: <think")


def test_descriptions_are_told_in_the_line() -> None:
    """Of the tool and of its arguments; blank lines in them cannot end the turn."""
    documented = {"type": "object", "properties": {"a": {"type": "integer", "description": "How\n\nmany."}, "b": {}}}
    assert tools_text(Toolbox((NOW, Tool("f", "Does.", documented))), WORLD).splitlines()[1:-1] == [
        "- now(): The time of day.",
        "- f(a?: integer, b?: any): Does.; a: How many.",
    ]


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"type": "string"}, "string"),
        ({"type": ["string", "null"]}, "string | null"),
        ({"const": "é"}, '"é"'),
        ({"enum": [1, None, True]}, "1 | null | true"),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, "integer | null"),
        ({"oneOf": [{"type": "integer"}, {"type": "string"}]}, "integer | string"),
        ({"type": "array", "items": {"type": "number"}}, "number[]"),
        ({"type": "array", "items": {"enum": ["a", "b"]}}, '("a" | "b")[]'),
        ({"type": "array"}, "array"),
        ({"type": "object"}, "object"),
        (
            {"type": "object", "properties": {"x": {"type": "integer"}, "y": {"type": "boolean"}}, "required": ["y"]},
            "{x?: integer, y: boolean}",
        ),
        ({"$ref": "#/$defs/point"}, "{x: number}"),
        ({"$ref": "#/$defs/missing"}, "any"),
        ({"$ref": "other.json"}, "any"),
        ({"$ref": "#/$defs/loop"}, "any"),
        ({}, "any"),
        (True, "any"),
    ],
)
def test_types(schema: Any, text: str) -> None:
    """A type is written as in the models' training; what has no such form is `any`."""
    point = {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"]}
    definitions = {"point": point, "loop": {"$ref": "#/$defs/loop"}}
    parameters = {"type": "object", "properties": {"p": schema}, "required": ["p"], "$defs": definitions}
    assert tools_text(Toolbox((Tool("f", "", parameters),)), WORLD).splitlines()[1] == f"- f(p: {text})"


def test_a_preamble_and_a_system_text_are_one_turn() -> None:
    """Models have seen one system text, at the beginning."""
    parts = [Message("developer", "Be brief."), HI]
    assert render(parts, WORLD, first=True, preamble="Tools:").text == (
        "System: Tools:\nBe brief.\n\nUser: hi\n\nAssistant:"
    )
    assert render([HI], WORLD, first=False, preamble="Tools:").text == ("\n\nSystem: Tools:\n\nUser: hi\n\nAssistant:")


# -- calls and results in a history -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "pieces"),
    [
        (
            WORLD,
            (
                "User: hi\n\nAssistant:",
                ' ```json\n{"name":"now","arguments":{}}\n```',
                '\n\nUser: Function output:\n{"time":\n"noon"}\n\nAssistant:',
            ),
        ),
        (
            G1H,
            (
                "User✿hi✿\nBot✿",
                '```json\n{"name":"now","arguments":{}}\n```',
                '✿\nUser✿Function output:\n{"time":\n"noon"}✿\nBot✿<think',
            ),
        ),
    ],
)
def test_calls_and_results_are_turns(template: Template, pieces: tuple[str, ...]) -> None:
    """A call stands as the model writes it, its result in the user's place."""
    assert render([HI, CALL, RESULT], template, first=True).pieces == pieces


def test_words_come_before_the_call() -> None:
    """On lines of their own."""
    spoken = Message("assistant", " One moment. ", ToolCall("now", '{"a": "\\n\\n"}'))
    pieces = render([HI, spoken, RESULT], WORLD, first=True).pieces
    assert pieces[1] == ' One moment.\n```json\n{"name":"now","arguments":{"a": "\\n\\n"}}\n```'


def test_a_result_may_be_empty() -> None:
    """A tool need not have anything to say."""
    text = render([HI, CALL, Message("tool", " ")], WORLD, first=True).text
    assert text.endswith("\n\nUser: Function output:\n\nAssistant:")


@pytest.mark.parametrize("arguments", ["", "[]", "{", '{"a": NaN}', '{} "x"', "[" * 100_000])
def test_arguments_that_are_no_object_are_refused(arguments: str) -> None:
    """They would not be what a model could have written."""
    message = Message("assistant", "", ToolCall("now", arguments))
    with pytest.raises(TemplateError) as caught:
        render([HI, message, RESULT], WORLD, first=True)
    assert caught.value.field == "messages[1].tool_calls[0].function.arguments"


@pytest.mark.parametrize("template", WITHOUT, ids=lambda template: template.name)
def test_templates_without_a_form_refuse_tools(template: Template) -> None:
    """Tools, results and calls, each by its field."""
    with pytest.raises(TemplateError, match="no form") as offered:
        tools_text(Toolbox((NOW,)), template)
    with pytest.raises(TemplateError, match="no form") as returned:
        render([RESULT], template, first=True)
    with pytest.raises(TemplateError, match="no form") as called:
        render([CALL, HI], template, first=True)
    assert [error.value.field for error in (offered, returned, called)] == ["tools", "messages[0].role", "tools"]


def test_a_call_that_must_be_made_is_made_without_a_thought() -> None:
    """Its opening leaves no place for one; to ask for one all the same is refused."""
    assert render([HI], G1, first=True, must_call=True, reasoning_effort="none").text.endswith("Assistant: ```json\n")
    with pytest.raises(TemplateError) as caught:
        render([HI], G1, first=True, must_call=True, reasoning_effort="high")
    assert caught.value.field == "reasoning_effort"


def test_g1h_refuses_tools_that_forge_turns() -> None:
    """As in any content."""
    text = tools_text(Toolbox((Tool("f", "✿", {}),)), G1H)
    with pytest.raises(TemplateError, match="marks the turns") as caught:
        render([HI], G1H, first=True, preamble=text)
    assert caught.value.field == "tools"


# -- what a call must satisfy -----------------------------------------------------------------------------------------


def is_valid(schema: dict[str, Any] | None, call: object) -> bool:
    """Return whether the call satisfies the schema."""
    assert schema is not None
    return bool(jsonschema.Draft202012Validator(schema).is_valid(call))


def test_a_required_call_is_one_of_the_tools() -> None:
    """With that tool's arguments."""
    schema = tool_schema(Toolbox((WEATHER, STOCK, NOW), must_call=True))
    assert is_valid(schema, {"name": "get_weather", "arguments": {"location": "Paris", "unit": "celsius"}})
    assert is_valid(schema, {"name": "get_stock_price", "arguments": {"ticker": "X"}})
    assert is_valid(schema, {"name": "now", "arguments": {}})
    assert not is_valid(schema, {"name": "now", "arguments": {"a": 1}})
    assert not is_valid(schema, {"name": "get_weather", "arguments": {"ticker": "X"}})
    assert not is_valid(schema, {"name": "other", "arguments": {}})
    assert not is_valid(schema, {"name": "now"})


def test_a_named_call_is_that_tool() -> None:
    """And no other, though the model hears of all."""
    toolbox = Toolbox((WEATHER, STOCK), must_call=True, must_call_name="get_stock_price")
    assert is_valid(tool_schema(toolbox), {"name": "get_stock_price", "arguments": {"ticker": "X"}})
    assert not is_valid(tool_schema(toolbox), {"name": "get_weather", "arguments": {"location": "Paris"}})
    assert "get_weather" in tools_text(toolbox, WORLD)


def test_references_inside_a_schema_still_hold() -> None:
    """They point to where the schema went."""
    node = {
        "type": "object",
        "properties": {"v": {"type": "integer"}, "next": {"$ref": "#/$defs/node"}},
        "required": ["v"],
    }
    parameters = {"type": "object", "properties": {"head": {"$ref": "#/$defs/node"}}, "$defs": {"node": node}}
    schema = tool_schema(Toolbox((Tool("walk", "", parameters), NOW), must_call=True))
    assert is_valid(schema, {"name": "walk", "arguments": {"head": {"v": 1, "next": {"v": 2}}}})
    assert not is_valid(schema, {"name": "walk", "arguments": {"head": {"v": 1, "next": {"v": "x"}}}})
    assert follows(
        call_grammar(Toolbox((Tool("walk", "", parameters),), must_call=True)),
        '{"name":"walk","arguments":{"head":{"v":1,"next":{"v":2}}}}\n```',
    )


def follows(grammar: str | None, text: str) -> bool:
    """Return whether the text is one that the grammar describes, whole."""
    assert grammar is not None
    tokenizer = llguidance.LLTokenizer("byte")
    matcher = llguidance.LLMatcher(tokenizer, grammar)
    assert not matcher.is_error(), matcher.get_error()
    token_ids = tokenizer.tokenize_str(text)
    return bool(matcher.try_consume_tokens(token_ids) == len(token_ids) and matcher.is_accepting())


@pytest.mark.parametrize(
    ("text", "is_one"),
    [
        ('{"name":"get_weather","arguments":{"location":"Paris"}}\n```', True),
        ('{"name": "now", "arguments": {}}\n```', True),
        ('{"name":"now","arguments":{}}', False),
        ('{"name":"get_weather","arguments":{}}\n```', False),
        ("I would rather not.", False),
    ],
)
def test_the_grammar_of_a_required_call(text: str, is_one: bool) -> None:
    """From behind the opening to the end of the fence."""
    assert follows(call_grammar(Toolbox((WEATHER, NOW), must_call=True)), text) == is_one


def test_a_free_choice_has_no_schema_and_no_grammar() -> None:
    """The model may say what it likes, unless a tool is strict."""
    assert tool_schema(Toolbox((WEATHER,))) is None
    assert call_grammar(Toolbox((WEATHER,))) is None


STRICT = Toolbox((Tool(WEATHER.name, "", WEATHER.parameters, strict=True), STOCK))


@pytest.mark.parametrize(
    ("text", "is_one"),
    [
        ("Hello there.", True),
        ("A `tick`, ```js\nx\n``` and a {brace}.", True),
        ('```json\n{"name":"get_weather","arguments":{"location":"Paris"}}\n```', True),
        ('Look:\n```json\n{"name":"get_weather","arguments":{"location":"Paris"}}\n```', True),
        ('```json\n{"name":"get_stock_price","arguments":{"anything":[1]}}\n```', True),
        ('```json\n{"name":"get_weather","arguments":{"place":"Paris"}}\n```', False),
        ('```json\n{"name":"get_weather","arguments":{"location":"Paris"}}', False),
        ('{"name":"get_weather","arguments":{"place":"Paris"}}', False),
        ('```json\n{"x":1}\n```', False),
    ],
)
def test_the_grammar_where_a_strict_tool_may_be_called(text: str, is_one: bool) -> None:
    """Any words, and calls that satisfy their schemas; nothing that a reader would take for another call."""
    assert follows(call_grammar(STRICT), text) == is_one


def test_the_grammar_is_that_of_the_schema() -> None:
    """What is written in it reads back as a call that satisfies the schema."""
    grammar = call_grammar(Toolbox((WEATHER,), must_call=True))
    assert grammar is not None
    rule = json.loads(grammar.partition("%json ")[2])
    assert {key: value for key, value in rule.items() if key != "x-guidance"} == tool_schema(
        Toolbox((WEATHER,), must_call=True)
    )

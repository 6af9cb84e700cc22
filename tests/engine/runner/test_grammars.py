"""Grammars: what they let through, what is refused, and what is kept of them."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import pytest

from engine.errors import InvalidRequest
from engine.messages import Grammar
from engine.runner import grammars as module
from engine.runner.grammars import GrammarMatcher, Grammars
from engine.scheduler.validation import MAX_GRAMMAR_BYTES
from engine.tokenizer.bytes import ByteTokenizer
from engine.tokenizer.world import WorldTokenizer

V = 256
POINT = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"], "additionalProperties": False}


# Compiles; after "s" more rules are possible at once than the library follows.
GROWING = Grammar(
    kind="lark", text='start: "s" a0\n' + "".join(f"a{i}: a{i + 1} /b/?\n" for i in range(1100)) + "a1100: /x/"
)


@pytest.fixture
def grammars() -> Iterator[Grammars]:
    """A compiler for the byte vocabulary."""
    grammars = Grammars(ByteTokenizer(), V)
    yield grammars
    grammars.close()


def schema(value: object, **parts: str) -> Grammar:
    """Return the grammar of a JSON schema."""
    return Grammar(kind="json_schema", text=json.dumps(value), **parts)


def reads(matcher: GrammarMatcher, text: str, stop_token_ids: Sequence[int] = ()) -> bool:
    """Say whether a model may write `text`, byte by byte, and end there."""
    for byte in text.encode():
        allowed = matcher.allowed(stop_token_ids, may_stop=True)
        if allowed is None or not allowed[byte]:
            return False
        matcher.advance(byte)
    return matcher.is_complete or may_end(matcher)


def may_end(matcher: GrammarMatcher) -> bool:
    """Say whether an end of text, here an id that no grammar ever asks for, is allowed."""
    allowed = matcher.allowed([0xFF], may_stop=True)
    return allowed is None or bool(allowed[0xFF])


@pytest.mark.parametrize(
    ("grammar", "yes", "no"),
    [
        (schema(POINT), ['{"x":1}', '{ "x": -12 }', '{\n  "x": 1\n}'], ["", "{}", '{"y":1}', '{"x":1}}', '{  "x":1}']),
        (Grammar(kind="json_object"), ["{}", '{"a": [1, {"b": null}]}', '{"☃": "é"}'], ["[]", "1", '{"a"}']),
        (Grammar(kind="regex", text=r"a+/\d{2}|☃"), ["a/12", "aaa/34", "☃"], ["/12", "a/1", "a/123", "ba/12"]),
        (Grammar(kind="lark", text='start: "x" y*\ny: "y" | "(" y ")"'), ["x", "x(y)((y))"], ["", "x(y", "y"]),
    ],
    ids=lambda value: value.kind if isinstance(value, Grammar) else "",
)
def test_a_grammar_lets_through_what_it_describes(
    grammars: Grammars, grammar: Grammar, yes: list[str], no: list[str]
) -> None:
    """From the first to the last character, and nothing else."""
    assert [text for text in yes if not reads(grammars.compile(grammar).result(), text)] == []
    assert [text for text in no if reads(grammars.compile(grammar).result(), text)] == []


def test_what_completes_an_opening_may_come_first(grammars: Grammars) -> None:
    """As much of `lead` as four characters hold, or nothing."""
    grammar = schema(POINT, lead=r">?\s*")
    assert all(reads(grammars.compile(grammar).result(), lead + '{"x":1}') for lead in ("", ">", ">\n", " ", ">\n\n "))
    assert not any(reads(grammars.compile(grammar).result(), lead + '{"x":1}') for lead in (">>", "a", ">\n\n\n\n"))


def test_a_thought_may_come_first(grammars: Grammars) -> None:
    """Anything up to the first `</think>`; only then the grammar begins."""
    grammar = schema(POINT, after="</think>", lead=r"\s*")
    assert reads(grammars.compile(grammar).result(), '>\n{"x": is it? <b>\n</think>\n{"x":1}')
    assert reads(grammars.compile(grammar).result(), '</think>{"x":1}')
    assert not reads(grammars.compile(grammar).result(), '{"x":1}')
    assert not reads(grammars.compile(grammar).result(), '</think>hm</think>{"x":1}')


def test_the_end_is_allowed_where_the_grammar_accepts(grammars: Grammars) -> None:
    """A stop token without bytes is sampled only where the text may end."""
    matcher = grammars.compile(Grammar(kind="regex", text="ab*")).result()
    ends = []
    for byte in b"abb":
        ends.append(may_end(matcher))
        matcher.advance(byte)
    assert [*ends, may_end(matcher)] == [False, True, True, True]
    assert not matcher.is_complete


def test_a_sequence_that_may_not_stop_yet_does_not(grammars: Grammars) -> None:
    """Its stop tokens are out, unless nothing but the end is possible."""
    matcher = grammars.compile(Grammar(kind="regex", text="ab?")).result()
    matcher.advance(ord("a"))
    allowed = matcher.allowed([0xFF], may_stop=False)
    assert allowed is not None
    assert allowed.nonzero()[0].tolist() == [ord("b")]
    assert matcher.allowed([0xFF, ord("b")], may_stop=False) is None


def test_an_empty_text_is_an_end_without_a_token(grammars: Grammars) -> None:
    """Nothing may be written, so there is nothing to sample."""
    assert grammars.compile(Grammar(kind="lark", text='start: ""')).result().allowed([], may_stop=True) is None


def test_a_text_that_can_go_on_no_way_is_an_error(grammars: Grammars) -> None:
    """The only token that could come is one that may not come yet."""
    matcher = grammars.compile(Grammar(kind="regex", text="ab")).result()
    matcher.advance(ord("a"))
    with pytest.raises(InvalidRequest, match="nothing that may be sampled"):
        matcher.allowed([ord("b")], may_stop=False)


SECRET = "pr1vate"


@pytest.mark.parametrize(
    ("grammar", "complaint"),
    [
        (Grammar(kind="regex", text=f"({SECRET}"), "regular expression"),
        (Grammar(kind="lark", text=f'start: "a" b\nb: {SECRET}'), "line 2, column 4"),
        (Grammar(kind="lark", text=f"hello {SECRET}"), "Lark grammar"),
        (Grammar(kind="lark"), "Lark grammar"),
        (Grammar(kind="json_schema", text=f"[{SECRET}"), "not JSON"),
        (schema([SECRET]), "must be an object"),
        (schema({"type": SECRET}), "JSON schema"),
        (schema({"$ref": f"#/$defs/{SECRET}"}), "JSON schema"),
        (schema({"$ref": "#"}), "no text at all"),
        (schema({"type": "string", "minLength": 2, "maxLength": 1, "title": SECRET}), "nothing can satisfy it"),
        (schema({"oneOf": [{"type": "number"}, {"type": "integer"}]}), "anyOf"),
        (schema({"not": {"const": SECRET}, "uniqueItems": True}), "unsupported keywords not, uniqueItems"),
        (schema({"x-guidance": SECRET}), "x-guidance"),
    ],
    ids=str,
)
def test_what_is_no_grammar_is_refused(grammars: Grammars, grammar: Grammar, complaint: str) -> None:
    """The error says what is wrong as far as it can without repeating what was sent."""
    with pytest.raises(InvalidRequest, match=complaint) as raised:
        grammars.compile(grammar).result()
    assert raised.value.field == "grammar"
    assert str(raised.value).startswith("grammar ")
    assert SECRET not in str(raised.value)


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar(kind="lark", text="start: a0\n" + "".join(f"a{i}: a{i + 1}\n" for i in range(4900)) + "a4900: /x/"),
        Grammar(kind="lark", text="start: A0\n" + "".join(f"A{i}: A{i + 1}\n" for i in range(4900)) + "A4900: /x/"),
        Grammar(kind="regex", text="(" * 32_000 + "x" + ")" * 32_000),
        schema({"$ref": "#/$defs/0", "$defs": {f"{i}": {"$ref": f"#/$defs/{i + 1}"} for i in range(1900)}}),
        Grammar(kind="json_schema", text='{"items":' * 6500 + "{}" + "}" * 6500),
    ],
    ids=["rules", "terminals", "parentheses", "references", "depth"],
)
def test_deep_grammars_do_not_end_the_engine(grammars: Grammars, grammar: Grammar) -> None:
    """The library recurses: whatever fits into the limit of bytes must fit on the stack, or be refused."""
    assert 0.9 * MAX_GRAMMAR_BYTES[grammar.kind] < len(grammar.text) <= MAX_GRAMMAR_BYTES[grammar.kind]
    future = grammars.compile(grammar)
    if isinstance(future.exception(), InvalidRequest):
        return
    assert future.result().allowed([], may_stop=True) is not None


def test_a_grammar_that_grows_too_complex_breaks_its_own_matcher(grammars: Grammars) -> None:
    """After its first token a thousand rules are possible at once: that is too much, and is said so."""
    matcher = grammars.compile(GROWING).result()
    assert matcher.allowed([], may_stop=True) is not None
    with pytest.raises(InvalidRequest, match="too complex"):
        matcher.advance(ord("s"))


def test_matchers_of_one_grammar_know_nothing_of_each_other(grammars: Grammars) -> None:
    """Compiled once, followed by each sequence for itself."""
    grammar = Grammar(kind="regex", text="(ab)+")
    first, second = grammars.compile(grammar).result(), grammars.compile(grammar).result()
    first.advance(ord("a"))
    assert reads(second, "abab")
    assert reads(first, "bab")


def test_a_grammar_is_compiled_once(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second request finds it there, at once."""
    grammar = schema(POINT)
    grammars.compile(grammar).result()
    monkeypatch.setattr(grammars, "_parse", None)  # a call would raise
    again = grammars.compile(grammar)
    assert again.done()
    assert reads(again.result(), '{"x":7}')


@pytest.mark.parametrize(("max_entries", "max_bytes"), [(2, 1 << 20), (100, 7)])
def test_the_cache_is_bounded(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch, max_entries: int, max_bytes: int
) -> None:
    """By entries and by bytes; what was used last stays."""
    monkeypatch.setattr(module, "MAX_CACHED_GRAMMARS", max_entries)
    monkeypatch.setattr(module, "MAX_CACHED_BYTES", max_bytes)
    a, b, c = (Grammar(kind="regex", text=letter * 3) for letter in "abc")
    for grammar in (a, b, a, c):
        grammars.compile(grammar).result()
    assert [grammars.compile(grammar).done() for grammar in (a, c)] == [True, True]
    assert grammars._cache.get(b) is None


def test_slow_grammars_that_nobody_wants_any_more_are_not_compiled(grammars: Grammars) -> None:
    """A request that left before its turn came costs nothing."""
    began, go_on = threading.Event(), threading.Event()

    def parse(grammar: Grammar) -> Any:
        began.set()
        go_on.wait()
        raise InvalidRequest("grammar", "grammar is only a test")

    grammars._parse = parse  # type: ignore[method-assign]
    running: list[Future[GrammarMatcher]] = [grammars.compile(Grammar(kind="regex", text=t)) for t in "ab"]
    began.wait()
    waiting = grammars.compile(Grammar(kind="regex", text="c"))
    assert waiting.cancel()
    go_on.set()
    assert [type(future.exception()) for future in running] == [InvalidRequest] * 2


def test_whoever_waits_is_told(grammars: Grammars) -> None:
    """`notify` is called when a grammar is compiled, or refused."""
    told = threading.Semaphore(0)
    grammars._notify = told.release
    grammars.compile(Grammar(kind="regex", text="a"))
    grammars.compile(Grammar(kind="regex", text="("))
    assert told.acquire(timeout=60)
    assert told.acquire(timeout=60)


def test_tokens_of_several_bytes_may_cross_the_parts_of_a_text() -> None:
    """With the World vocabulary too, a mask is what the text allows, however tokens cut it."""
    tokenizer = WorldTokenizer(65536)
    grammars = Grammars(tokenizer, 65536)
    matcher = grammars.compile(schema(POINT, lead=" ?")).result()
    allowed = matcher.allowed(tokenizer.eos_token_ids, may_stop=True)
    assert allowed is not None
    words = {tokenizer.token_bytes(int(i)) for i in allowed.nonzero()[0]}
    assert {b" ", b"{", b" {", b'{"'} <= words
    assert all(b' {"x":'.find(word.lstrip()) >= 0 or word.startswith((b"{", b" {")) for word in words)
    for token_id in tokenizer.encode(' {"x": 10}'):
        allowed = matcher.allowed(tokenizer.eos_token_ids, may_stop=True)
        assert allowed is not None
        assert allowed[token_id]
        matcher.advance(token_id)
    assert matcher.is_complete
    grammars.close()


def test_the_library_is_imported_with_the_first_grammar() -> None:
    """An engine that nobody asks for structure starts without it."""
    code = "import sys, engine.process; sys.exit('llguidance' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""Grammars that outputs must follow: compiled off the engine's thread, then asked before every token.

The grammars themselves are llguidance's; here is what the engine makes of them: one parser a sequence, which follows
the tokens that were *sampled*, whatever of them is delivered, and a bounded cache of what was compiled. The library is
imported with the first grammar. Tensors are not known here: what is allowed is a row of booleans, which
`engine.runner.sampler` applies.
"""

from __future__ import annotations

import json
import logging
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from engine.errors import InvalidRequest
from engine.messages import Grammar

if TYPE_CHECKING:
    import llguidance

_log = logging.getLogger(__name__)

Allowed = npt.NDArray[np.bool_]

NUM_COMPILERS = 2
MAX_CACHED_GRAMMARS = 256
MAX_CACHED_BYTES = 4 << 20  # of the grammars' texts, to which their size in memory is roughly proportional

# The library compiles recursively, 16 KiB of rules that lead to each other in up to 100 MiB of stack. Only what is
# used of it takes memory.
STACK_BYTES = 512 << 20

# Between the tokens of JSON: one space, or a new line and its indentation. Without a bound a model that is lost writes
# white space for ever.
JSON_WHITESPACE = r" |\n {0,32}"
MAX_LEAD_CHARS = 4

_JSON_KEYWORDS = re.compile(r"Unimplemented keys: \[(.*)\]")
_PLACE_IN_TEXT = re.compile(r"^(?:at )?(\d+)\((\d+)\): ")
_KINDS = {
    "json_schema": "JSON schema",
    "json_object": "JSON schema",
    "regex": "regular expression",
    "lark": "Lark grammar",
}

_threads_begin = threading.Lock()


class Bytes(Protocol):
    """The part of a tokenizer that grammars need."""

    def token_bytes(self, token_id: int) -> bytes:
        """Return what the token adds to the text."""
        ...

    def encode_bytes(self, data: bytes) -> list[int]:
        """Return tokens whose bytes are `data`."""
        ...


class GrammarMatcher:
    """One sequence's place in its grammar. Belongs to the engine's thread."""

    def __init__(self, parser: llguidance.LLMatcher, vocab_size: int) -> None:
        self._parser = parser
        self._vocab_size = vocab_size
        self._words = np.zeros(_num_words(vocab_size), np.int32)

    @property
    def is_complete(self) -> bool:
        """Whether the text is all of what the grammar describes, and nothing may follow."""
        return self._parser.is_stopped() and not self._parser.is_error()

    def allowed(self, stop_token_ids: Sequence[int], *, may_stop: bool) -> Allowed | None:
        """Return which tokens may come next, `[V]`; None: nothing but the end.

        Of the `stop_token_ids`, those without bytes are allowed where the text may end, if the sequence `may_stop`.
        Raises `InvalidRequest` if nothing at all is allowed, or that would cost too much to find out.
        """
        _fill(self._parser, self._words)
        bits = np.unpackbits(self._words.view(np.uint8), count=self._vocab_size + 1, bitorder="little").view(np.bool_)
        allowed, may_end = bits[: self._vocab_size], bool(bits[self._vocab_size])
        ends = np.array(stop_token_ids, np.int64)
        if not may_stop:
            allowed[ends] = False
        if not allowed.any():
            if may_end:
                return None
            raise InvalidRequest("grammar", "grammar allows nothing that may be sampled here")
        if may_stop and may_end:
            allowed[ends] = True
        return allowed

    def advance(self, token_id: int) -> None:
        """Follow a sampled token; raises `InvalidRequest` if the grammar becomes too complex to follow."""
        if not self._parser.consume_token(token_id):
            raise InvalidRequest("grammar", _too_complex(self._parser))


class Grammars:
    """Compiles grammars for one vocabulary. Its methods are for the engine's thread; `notify` is called from others."""

    def __init__(self, vocabulary: Bytes, vocab_size: int, notify: Callable[[], None] = lambda: None) -> None:
        self._vocabulary = vocabulary
        self._vocab_size = vocab_size
        self._notify = notify
        self._tokenizer: llguidance.LLTokenizer | None = None
        self._tokenizer_lock = threading.Lock()
        self._compilers = ThreadPoolExecutor(NUM_COMPILERS, thread_name_prefix="grammar-compiler")
        self._cache = _Cache()

    def compile(self, grammar: Grammar) -> Future[GrammarMatcher]:
        """Return a matcher at the beginning of `grammar`, some time soon.

        The future raises `InvalidRequest` for what is no grammar. Cancelling it is possible until work on it begins.
        """
        if (parser := self._cache.get(grammar)) is not None:
            done: Future[GrammarMatcher] = Future()
            done.set_result(GrammarMatcher(parser.deep_copy(), self._vocab_size))
            return done
        future = self._submit(grammar)
        future.add_done_callback(lambda _: self._notify())
        return future

    def close(self) -> None:
        """Wait for what is being compiled, and drop what has not begun."""
        self._compilers.shutdown(cancel_futures=True)

    def _submit(self, grammar: Grammar) -> Future[GrammarMatcher]:
        with _threads_begin:
            stack_bytes = threading.stack_size(STACK_BYTES)  # of the thread that may begin with this
            try:
                return self._compilers.submit(self._compile, grammar)
            finally:
                threading.stack_size(stack_bytes)

    def _compile(self, grammar: Grammar) -> GrammarMatcher:
        if (parser := self._cache.get(grammar)) is None:  # another thread may have been faster
            parser = self._parse(grammar)
            self._cache.put(grammar, parser)
        return GrammarMatcher(parser.deep_copy(), self._vocab_size)

    def _parse(self, grammar: Grammar) -> llguidance.LLMatcher:
        import llguidance

        limits = llguidance.LLParserLimits(verbose_errors=False)
        parser = llguidance.LLMatcher(self._open_tokenizer(), _source(grammar), log_level=0, limits=limits)
        if parser.is_error():
            raise InvalidRequest("grammar", _complaint(grammar, parser.get_error()))
        _fill(parser, np.zeros(_num_words(self._vocab_size), np.int32))  # the first time is the slow one
        return parser

    def _open_tokenizer(self) -> llguidance.LLTokenizer:
        import llguidance

        with self._tokenizer_lock:
            if self._tokenizer is None:
                wrapper: Any = _Vocabulary(self._vocabulary, self._vocab_size)
                self._tokenizer = llguidance.LLTokenizer(
                    wrapper, n_vocab=self._vocab_size + 1, eos_token=self._vocab_size
                )
            return self._tokenizer


class _Cache:
    """Parsers at the beginning of their grammars, those used last. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._parsers: OrderedDict[Grammar, llguidance.LLMatcher] = OrderedDict()
        self._num_bytes = 0

    def get(self, grammar: Grammar) -> llguidance.LLMatcher | None:
        """Return the parser, which nobody may advance."""
        with self._lock:
            if (parser := self._parsers.get(grammar)) is not None:
                self._parsers.move_to_end(grammar)
            return parser

    def put(self, grammar: Grammar, parser: llguidance.LLMatcher) -> None:
        """Keep the parser, and drop others for it."""
        with self._lock:
            if grammar in self._parsers:
                return
            self._parsers[grammar] = parser
            self._num_bytes += len(grammar.text)
            while len(self._parsers) > MAX_CACHED_GRAMMARS or self._num_bytes > MAX_CACHED_BYTES:
                dropped, _ = self._parsers.popitem(last=False)
                self._num_bytes -= len(dropped.text)


class _Vocabulary:
    """The vocabulary as the library reads it, with one token more that stands for the end.

    A vocabulary may have no end of text, or several; whether the output may end here is one more bit either way.
    """

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, vocabulary: Bytes, vocab_size: int) -> None:
        self.tokens = [*map(vocabulary.token_bytes, range(vocab_size)), b"<end>"]
        self.eos_token_id = vocab_size
        self.special_token_ids = [vocab_size]
        self._encode = vocabulary.encode_bytes

    def __call__(self, text: bytes | str) -> list[int]:
        return self._encode(text if isinstance(text, bytes) else text.encode())


def _num_words(vocab_size: int) -> int:
    return (vocab_size + 1 + 31) // 32


def _fill(parser: llguidance.LLMatcher, words: npt.NDArray[np.int32]) -> None:
    """Write a bit for every token, and one for the end; raises `InvalidRequest` where that costs too much."""
    parser.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
    if parser.is_error():
        raise InvalidRequest("grammar", _too_complex(parser))


def _source(grammar: Grammar) -> str:
    """Return the grammar as the library's list of two: what comes first, and the answer itself."""
    import llguidance

    rules = []
    parts = []
    if grammar.after:
        parts.append("before")
        rules.append(rf"before[lazy]: /(?s:.*){llguidance.regex_to_lark(re.escape(grammar.after), '')}/")
    if grammar.lead:
        parts.append("lead?")
        rules.append("lead: LEAD")
        rules.append(rf"LEAD: /{llguidance.regex_to_lark(grammar.lead, '')}/ & /(?s:.{{1,{MAX_LEAD_CHARS}}})/")
    first = "\n".join([f"start: {' '.join([*parts, '@answer'])}", *rules])
    return json.dumps({"grammars": [{"lark_grammar": first}, {"name": "answer", **_answer(grammar)}]})


def _answer(grammar: Grammar) -> dict[str, object]:
    import llguidance

    if grammar.kind == "lark":
        return {"lark_grammar": grammar.text}
    if grammar.kind == "regex":
        return {"lark_grammar": f"start: /{llguidance.regex_to_lark(grammar.text)}/"}
    schema = _schema(grammar)
    options = schema.get("x-guidance", {})
    if not isinstance(options, dict):
        raise InvalidRequest("grammar", "grammar has an x-guidance that is not an object")
    return {"json_schema": {**schema, "x-guidance": {"whitespace_pattern": JSON_WHITESPACE, **options}}}


def _schema(grammar: Grammar) -> dict[str, Any]:
    if grammar.kind == "json_object":
        return {"type": "object"}
    try:
        schema = json.loads(grammar.text)
    except (ValueError, RecursionError):
        raise InvalidRequest("grammar", "grammar is not JSON") from None
    if not isinstance(schema, dict):
        raise InvalidRequest("grammar", "grammar must be an object: a JSON schema")
    return schema


def _complaint(grammar: Grammar, error: str) -> str:
    """Say what the library says is wrong, as far as that repeats nothing of the grammar but keywords and places."""
    complaint = f"grammar cannot be compiled as a {_KINDS[grammar.kind]}"
    if (keywords := _JSON_KEYWORDS.match(error)) is not None:
        names = sorted(set(json.loads(f"[{keywords[1]}]")) & _UNSUPPORTED_KEYWORDS)
        return f"{complaint}: unsupported keyword{'s'[: len(names) != 1]} {', '.join(names) or 'in it'}"
    if error.startswith("Unsatisfiable schema"):
        return f"{complaint}: nothing can satisfy it"
    if error.startswith("oneOf constraints"):
        return f"{complaint}: alternatives of oneOf overlap; use anyOf"
    if grammar.kind == "lark" and (place := _PLACE_IN_TEXT.match(error)) is not None:
        return f"{complaint}: error in line {place[1]}, column {place[2]}"
    return complaint


# Keywords of JSON Schema that the library may refuse; other names in its complaints are the client's own.
_UNSUPPORTED_KEYWORDS = frozenset(
    {
        "$anchor",
        "$dynamicAnchor",
        "$dynamicRef",
        "contains",
        "contentEncoding",
        "contentMediaType",
        "contentSchema",
        "dependencies",
        "dependentRequired",
        "dependentSchemas",
        "else",
        "if",
        "maxContains",
        "maxProperties",
        "minContains",
        "minProperties",
        "not",
        "patternProperties",
        "propertyNames",
        "then",
        "unevaluatedItems",
        "unevaluatedProperties",
        "uniqueItems",
    }
)


def _too_complex(parser: llguidance.LLMatcher) -> str:
    if parser.get_error().startswith("panic"):
        _log.error("llguidance broke while it followed a grammar")
    if parser.get_error().startswith("NoExtension"):
        return "grammar describes no text at all"
    return "grammar is too complex: it was given up while it was followed"

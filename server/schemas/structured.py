"""What a request may ask of the form of its output, and the grammar that says so to the engine."""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal

import orjson
from pydantic import Field, StringConstraints, model_validator

from engine.messages import Grammar
from server.errors import BadRequest
from server.schemas.strict import StrictModel

MAX_CHOICES = 1024
# A schema may have four times as many bytes. Rules nest in each other: what a step of a grammar may cost grows with
# the square of its length, and the engine waits for it.
MAX_GRAMMAR_CHARS = 16_384

GrammarText = Annotated[str, StringConstraints(max_length=MAX_GRAMMAR_CHARS)]

SchemaName = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


class JsonSchema(StrictModel):
    """A schema that the output follows. It is enforced whether or not it is `strict`."""

    # The name and the description would be for the model to read; here it reads the messages only.
    without_effect: ClassVar[frozenset[str]] = frozenset({"description", "strict"})

    name: SchemaName
    schema_: dict[str, Any] | None = Field(None, alias="schema")  # None: any JSON object


class ResponseFormat(StrictModel):
    """OpenAI's way to ask for JSON."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            message = "there must be a schema with type json_schema, and only then."
            raise BadRequest(f"response_format.json_schema: {message}", "response_format.json_schema")
        return self

    @property
    def grammar(self) -> Grammar | None:
        """The grammar that is asked for; None for plain text."""
        if self.type == "text":
            return None
        return json_grammar(None if self.json_schema is None else self.json_schema.schema_)


def json_grammar(schema: dict[str, Any] | None) -> Grammar:
    """Return the grammar of what satisfies `schema`; without one, of any JSON object."""
    return Grammar(kind="json_object") if schema is None else Grammar(kind="json_schema", text=_json(schema))


class StructuredOutputs(StrictModel):
    """vLLM's way to ask for a form: exactly one of four."""

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    regex: GrammarText | None = None
    grammar: GrammarText | None = None
    choice: list[str] | None = Field(None, min_length=1, max_length=MAX_CHOICES)

    @model_validator(mode="after")
    def _check_one(self) -> StructuredOutputs:
        if sum(value is not None for value in (self.json_, self.regex, self.grammar, self.choice)) != 1:
            message = "exactly one of json, regex, grammar and choice says what the output looks like."
            raise BadRequest(f"structured_outputs: {message}", "structured_outputs")
        if sum(map(len, self.choice or ())) > MAX_GRAMMAR_CHARS:
            message = f"at most {MAX_GRAMMAR_CHARS} characters together."
            raise BadRequest(f"structured_outputs.choice: {message}", "structured_outputs.choice")
        return self

    @property
    def asked(self) -> tuple[str, Grammar]:
        """The name of the one field, and its grammar."""
        if self.regex is not None:
            return "regex", regex_grammar(self.regex)
        if self.grammar is not None:
            return "grammar", lark_grammar(self.grammar)
        if self.choice is not None:
            return "choice", lark_grammar(f"start: {' | '.join(map(_lark_string, self.choice))}")
        schema = self.json_ if isinstance(self.json_, str) else _json(self.json_)
        return "json", Grammar(kind="json_schema", text=schema)


def regex_grammar(pattern: str) -> Grammar:
    """Return the grammar of the texts that match `pattern` from their first to their last character."""
    return Grammar(kind="regex", text=pattern)


def lark_grammar(text: str) -> Grammar:
    """Return the grammar that `text` describes in Lark's notation."""
    return Grammar(kind="lark", text=text)


def _json(value: object) -> str:
    return orjson.dumps(value).decode()


def _lark_string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)

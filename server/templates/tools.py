"""The tools of a request: how they are told to the model, and what a call of them must look like."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from server.templates.calls import END_OF_FENCE, FENCE
from server.templates.template import Template, TemplateError, ToolForm

MAX_TYPE_DEPTH = 8  # how deep a signature looks into nested types
# Between the tokens of a call's JSON: a space, or a new line and its indentation. Unbounded, a model that is lost would
# write white space for ever.
JSON_WHITESPACE = r" |\n {0,32}"

Schema = Mapping[str, Any]  # a JSON schema


@dataclass(frozen=True, slots=True)
class Tool:
    """A function the model may call. `parameters` is the JSON schema of its arguments, an object."""

    name: str
    description: str
    parameters: Schema
    strict: bool = False  # a call must satisfy the schema


@dataclass(frozen=True, slots=True)
class Toolbox:
    """The tools of one request and whether one of them must be called."""

    tools: tuple[Tool, ...]
    must_call: bool = False
    must_call_name: str | None = None  # this one and no other

    @property
    def callable_tools(self) -> tuple[Tool, ...]:
        """Those that the answer may call."""
        return tuple(tool for tool in self.tools if self.must_call_name in (None, tool.name))


def tool_form(template: Template) -> ToolForm:
    """Return how the template speaks of tools; raises `TemplateError` if it does not."""
    if template.tools is None:
        raise TemplateError("tools", f"chat template {template.name!r} has no form for tools")
    return template.tools


def tools_text(toolbox: Toolbox, template: Template) -> str:
    """Return what the system text says of the tools: their signatures, a line each, and what to do with them."""
    form = tool_form(template)
    return "\n".join([form.title, *map(_line, toolbox.tools), form.demand if toolbox.must_call else form.offer])


def tool_schema(toolbox: Toolbox) -> dict[str, Any] | None:
    """Return the JSON schema that the call must satisfy; None if there need not be one."""
    return call_schema(toolbox.callable_tools) if toolbox.must_call else None


def call_grammar(toolbox: Toolbox) -> str | None:
    """Return the Lark grammar that an answer must follow after its opening and its thought; None: it is free.

    A call that must be made satisfies its tool's schema. Where the model may call or not, only calls of strict tools
    have to, and what is no call must not look as if it were going to be one.
    """
    if toolbox.must_call:
        return f'start: call "\\n{END_OF_FENCE}"\n{_call_rule(call_schema(toolbox.callable_tools))}'
    if not any(tool.strict for tool in toolbox.tools):
        return None
    tools = tuple(tool if tool.strict else replace(tool, parameters={"type": "object"}) for tool in toolbox.tools)
    words = r"[ \t\r\n]*([^ \t\r\n{](?s:.*))?"  # a brace in the beginning begins a call
    return "\n".join(
        [
            rf'start: WORDS | fenced "\n" call "\n{END_OF_FENCE}"',
            f"WORDS: /{words}/",
            f"fenced[lazy]: /{words}{FENCE}/",  # lazy: the first fence is a call's, and no part of the words
            _call_rule(call_schema(tools)),
        ]
    )


def _call_rule(schema: Schema) -> str:
    return f"call: %json {json.dumps({**schema, 'x-guidance': {'whitespace_pattern': JSON_WHITESPACE}})}\n"


def call_schema(tools: tuple[Tool, ...]) -> dict[str, Any]:
    """Return the JSON schema of a call of one of `tools`."""
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": tool.name}, "arguments": _arguments(tool)},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    schema: dict[str, Any] = calls[0] if len(calls) == 1 else {"anyOf": calls}
    definitions = {tool.name: _arguments(tool) for tool in tools if _refers(tool.parameters)}
    return schema | {"$defs": definitions} if definitions else schema


def _arguments(tool: Tool) -> dict[str, Any]:
    """Return the schema of the tool's arguments: without any it takes none."""
    schema = tool.parameters or {"properties": {}, "additionalProperties": False}
    return {"type": "object", **_moved(schema, tool.name)}


def _refers(schema: object) -> bool:
    if isinstance(schema, Mapping):
        return isinstance(schema.get("$ref"), str) or any(map(_refers, schema.values()))
    return isinstance(schema, list) and any(map(_refers, schema))


def _moved(schema: Any, name: str) -> Any:
    """Return the schema with its references to itself pointing to where `call_schema` defines it."""
    if isinstance(schema, list):
        return [_moved(item, name) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    moved = {key: _moved(value, name) for key, value in schema.items()}
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        moved["$ref"] = f"#/$defs/{name}{reference[1:]}"
    return moved


# -- signatures -------------------------------------------------------------------------------------------------------


def _line(tool: Tool) -> str:
    """Return `- name(argument: type, optional?: type): what it does; argument: what that is`."""
    explained = [tool.description, *_explanations(tool.parameters)]
    text = "; ".join(re.sub(r"\s+", " ", part).strip() for part in explained if part.strip())
    signature = f"- {tool.name}({_fields(tool.parameters, tool.parameters, MAX_TYPE_DEPTH)})"
    return f"{signature}: {text}" if text else signature


def _explanations(parameters: Schema) -> Iterator[str]:
    for name, schema in parameters.get("properties", {}).items():
        if isinstance(schema, Mapping) and isinstance(schema.get("description"), str):
            yield f"{name}: {schema['description']}"


def _fields(schema: Schema, root: Schema, depth: int) -> str:
    required = schema.get("required", [])
    return ", ".join(
        f"{name}{'' if name in required else '?'}: {_type(field, root, depth - 1)}"
        for name, field in schema.get("properties", {}).items()
    )


def _type(schema: object, root: Schema, depth: int) -> str:
    """Return the type in the notation of the models' training: `string`, `"a" | "b"`, `number[]`, `{x: integer}`."""
    if not isinstance(schema, Mapping) or depth < 0:
        return "any"
    if isinstance(schema.get("$ref"), str):
        return _type(_referred(schema["$ref"], root), root, depth - 1)
    if "const" in schema:
        return json.dumps(schema["const"], ensure_ascii=False)
    if isinstance(schema.get("enum"), list):
        return " | ".join(json.dumps(value, ensure_ascii=False) for value in schema["enum"])
    for alternatives in ("anyOf", "oneOf"):
        if isinstance(schema.get(alternatives), list):
            return " | ".join(_type(option, root, depth - 1) for option in schema[alternatives])
    kind = schema.get("type")
    if isinstance(kind, list):
        return " | ".join(_type({**schema, "type": option}, root, depth - 1) for option in kind)
    if kind == "array" and "items" in schema:
        item = _type(schema["items"], root, depth - 1)
        return f"({item})[]" if " | " in item else f"{item}[]"
    if kind == "object" and isinstance(schema.get("properties"), Mapping):
        return f"{{{_fields(schema, root, depth)}}}"
    return kind if isinstance(kind, str) else "any"


def _referred(reference: str, root: Schema) -> object:
    """Return what a local reference points to; None if it is not one, or points nowhere."""
    target: object = root
    for step in reference.removeprefix("#").split("/")[1:]:
        target = target.get(step.replace("~1", "/").replace("~0", "~")) if isinstance(target, Mapping) else None
    return target if reference.startswith("#") else None

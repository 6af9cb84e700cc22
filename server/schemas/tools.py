"""The tools of a request, in the forms of chat and of responses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import orjson
from pydantic import StringConstraints

from server.errors import BadRequest
from server.schemas.strict import StrictModel
from server.templates import Tool, Toolbox

MAX_TOOLS = 128
MAX_SCHEMA_CHARS = 65_536
MAX_DESCRIPTION_CHARS = 4096
FunctionName = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


class FunctionDefinition(StrictModel):
    """A function that the model may call."""

    name: FunctionName
    description: Annotated[str, StringConstraints(max_length=MAX_DESCRIPTION_CHARS)] = ""
    parameters: dict[str, Any] = {}
    strict: bool = False

    def problem(self) -> str | None:
        """Return what is wrong with the parameters; None: they may be the schema of an object."""
        if len(orjson.dumps(self.parameters)) > MAX_SCHEMA_CHARS:
            return f"at most {MAX_SCHEMA_CHARS} bytes of JSON"
        properties, required = self.parameters.get("properties", {}), self.parameters.get("required", [])
        if self.parameters.get("type", "object") != "object" or not isinstance(properties, dict):
            return "must be the JSON schema of an object"
        if not all(isinstance(schema, dict) for schema in properties.values()):
            return "every property must have a JSON schema"
        if not isinstance(required, list) or not all(name in properties for name in required):
            return "required must list properties of the schema"
        return None


def check_tools(
    functions: Sequence[FunctionDefinition], choice: object, called_name: str | None, field: Callable[[int], str]
) -> None:
    """Raise `BadRequest` for tools that cannot be told apart or called as chosen; `field` names one's parameters."""
    for index, function in enumerate(functions):
        if (problem := function.problem()) is not None:
            raise BadRequest(f"{field(index)}: {problem}.", field(index))
    names = [function.name for function in functions]
    if len(set(names)) < len(names):
        raise BadRequest("tools: two functions have the same name.", "tools")
    if called_name is not None and called_name not in names:
        raise BadRequest("tool_choice: no function of this name is among the tools.", "tool_choice")
    if choice == "required" and not names:
        raise BadRequest("tool_choice: there are no tools of which one could be called.", "tool_choice")


def toolbox_of(functions: Sequence[FunctionDefinition], choice: object, called_name: str | None) -> Toolbox | None:
    """Return the tools that the model hears of; None: it is not to call any."""
    if not functions or choice == "none":
        return None
    return Toolbox(
        tuple(Tool(each.name, each.description, each.parameters, each.strict) for each in functions),
        must_call=choice not in (None, "auto"),
        must_call_name=called_name,
    )

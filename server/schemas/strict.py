"""How strict requests are: exact types, no unknown field, and a reviewed list of what is accepted without effect."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import orjson
from pydantic import BaseModel, ConfigDict, model_validator

from server.errors import BadRequest

NULL = {"type": "null"}


def _describe_leniency(schema: dict[str, Any], model: type[StrictModel]) -> None:
    """Say in the JSON schema what else is accepted: `null` for what may be absent, and the fields we do not have."""
    properties = schema.setdefault("properties", {})
    for name, field in properties.items():
        if name not in schema.get("required", ()) and NULL not in field.get("anyOf", ()):
            default = {"default": field.pop("default")} if "default" in field else {}
            properties[name] = {"anyOf": [field, NULL], **default}
    for name in sorted(model.without_effect):
        properties[name] = {"description": "Accepted without effect."}
    for name, values in model.neutral_values.items():
        properties[name] = {"enum": [*values, None], "description": "Not supported: only what asks for nothing."}


class StrictModel(BaseModel):
    """A request body, or a part of one.

    `true` is not 1, "3" is not 3, NaN is nothing. `null` means the same as leaving the field out.
    """

    model_config = ConfigDict(
        strict=True,
        extra="forbid",
        allow_inf_nan=False,
        frozen=True,
        protected_namespaces=(),
        json_schema_extra=_describe_leniency,
    )

    # OpenAI's fields that change nothing about the answer, whatever they say.
    without_effect: ClassVar[frozenset[str]] = frozenset()
    # OpenAI's fields that we do not have, and the values under which they ask for nothing.
    neutral_values: ClassVar[Mapping[str, tuple[object, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_what_asks_for_nothing(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values  # pydantic says what is wrong with it
        return {name: value for name, value in values.items() if cls._asks_for_something(name, value)}

    @classmethod
    def _asks_for_something(cls, name: str, value: object) -> bool:
        if name in cls.model_fields:
            return value is not None
        if name in cls.without_effect:
            return False
        if name not in cls.neutral_values:
            return True  # unknown: pydantic refuses it by name
        if value is None or _equals_any(value, cls.neutral_values[name]):
            return False
        accepted = [orjson.dumps(neutral).decode() for neutral in cls.neutral_values[name]]
        hint = f" other than {' or '.join(accepted)}" if accepted else ""
        raise BadRequest(f"{name}: this is not supported{hint}.", name, "unsupported_parameter")


def _equals_any(value: object, accepted: tuple[object, ...]) -> bool:
    # By their JSON, in which true is not 1.
    return orjson.dumps(value) in {orjson.dumps(neutral) for neutral in accepted}

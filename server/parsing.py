"""Bytes of a body to a validated request: strictly JSON, strictly typed, and refused by name."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

import orjson
from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from server.errors import BadRequest, BodyTooSlow

RequestBody = TypeVar("RequestBody", bound=BaseModel)

# Parsing takes about 10 ns a byte; longer bodies leave the event loop.
MAX_BYTES_PARSED_ON_LOOP = 1 << 16
# A field is refused by its name, which the client chose; what is longer than any real name is not repeated whole.
MAX_NAME_CHARS = 80


def json_body(model: type[RequestBody]) -> Callable[[Request], Awaitable[RequestBody]]:
    """Return the FastAPI dependency that reads the request's body as a `model`; raises `BadRequest`."""

    async def read(request: Request) -> RequestBody:
        data = await body_of(request)
        if len(data) <= MAX_BYTES_PARSED_ON_LOOP:
            return parse_body(model, data)
        return await asyncio.to_thread(parse_body, model, data)

    return read


async def body_of(request: Request) -> bytes:
    """Return the request's body as it is; raises `BodyTooSlow`."""
    try:
        async with asyncio.timeout(request.app.state.services.settings.body_seconds):
            return await request.body()
    except TimeoutError:
        raise BodyTooSlow from None


def parse_body(model: type[RequestBody], data: bytes) -> RequestBody:
    """Return the request in `data`; raises `BadRequest` that names the first field at fault, never its value."""
    value = parse_json(data)
    if not isinstance(value, dict):
        raise BadRequest("The body must be a JSON object.", code="invalid_json")
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise problem_of(error.errors(include_url=False, include_input=False)[0]) from None


def parse_json(data: bytes) -> object:
    """Return the value of a JSON text: UTF-8, no repeated key, no NaN, no lone surrogate, no NUL, nothing after it."""
    try:
        value: object = orjson.loads(data)  # strict in all but repeated keys, of which it takes the last
        json.loads(data, object_pairs_hook=_refuse_repeated_keys)
    except (ValueError, RecursionError):
        raise BadRequest("The body is not valid JSON in UTF-8.", code="invalid_json") from None
    if rb"\u0000" in data and _has_nul(value):
        raise BadRequest("The body contains a NUL character.", code="invalid_json")
    return value


def _refuse_repeated_keys(pairs: Sequence[tuple[str, Any]]) -> None:
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("repeated key")


def _has_nul(value: object) -> bool:
    if isinstance(value, str):
        return "\0" in value
    if isinstance(value, dict):
        return any(map(_has_nul, value)) or any(map(_has_nul, value.values()))
    return isinstance(value, list) and any(map(_has_nul, value))


def problem_of(problem: Mapping[str, Any], begin: int = 0) -> BadRequest:
    """Return one of pydantic's complaints, without the first `begin` steps of the place it names."""
    param = _param(problem["loc"][begin:])
    if problem["type"] == "extra_forbidden":
        return BadRequest(f"{param}: this field is not supported.", param, "unsupported_parameter")
    code = "missing_required_parameter" if problem["type"] == "missing" else "invalid_value"
    return BadRequest(f"{param}: {problem['msg']}." if param else f"{problem['msg']}.", param, code)


def _param(location: Sequence[int | str]) -> str | None:
    """Return `messages[0].content` for `("messages", 0, "content")`.

    A step in angle brackets says which kind of a thing it was taken for, and is no field.
    """
    name = ""
    for step in location:
        if isinstance(step, str) and step.startswith("<"):
            continue
        name += f"[{step}]" if isinstance(step, int) else f".{step}" if name else step
    return name[:MAX_NAME_CHARS] or None

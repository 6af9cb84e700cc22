"""Routes that describe themselves, and the OpenAPI document they make together.

Bodies are read and written without FastAPI (strictly, and fast), so it cannot know their schemas; each route names them
instead, by the very types that `json_body` validates and `json_response` encodes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar

import msgspec
from fastapi import APIRouter, FastAPI, Response
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from server.errors import ANSWERS, ErrorBody
from server.idempotency import HEADER, MAX_KEY_CHARS
from server.security import OPEN_PATHS

Endpoint = TypeVar("Endpoint", bound=Callable[..., Any])
Schema = dict[str, Any]

JSON = "application/json"
EVENTS = "text/event-stream"
REFERENCE = "#/components/schemas/{name}"

# What any request may meet, and what any with a body.
COMMON_ERRORS = (401, 429, 431, 500, 503)
BODY_ERRORS = (400, 408, 413)
# What a turn of a conversation may meet besides.
TURN_ERRORS = (404, 409, 410, 412, 422)

IF_MATCH: Schema = {
    "name": "If-Match",
    "in": "header",
    "description": "The version at which the conversation must be.",
    "schema": {"type": "string", "pattern": r'^("\d{1,9}"|\d{1,9})$'},
}

IDEMPOTENCY_KEY: Schema = {
    "name": HEADER,
    "in": "header",
    "description": "Names the request, so that it is carried out once however often it is sent.",
    "schema": {"type": "string", "minLength": 1, "maxLength": MAX_KEY_CHARS},
}

HEADERS: Schema = {
    "x-request-id": {
        "description": "The client's, if it is fit to be one, else a new one.",
        "required": True,
        "schema": {"type": "string"},
    },
    "openai-processing-ms": {
        "description": "From the request's head to the head of its reply.",
        "required": True,
        "schema": {"type": "integer"},
    },
}
HEADER_REFERENCES: Schema = {name: {"$ref": f"#/components/headers/{name}"} for name in HEADERS}


class Router(APIRouter):
    """The routes of one family, and the types of their bodies."""

    def __init__(self) -> None:
        super().__init__()
        self.bodies: set[type[BaseModel]] = set()
        self.replies: set[type[msgspec.Struct]] = {ErrorBody}

    def operation(
        self,
        method: str,
        path: str,
        *,
        body: type[BaseModel] | None = None,
        file: str | None = None,
        reply: type[msgspec.Struct] | None = None,
        chunk: type[msgspec.Struct] | None = None,
        media_type: str | None = None,
        errors: Sequence[int] = (),
        other_replies: Mapping[int, type[msgspec.Struct]] = MappingProxyType({}),
        headers: Sequence[Schema] = (),
        links: Mapping[str, Mapping[str, str]] = MappingProxyType({}),
    ) -> Callable[[Endpoint], Endpoint]:
        """Return the decorator that serves `method` and `path`; the function's name is the operation's id.

        `body` is what the request must be; or it is a `file` of that media type. The reply is a `reply`, a stream of
        `chunk`s, or something of `media_type`. `errors` are the statuses it may have besides those any request may
        meet, `other_replies` what it says with others. `headers` are those of requests that it heeds. `links` say which
        operations go on from its reply, and where in it their parameters are.
        """
        self.bodies |= set() if body is None else {body}
        self.replies |= {struct for struct in (reply, chunk, *other_replies.values()) if struct is not None}
        content = _reply_content(reply, chunk, media_type)
        success = _response("Success.", content)
        if links:
            success["links"] = {name: {"operationId": name, "parameters": dict(where)} for name, where in links.items()}
        is_open = path in OPEN_PATHS
        statuses = () if is_open else (*COMMON_ERRORS, *(() if body is None and file is None else BODY_ERRORS), *errors)
        responses: dict[int | str, Schema] = {
            200: success,
            **{status: _response(_codes(status), _json(ErrorBody)) for status in sorted(statuses)},
            **{status: _response("Otherwise.", _json(other)) for status, other in other_replies.items()},
            "default": _response("Any other error.", _json(ErrorBody)),
        }
        extra: Schema = {"security": []} if is_open else {}
        if headers:
            extra["parameters"] = list(headers)
        if body is not None:
            extra["requestBody"] = {"required": True, "content": _json(body)}
        elif file is not None:
            extra["requestBody"] = {"required": True, "content": {file: {}}}
        return self.api_route(path, methods=[method], response_class=Response, responses=responses, openapi_extra=extra)


def describe(app: FastAPI, routers: Iterable[Router], version: str) -> Schema:
    """Return the OpenAPI document of `app`, whose operations are those of `routers`."""
    routers = list(routers)
    document = get_openapi(
        title=app.title,
        version=version,
        summary="OpenAI's API, for recurrent models, with conversations that last.",
        routes=app.routes,
    )
    bodies = _body_schemas({body for router in routers for body in router.bodies})
    replies = _reply_schemas({reply for router in routers for reply in router.replies})
    if twice := bodies.keys() & replies.keys():
        raise ValueError(f"both a request and a reply are called {', '.join(sorted(twice))}")
    document["components"] = {
        "schemas": dict(sorted((bodies | replies).items())),
        "headers": HEADERS,
        "securitySchemes": {"api_key": {"type": "http", "scheme": "bearer"}},
    }
    document["security"] = [{"api_key": []}, {}]  # a server without a key asks for none
    return document


def _reference(body: type) -> Schema:
    return {"$ref": REFERENCE.format(name=body.__name__)}


def _json(body: type) -> Schema:
    return {JSON: {"schema": _reference(body)}}


def _reply_content(
    reply: type[msgspec.Struct] | None, chunk: type[msgspec.Struct] | None, media_type: str | None
) -> Schema:
    content = {} if reply is None else _json(reply)
    if chunk is not None:
        content[EVENTS] = {"schema": _event(chunk)}
    if media_type is not None:
        content[media_type] = {"schema": {"type": "object" if media_type == JSON else "string"}}
    return content


def _event(chunk: type[msgspec.Struct]) -> Schema:
    """Return the schema of each event of a stream: OpenAPI 3.1 has no words for the whole of it."""
    told = {"anyOf": [_reference(chunk), _reference(ErrorBody)]}
    return {
        "type": "object",
        "description": "An event: a chunk, at the end `[DONE]`; or an error as the last.",
        "properties": {
            "data": {
                "anyOf": [
                    {"type": "string", "const": "[DONE]"},
                    {"type": "string", "contentMediaType": JSON, "contentSchema": told},
                ]
            }
        },
        "required": ["data"],
    }


def _response(description: str, content: Schema) -> Schema:
    return {"description": description, "headers": HEADER_REFERENCES, "content": content}


def _codes(status: int) -> str:
    return ", ".join(sorted({rule.code for rule in ANSWERS.values() if rule.status == status}))


def _body_schemas(bodies: Iterable[type[BaseModel]]) -> dict[str, Schema]:
    wanted = [(body, "validation") for body in sorted(bodies, key=lambda body: body.__name__)]
    _, schemas = models_json_schema(wanted, ref_template=REFERENCE.replace("name", "model"))  # type: ignore[arg-type]
    return dict(schemas.get("$defs", {}))


def _reply_schemas(replies: Iterable[type[msgspec.Struct]]) -> dict[str, Schema]:
    wanted = sorted(replies, key=lambda reply: reply.__name__)
    _, schemas = msgspec.json.schema_components(wanted, ref_template=REFERENCE)
    for struct in _structs(msgspec.inspect.multi_type_info(wanted)):
        # msgspec describes what it would read; this is what it writes, and that has every field but the unset ones.
        schema = schemas[struct.cls.__name__]
        schema["required"] = [field.encode_name for field in struct.fields if _is_always_there(struct, field)]
        for written in schema["properties"].values():
            written.pop("default", None)
    return schemas


def _structs(types: Iterable[msgspec.inspect.Type]) -> Iterator[msgspec.inspect.StructType]:
    for kind in types:
        if isinstance(kind, msgspec.inspect.StructType):
            yield kind
            yield from _structs(field.type for field in kind.fields)
        elif isinstance(kind, msgspec.inspect.UnionType):
            yield from _structs(kind.types)
        elif isinstance(kind, msgspec.inspect.ListType):
            yield from _structs([kind.item_type])


def _is_always_there(struct: msgspec.inspect.StructType, field: msgspec.inspect.Field) -> bool:
    if field.required:
        return True
    is_unset = field.default is field.default_factory  # neither is given: what is left unset is not written
    return not is_unset and not struct.cls.__struct_config__.omit_defaults

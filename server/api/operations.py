"""Routes that describe themselves, and the OpenAPI document they make together.

Bodies are read and written without FastAPI (strictly, and fast), so it cannot know their schemas; each route names them
instead, by the very types that `json_body` validates and `json_response` encodes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import msgspec
from fastapi import APIRouter, FastAPI, Response
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from server.errors import ANSWERS, ErrorBody
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
TURN_ERRORS = (404, 409, 410, 412)

IF_MATCH: Schema = {
    "name": "If-Match",
    "in": "header",
    "description": "The version at which the conversation must be.",
    "schema": {"type": "string", "pattern": r'^("\d{1,9}"|\d{1,9})$'},
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
        reply: type[msgspec.Struct] | None = None,
        chunk: type[msgspec.Struct] | None = None,
        text: str | None = None,
        errors: Iterable[int] = (),
        parameters: Iterable[Schema] = (),
        links: Mapping[str, Schema] | None = None,
    ) -> Callable[[Endpoint], Endpoint]:
        """Return the decorator that serves `method` and `path`.

        `body` is what the request must be. The reply is a `reply`, or a stream of `chunk`s, or has the media type
        `text`. `errors` are the statuses it may have besides those any request may meet. `links` say which operations
        go on from the reply, by their parameters. The function's name is the operation's id.
        """
        self.bodies |= {body} if body is not None else set()
        self.replies |= {struct for struct in (reply, chunk) if struct is not None}
        content: Schema = {}
        if reply is not None:
            content[JSON] = {"schema": _reference(reply)}
        if chunk is not None:
            content[EVENTS] = {
                "schema": {
                    "type": "string",
                    "description": "Events, each with one of these as its data, and `[DONE]`; or an error as the last.",
                    "contentMediaType": EVENTS,
                    "contentSchema": _reference(chunk),
                }
            }
        if text is not None:
            content[text] = {"schema": {"type": "string"}}
        success: Schema = {"description": "Success.", "headers": HEADER_REFERENCES, "content": content}
        if links:
            success["links"] = {
                name: {"operationId": name, "parameters": parameters} for name, parameters in links.items()
            }
        statuses = (*COMMON_ERRORS, *(BODY_ERRORS if body is not None else ()), *errors)
        extra: Schema = {"parameters": list(parameters)} if parameters else {}
        if body is not None:
            extra["requestBody"] = {"required": True, "content": {JSON: {"schema": _reference(body)}}}
        if path in OPEN_PATHS:
            extra["security"] = []
        responses: dict[int | str, Schema] = {200: success}
        if path not in OPEN_PATHS:
            responses |= {status: _error(_codes(status)) for status in sorted(statuses)}
        responses["default"] = _error("Any other error.")
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


def _codes(status: int) -> str:
    return ", ".join(sorted({rule.code for rule in ANSWERS.values() if rule.status == status}))


def _error(description: str) -> Schema:
    return {
        "description": description,
        "headers": HEADER_REFERENCES,
        "content": {JSON: {"schema": _reference(ErrorBody)}},
    }


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

"""`/openapi.json`: valid, complete, and true: nothing drawn from it breaks the server, whose replies are as it says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from fastapi.routing import APIRoute
from hypothesis import HealthCheck, Phase, given, settings
from openapi_spec_validator import OpenAPIV31SpecValidator
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from server.app import ROUTERS
from server.conversations.portable import MEDIA_TYPE
from tests.server.conftest import OPTIONS
from tests.server_process import ServerProcess

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
schemathesis.serializer.alias(MEDIA_TYPE, "text/plain")  # nothing it can draw is such a file
OPERATIONS = sorted(
    (method, route.path_format)
    for router in ROUTERS
    for route in router.routes
    if isinstance(route, APIRoute)
    for method in route.methods or ()
)
WITH_BODY = [(method, path) for method, path in OPERATIONS if method == "POST" and not path.endswith("/cancel")]
BOUNDED = settings(
    max_examples=8,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
    deadline=None,
    database=None,
)


@pytest.fixture(scope="module")
def described(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server that generates little, whatever it is asked for."""
    directory = tmp_path_factory.mktemp("described")
    with ServerProcess(tiny_model, directory / "data", *OPTIONS, "--max-output-tokens", "8") as process:
        yield process


@pytest.fixture(scope="module")
def document(described: ServerProcess) -> dict[str, Any]:
    """What the server says about itself."""
    document: dict[str, Any] = described.http.get("/openapi.json").json()
    return document


@pytest.fixture(scope="module")
def schema(described: ServerProcess) -> schemathesis.schemas.BaseSchema:
    """The same, as what requests are drawn from."""
    return schemathesis.openapi.from_url(f"{described.url}/openapi.json")


def test_the_document_is_valid(document: dict[str, Any]) -> None:
    """By the specification it names."""
    assert document["openapi"].startswith("3.1")
    OpenAPIV31SpecValidator(document).validate()


def test_every_route_is_in_it_under_a_name_of_its_own(document: dict[str, Any]) -> None:
    """Generated clients call operations by their ids."""
    described = [(method.upper(), path) for path, item in document["paths"].items() for method in item]
    assert sorted(described) == OPERATIONS
    names = [operation["operationId"] for item in document["paths"].values() for operation in item.values()]
    assert len(set(names)) == len(names)
    assert {"create_completion", "create_chat_completion", "create_conversation", "retrieve_conversation"} <= {*names}
    assert not [name for name in document["components"]["schemas"] if "__" in name]  # two of one name


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_every_operation_says_what_it_takes_and_gives(document: dict[str, Any], method: str, path: str) -> None:
    """A body where there is one, a reply, and the form of errors; FastAPI's own form of them appears nowhere."""
    operation = document["paths"][path][method.lower()]
    assert ("requestBody" in operation) == ((method, path) in WITH_BODY)
    assert operation["responses"]["200"]["content"]
    assert ("422" in operation["responses"]) == any(
        parameter["name"] == "Idempotency-Key" for parameter in operation.get("parameters", ())
    )
    assert operation["responses"]["default"]["content"]["application/json"]["schema"]["$ref"].endswith("/ErrorBody")
    if path.startswith("/v1/"):
        assert {"401", "429", "503"} <= operation["responses"].keys()


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_what_the_document_allows_breaks_nothing(
    schema: schemathesis.schemas.BaseSchema, method: str, path: str
) -> None:
    """Requests drawn from the document: never a 5xx, and every reply has the form it should have."""
    operation = schema[path][method]

    @given(case=operation.as_strategy())
    @BOUNDED
    def check(case: schemathesis.Case) -> None:
        case.call_and_validate(checks=CHECKS)

    check()


@pytest.mark.parametrize(("method", "path"), WITH_BODY)
def test_what_it_forbids_breaks_nothing_either(schema: schemathesis.schemas.BaseSchema, method: str, path: str) -> None:
    """Requests that the document does not allow."""
    operation = schema[path][method]

    @given(case=operation.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE))
    @BOUNDED
    def check(case: schemathesis.Case) -> None:
        case.call_and_validate(checks=CHECKS)

    check()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "a", "return_token_ids": True}),
        ("/v1/completions", {"prompt": "a", "stream_options": {"include_usage": True}}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "return_token_ids": True}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "logprobs": True, "top_logprobs": 2}),
        ("/v1/responses", {"input": "a"}),
        ("/v1/responses", {"input": "a", "top_logprobs": 2}),
    ],
)
def test_every_event_is_as_described(schema: schemathesis.schemas.BaseSchema, path: str, body: dict[str, Any]) -> None:
    """Each event of a stream has the form that the document gives it."""
    case = schema[path]["POST"].Case(body={**body, "stream": True}, media_type="application/json")
    response = case.call_and_validate(checks=CHECKS)
    assert response.headers["content-type"][0].startswith("text/event-stream")
    assert response.text.count("data: ") > 3


def test_conversations_that_are_made_can_be_looked_at_and_deleted(schema: schemathesis.schemas.BaseSchema) -> None:
    """Walks along the document's links, in any order: responses, items and forks too."""

    class Walk(schema.as_state_machine()):  # type: ignore[misc]
        def validate_response(self, response: Any, case: schemathesis.Case, **_: Any) -> None:
            case.validate_response(response, checks=CHECKS)

    Walk.run(settings=settings(BOUNDED, max_examples=6, stateful_step_count=6))

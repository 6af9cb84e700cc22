"""The API key: needed everywhere but on a short list, compared in constant time, never told."""

from __future__ import annotations

import contextlib
import http.client
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from fastapi.routing import APIRoute

from server.app import ROUTERS
from server.security import OPEN_PATHS
from tests.server.conftest import OPTIONS
from tests.server.replies import error_of
from tests.server_process import ServerProcess

KEY = "s3cret-key"
ROUTES = [
    (method, re.sub(r"{\w+(:path)?}", "test", route.path))
    for router in ROUTERS
    for route in router.routes
    if isinstance(route, APIRoute)
    for method in sorted(route.methods or ())
]


@pytest.fixture(scope="module")
def guarded(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server with a key, which it reads from a file."""
    directory = tmp_path_factory.mktemp("guarded")
    key = directory / "key"
    key.write_text(KEY + "\n")
    with ServerProcess(tiny_model, directory / "data", *OPTIONS, "--api-key-file", str(key), "--no-openapi") as process:
        yield process


@pytest.fixture(scope="module")
def client(guarded: ServerProcess) -> Iterator[httpx.Client]:
    """A client without the key."""
    with httpx.Client(base_url=guarded.url, timeout=30) as client:
        yield client


def test_every_family_of_routes_is_walked() -> None:
    """The walk below covers what is served."""
    assert ("POST", "/v1/chat/completions") in ROUTES
    assert len(ROUTES) >= 25


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": ""},
        {"authorization": "Bearer"},
        {"authorization": "Bearer wrong"},
        {"authorization": f"Bearer {KEY}x"},
        {"authorization": f"Basic {KEY}"},
        {"authorization": KEY},
        {"x-api-key": KEY},
    ],
    ids=str,
)
def test_without_the_key_only_the_open_routes_answer(
    client: httpx.Client, method: str, path: str, headers: dict[str, str]
) -> None:
    """401 everywhere but on the allow-list, before anything of the request is read."""
    response = client.request(method, path, headers=headers)
    if path in OPEN_PATHS:
        assert response.status_code == 200
    else:
        assert response.status_code == 401
        assert error_of(response)["code"] == "invalid_api_key"


@pytest.mark.parametrize("path", ["/nowhere", "//health", "/health/", "/HEALTH", "/metrics/x", "/v1/../health/x"])
def test_what_is_not_an_open_route_needs_the_key(guarded: ServerProcess, path: str) -> None:
    """No spelling of an address gets around the check; nothing tells which addresses exist."""
    connection = http.client.HTTPConnection("127.0.0.1", guarded.port, timeout=30)  # sends the path as it is
    with contextlib.closing(connection):
        connection.request("GET", path)
        assert connection.getresponse().status == 401


def test_the_key_opens_everything(guarded: ServerProcess) -> None:
    """The stock client, given the key, works; given another one, it raises what it raises for OpenAI."""
    client = openai.OpenAI(base_url=f"{guarded.url}/v1", api_key=KEY, max_retries=0)
    assert [model.id for model in client.models.list()] == ["test"]
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()


def test_a_server_may_keep_its_description_to_itself(guarded: ServerProcess) -> None:
    """Switched off, there is nothing at the document's address."""
    headers = {"authorization": f"Bearer {KEY}"}
    assert httpx.get(f"{guarded.url}/openapi.json", headers=headers, timeout=30).status_code == 404


def test_two_keys_in_one_request_are_refused(guarded: ServerProcess) -> None:
    """Which of them counts would be anybody's guess."""
    headers = [("authorization", f"Bearer {KEY}"), ("authorization", "Bearer other")]
    assert httpx.get(f"{guarded.url}/v1/models", headers=headers, timeout=30).status_code == 401


def test_the_scheme_is_spelt_as_anybody_likes(guarded: ServerProcess) -> None:
    """HTTP's authentication schemes are case-insensitive."""
    headers = {"authorization": f"bearer {KEY}"}
    assert httpx.get(f"{guarded.url}/v1/models", headers=headers, timeout=30).status_code == 200


def test_the_key_is_in_no_log(guarded: ServerProcess) -> None:
    """What the server wrote, all told, does not contain it."""
    httpx.get(f"{guarded.url}/v1/models", headers={"authorization": f"Bearer {KEY}"}, timeout=30)
    assert KEY not in guarded.log_path.read_text()


@pytest.mark.parametrize("header", ["Bearer ", "Bearer", "Bearer anything", "Basic x"])
def test_an_open_server_ignores_keys(server: ServerProcess, header: str) -> None:
    """Evaluation harnesses send an empty bearer token to servers without a key."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    with contextlib.closing(connection):
        connection.request("GET", "/v1/models", headers={"authorization": header})
        assert connection.getresponse().status == 200

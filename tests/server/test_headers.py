"""What every reply carries, and what a server says about itself."""

from __future__ import annotations

import re

import httpx
import pytest

from server.version import server_version


@pytest.mark.parametrize("request_id", ["abc", "A-b_9", "x" * 64])
def test_a_fit_request_id_is_kept(http: httpx.Client, request_id: str) -> None:
    """Clients may correlate by their own ids."""
    assert http.get("/health", headers={"x-request-id": request_id}).headers["x-request-id"] == request_id


@pytest.mark.parametrize("request_id", ["", "x" * 65, "a b", 'a"b', "a;b", "é"])
def test_an_unfit_request_id_is_replaced(http: httpx.Client, request_id: str) -> None:
    """Nothing that a log or a header could be confused by is passed on."""
    headers = {"x-request-id": request_id.encode("latin-1")}
    assert re.fullmatch("[0-9a-f]{32}", http.get("/health", headers=headers).headers["x-request-id"])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/health"), ("GET", "/nowhere"), ("POST", "/v1/completions"), ("GET", "/v1/models")]
)
def test_every_reply_says_who_it_is_and_how_long_it_took(http: httpx.Client, method: str, path: str) -> None:
    """Refusals too."""
    headers = http.request(method, path).headers
    assert headers["x-request-id"]
    assert int(headers["openai-processing-ms"]) >= 0
    assert headers["openai-version"] == "2020-10-01"
    assert not any(name.startswith("x-ratelimit") for name in headers)  # none is set
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cache-control"] == "no-store"
    assert "server" not in headers


def test_a_head_beyond_all_need_is_refused(http: httpx.Client) -> None:
    """431 for headers or an address of more than 32 KiB together."""
    assert http.get("/v1/models", headers={"x-long": "x" * 30_000}).status_code == 200
    assert http.get("/v1/models", headers={"x-long": "x" * 33_000}).status_code == 431
    assert http.get("/v1/models?" + "x" * 33_000).status_code == 431


def test_the_release_is_told(http: httpx.Client) -> None:
    """As the package's metadata say, in vLLM's form."""
    assert http.get("/version").json() == {"version": server_version()}


def test_the_load_is_what_is_being_generated(http: httpx.Client) -> None:
    """A stream counts while it lasts; probes do not."""
    body = {"prompt": "abc", "max_tokens": 6000, "ignore_eos": True, "stream": True}
    with http.stream("POST", "/v1/completions", json=body) as running:
        lines = running.iter_lines()  # kept: the stream is closed with it
        next(lines)
        assert http.get("/load").json()["server_load"] >= 1

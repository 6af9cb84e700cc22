"""Several API keys on one real server: each with its own limits, counted apart."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from tests.server.conftest import OPTIONS
from tests.server.replies import error_of, stream_events
from tests.server_process import ServerProcess

SHORT = {"prompt": "hello", "max_tokens": 3}
# A minute passes for no test: limits are so small that what flows back while it runs does not matter.
KEYS = f"""
[ada]
sha256 = ["{hashlib.sha256(b"ada-old").hexdigest()}", "{hashlib.sha256(b"ada-new").hexdigest()}"]
[asker]
key = "asker"
requests_per_minute = 2
[talker]
key = "talker"
tokens_per_minute = 8
[runner]
key = "runner"
max_running = 1
"""


@pytest.fixture(scope="module")
def shared(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server that several tenants share, and somebody with the single key."""
    directory = tmp_path_factory.mktemp("tenants")
    (directory / "keys.toml").write_text(KEYS)
    keys = ("--api-keys-file", str(directory / "keys.toml"), "--api-key", "single", "--requests-per-minute", "1000")
    with ServerProcess(tiny_model, directory / "data", *OPTIONS, *keys) as process:
        yield process


def client_with(server: ServerProcess, key: str) -> httpx.Client:
    """Return a client that sends `key`."""
    return httpx.Client(base_url=server.url, timeout=60, headers={"authorization": f"Bearer {key}"})


@pytest.mark.parametrize("key", ["ada-old", "ada-new", "single"])
def test_every_key_opens_the_server_under_the_default_limits(shared: ServerProcess, key: str) -> None:
    """Also the single one beside the file; the headers say what is left."""
    with client_with(shared, key) as http:
        reply = http.get("/v1/models")
        assert reply.status_code == 200
        assert reply.headers["x-ratelimit-limit-requests"] == "1000"
        assert int(reply.headers["x-ratelimit-remaining-requests"]) < 1000
        assert "x-ratelimit-limit-tokens" not in reply.headers


@pytest.mark.parametrize("key", ["ada", "wrong", hashlib.sha256(b"ada-old").hexdigest()])
def test_a_name_or_a_digest_is_no_key(shared: ServerProcess, key: str) -> None:
    """What the file says about a key does not replace it."""
    with client_with(shared, key) as http:
        assert http.get("/v1/models").status_code == 401


def test_requests_beyond_the_minutes_are_refused_for_that_tenant_only(shared: ServerProcess) -> None:
    """429 with everything a client needs to come back at the right time."""
    with client_with(shared, "asker") as http:
        assert [http.get("/v1/models").status_code for _ in range(2)] == [200, 200]
        refused = http.get("/v1/models")
        assert refused.status_code == 429
        assert error_of(refused)["code"] == "rate_limit_exceeded"
        assert 0 < int(refused.headers["retry-after-ms"]) <= 30_000
        assert int(refused.headers["retry-after"]) <= 30
        assert refused.headers["x-should-retry"] == "true"
        assert refused.headers["x-ratelimit-limit-requests"] == "2"
        assert refused.headers["x-ratelimit-remaining-requests"] == "0"
        assert refused.headers["x-ratelimit-reset-requests"].endswith("ms")
        assert http.get("/health").status_code == 200
    with client_with(shared, "single") as http:
        assert http.get("/v1/models").status_code == 200
        assert 'rwkv_admission_rejections_total{reason="rate_limit_exceeded"}' in http.get("/metrics").text


def test_tokens_are_counted_whole_and_in_streams(shared: ServerProcess) -> None:
    """Prompt and output: five and three tokens use up eight; what generates nothing still works."""
    with client_with(shared, "talker") as http:
        assert http.get("/v1/models").headers["x-ratelimit-remaining-tokens"] == "8"
        assert stream_events(http, "/v1/completions", SHORT)[-1] == "[DONE]"
        refused = http.post("/v1/completions", json=SHORT)
        assert refused.status_code == 429
        assert refused.headers["x-ratelimit-remaining-tokens"] == "0"
        assert (
            http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "a"}]}).status_code == 429
        )
        assert http.get("/v1/models").status_code == 200


def test_a_tenant_runs_no_more_than_its_share_at_once(shared: ServerProcess) -> None:
    """While one stream runs another is refused; when it has ended, or its client has left, there is room again."""
    endless = {"prompt": "hello", "max_tokens": 8000, "stream": True, "ignore_eos": True}
    with client_with(shared, "runner") as http, client_with(shared, "runner") as other:
        with http.stream("POST", "/v1/completions", json=endless) as running:
            lines = running.iter_lines()  # kept: the stream is closed with it
            next(lines)
            assert other.post("/v1/completions", json=SHORT).status_code == 429
        patient = openai.OpenAI(base_url=f"{shared.url}/v1", api_key="runner", max_retries=2)
        assert patient.completions.create(model="test", **SHORT).choices  # type: ignore[call-overload]
        refused = other.post("/v1/completions", json={**SHORT, "max_tokens": -1})
        assert refused.status_code == 400
        assert other.post("/v1/completions", json=SHORT).status_code == 200


def test_nobody_reaches_the_responses_of_another(shared: ServerProcess) -> None:
    """Not to read, continue, cancel or delete them; a response in the background runs on undisturbed."""
    body = {"input": "hello", "background": True, "max_output_tokens": 4000, "ignore_eos": True}
    with client_with(shared, "single") as mine, client_with(shared, "ada-old") as others:
        path = f"/v1/responses/{mine.post('/v1/responses', json=body).json()['id']}"
        for method, rest in (("GET", ""), ("GET", "/input_items"), ("POST", "/cancel"), ("DELETE", "")):
            refused = others.request(method, path + rest)
            assert (refused.status_code, error_of(refused)["code"]) == (404, "response_not_found")
        refused = others.post("/v1/responses", json={"input": "x", "previous_response_id": path.rpartition("/")[2]})
        assert error_of(refused)["code"] == "previous_response_not_found"
        assert mine.get(path).json()["status"] in ("queued", "in_progress")
        assert mine.post(f"{path}/cancel").json()["status"] == "cancelled"

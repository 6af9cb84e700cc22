"""Logs: lines of JSON, one a request, and nothing that anybody said."""

from __future__ import annotations

import json
import logging

import httpx

from engine.logs import JsonFormatter
from tests.server_process import ServerProcess

SECRET = "pr1vate"


def test_a_record_is_one_line_of_json() -> None:
    """Extras are fields; a traceback stays on its line."""
    try:
        raise ValueError("broken")
    except ValueError as error:
        exc_info = (ValueError, error, error.__traceback__)
    record = logging.LogRecord("server.x", logging.ERROR, "x.py", 1, "failed %s", ("twice",), exc_info)
    record.seconds = 3
    line = JsonFormatter().format(record)
    assert "\n" not in line
    fields = json.loads(line)
    assert (fields["level"], fields["event"], fields["seconds"]) == ("error", "failed twice", 3)
    assert "ValueError: broken" in fields["traceback"]


def test_nothing_that_was_said_is_logged(server: ServerProcess, http: httpx.Client) -> None:
    """Neither prompts nor ids nor unknown fields nor paths, whether the request succeeds or not."""
    http.post("/v1/completions", json={"prompt": SECRET, "max_tokens": 1, "conversation_id": SECRET})
    http.post("/v1/completions", json={"prompt": SECRET, SECRET: SECRET})
    http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": SECRET}], "max_tokens": 1})
    http.get(f"/{SECRET}?{SECRET}={SECRET}", headers={"user-agent": SECRET, "cookie": SECRET})
    log = server.log_path.read_text()
    assert SECRET not in log
    lines = [json.loads(line) for line in log.splitlines()]
    assert {line["event"] for line in lines} >= {"request", "model loaded"}


def test_a_request_is_logged_by_its_id(server: ServerProcess, http: httpx.Client) -> None:
    """One line with route, status and time."""
    http.get("/v1/models", headers={"x-request-id": "to-be-found"})
    found = [line for line in map(json.loads, server.log_path.read_text().splitlines()) if "request_id" in line]
    lines = [line for line in found if line["request_id"] == "to-be-found"]
    assert len(lines) == 1
    assert (lines[0]["method"], lines[0]["route"], lines[0]["status"]) == ("GET", "/v1/models", "200")

"""Bodies that are not what they should be: refused as the client's mistake, never answered with 500 or half-read."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx
import pytest

from tests.server.replies import error_of
from tests.server_process import ServerProcess

BODIES = {
    "nothing": b"",
    "not JSON": b"hello",
    "a list": b"[]",
    "a string": b'"prompt"',
    "null": b"null",
    "cut short": b'{"prompt": "x"',
    "trailing garbage": b'{"prompt": "x"} x',
    "two documents": b'{"prompt": "x"}{"prompt": "y"}',
    "trailing comma": b'{"prompt": "x",}',
    "comment": b'{"prompt": "x" /* really */}',
    "NaN": b'{"prompt": "x", "temperature": NaN}',
    "Infinity": b'{"prompt": "x", "temperature": Infinity}',
    "minus Infinity": b'{"prompt": "x", "temperature": -Infinity}',
    "a number beyond doubles": b'{"prompt": "x", "temperature": 1e999}',
    "5,000 digits": b'{"prompt": "x", "n": ' + b"9" * 5000 + b"}",
    "30 digits": b'{"prompt": "x", "n": ' + b"9" * 30 + b"}",
    "repeated key": b'{"prompt": "x", "prompt": "y"}',
    "repeated key, spelt differently": b'{"prompt": "x", "pr\\u006fmpt": "y"}',
    "repeated key, deep": b'{"prompt": "x", "logit_bias": {"1": 1, "1": 2}}',
    "lone high surrogate": b'{"prompt": "\\ud800"}',
    "lone low surrogate": b'{"prompt": "\\udc00"}',
    "lone surrogate in a key": b'{"prompt": "x", "\\ud800": 1}',
    "NUL, escaped": b'{"prompt": "a\\u0000b"}',
    "NUL, raw": b'{"prompt": "a\x00b"}',
    "byte order mark": b'\xef\xbb\xbf{"prompt": "x"}',
    "UTF-16": '{"prompt": "x"}'.encode("utf-16"),
    "UTF-16, little-endian": '{"prompt": "x"}'.encode("utf-16-le"),
    "UTF-32": '{"prompt": "x"}'.encode("utf-32"),
    "Latin-1": '{"prompt": "é"}'.encode("latin-1"),
    "overlong UTF-8": b'{"prompt": "\xc0\xaf"}',
    "UTF-8 surrogates": b'{"prompt": "\xed\xa0\x80"}',
    "deep list": b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep object": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "deep, below the parser's own limit": b'{"prompt": ' + b"[" * 1010 + b"]" * 1010 + b"}",
    "gzip": b"\x1f\x8b\x08\x00\x00\x00\x00\x00",
}


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/conversations", "/tokenize"])
@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES.keys())
def test_malformed_bodies_are_refused(http: httpx.Client, path: str, body: bytes) -> None:
    """400 in OpenAI's form, whatever is wrong."""
    response = http.post(path, content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    error_of(response)


def test_an_escaped_backslash_before_u0000_is_text(http: httpx.Client) -> None:
    """Only a NUL is refused, not the six characters that could be mistaken for one."""
    response = http.post("/tokenize", content=rb'{"prompt": "\\u0000"}')
    assert response.status_code == 200
    assert bytes(response.json()["tokens"]) == rb"\u0000"


def test_surrogate_pairs_are_characters(http: httpx.Client) -> None:
    """An emoji may be escaped as JSON escapes it."""
    response = http.post("/tokenize", content=rb'{"prompt": "\ud83d\ude00"}')
    assert bytes(response.json()["tokens"]) == "😀".encode()


def test_a_body_beyond_the_limit_is_refused_by_its_announced_length(http: httpx.Client) -> None:
    """413, decided by the head."""
    body = json.dumps({"prompt": "x" * (4 << 20)}).encode()
    response = http.post("/tokenize", content=body)
    assert response.status_code == 413
    assert error_of(response)["code"] == "body_too_large"


def test_a_chunked_body_is_counted_while_it_is_read(server: ServerProcess) -> None:
    """413 at the chunk that is too much, though the body never ends."""
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname, address.port), timeout=30) as connection:
        connection.sendall(b"POST /tokenize HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
        chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
        for _ in range(65):
            connection.sendall(chunk)
        assert connection.recv(4096).startswith(b"HTTP/1.1 413 ")


def test_a_body_at_the_limit_is_read(http: httpx.Client) -> None:
    """Spaces count; four mebibytes of them are accepted."""
    body = b'{"prompt": "x"}'.rjust(4 << 20)
    assert http.post("/tokenize", content=body).status_code == 200
    assert http.post("/tokenize", content=b" " + body).status_code == 413


def test_a_chunked_body_is_read(http: httpx.Client) -> None:
    """A client may send its body in pieces."""

    def pieces() -> Iterator[bytes]:
        yield b'{"prom'
        yield b'pt": "x"}'

    assert http.post("/tokenize", content=pieces()).json()["tokens"] == [ord("x")]


def test_the_server_is_well_afterwards(http: httpx.Client) -> None:
    """After every kind of nonsense at once the server still answers."""
    for body in BODIES.values():
        http.post("/v1/completions", content=body)
    assert http.get("/health").json() == {"status": "ok"}

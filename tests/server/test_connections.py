"""Connections between requests."""

from __future__ import annotations

import http.client
import time

from tests.server_process import ServerProcess

CLIENTS_KEEP_SECONDS = 5  # an idle one, by default, in httpx and so in OpenAI's library


def test_an_idle_connection_outlives_what_clients_keep(server: ServerProcess) -> None:
    """Or a request that reuses one in its last moment would be lost with it."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    connection.request("GET", "/v1/models")
    connection.getresponse().read()
    sock = connection.sock
    time.sleep(CLIENTS_KEEP_SECONDS + 1)
    connection.request("GET", "/v1/models")
    assert connection.getresponse().status == http.client.OK
    assert connection.sock is sock  # not another one
    connection.close()

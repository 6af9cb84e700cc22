"""Fixtures of the load generator's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.loadtest.stub_server import StubServer


@pytest.fixture
def stub() -> Iterator[StubServer]:
    """A small server with known delays, on a free loopback port."""
    with StubServer() as server:
        yield server

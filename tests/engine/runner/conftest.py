"""Sampling is tested on every implementation of the operators."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.implementations import IMPLEMENTATIONS, running_on


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test on each implementation of the operators."""
    with running_on(request.param):
        yield request.param

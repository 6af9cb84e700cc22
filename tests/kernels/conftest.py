"""Every operator test runs in poisoned memory; those of `kernels` on every implementation."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.implementations import IMPLEMENTATIONS, running_on
from tests.poisoned_memory import poisoned_memory

__all__ = ["poisoned_memory"]


@pytest.fixture(autouse=True)
def _poisoned(poisoned_memory: None) -> None:
    """Ask for it, whatever the test."""


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test on each implementation of the operators."""
    with running_on(request.param):
        yield request.param

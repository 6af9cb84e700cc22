"""Every operator test runs in poisoned memory."""

from __future__ import annotations

import pytest

from tests.poisoned_memory import poisoned_memory

__all__ = ["poisoned_memory"]


@pytest.fixture(autouse=True)
def _poisoned(poisoned_memory: None) -> None:
    """Ask for it, whatever the test."""

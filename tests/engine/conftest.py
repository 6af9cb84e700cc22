"""Engines are tested on devices that must be waited for, and on such that take the next step meanwhile."""

from __future__ import annotations

import pytest

from tests.engine.stub_runner import StubRunner


@pytest.fixture(params=[False, True], ids=["steps one by one", "steps ahead"])
def runs_ahead(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the test on both."""
    monkeypatch.setattr(StubRunner, "runs_ahead", request.param)

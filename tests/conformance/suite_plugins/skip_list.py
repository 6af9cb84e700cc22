"""A plugin for the pytest that runs somebody else's tests: skips those that a list names, each with its reason.

It runs in that pytest's environment and imports nothing of ours. An entry that names no test fails the run, so the
list cannot outlive what it is about.
"""

from __future__ import annotations

import fnmatch
import tomllib
from pathlib import Path

import pytest

SKIP_LIST = Path(__file__).with_name("skip_list.toml")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what the list names."""
    for entry in tomllib.loads(SKIP_LIST.read_text())["skip"]:
        for pattern in entry["tests"]:
            named = [item for item in items if fnmatch.fnmatchcase(item.nodeid.split("api_resources/")[-1], pattern)]
            if not named and not config.option.keyword:
                raise pytest.UsageError(f"the skip list names no test with {pattern!r}")
            for item in named:
                item.add_marker(pytest.mark.skip(reason=entry["reason"]))

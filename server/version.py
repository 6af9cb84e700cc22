"""Which release this is."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def server_version() -> str:
    """Return the installed version."""
    try:
        return version("sostenuto")
    except PackageNotFoundError:  # run from a checkout that was never installed
        return "unreleased"

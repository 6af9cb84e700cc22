"""Environments for other people's programs: apart from ours, and kept outside the checkout."""

from __future__ import annotations

import hashlib
import os
import subprocess
import venv
from collections.abc import Sequence
from pathlib import Path

PIP_SECONDS = 300.0


class Unavailable(Exception):
    """Something could not be fetched: there is no network, or no registry that has it."""


class Environment:
    """A virtual environment with exactly named packages, made the first time it is asked for."""

    def __init__(self, name: str, requirements: Sequence[str]) -> None:
        """Make it, or take what an earlier run has left; raises `Unavailable`."""
        digest = hashlib.sha256("\n".join(requirements).encode()).hexdigest()[:12]
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        self.directory = cache / "sostenuto" / f"{name}-{digest}"
        self.python = self.directory / "venv" / "bin" / "python"
        if not self._is_complete():
            self.directory.mkdir(parents=True, exist_ok=True)
            venv.create(self.directory / "venv", clear=True, with_pip=True)
            self.pip("install", *requirements)
            self._marker.touch()

    @property
    def _marker(self) -> Path:
        return self.directory / ".complete"

    def _is_complete(self) -> bool:
        return self._marker.exists() and self.python.exists()

    def pip(self, *arguments: str) -> None:
        """Run pip; raises `Unavailable`."""
        command = [self.python, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=PIP_SECONDS)
        except subprocess.TimeoutExpired:
            raise Unavailable(f"pip {arguments[0]} takes longer than {PIP_SECONDS:.0f} s") from None
        if done.returncode != 0:
            raise Unavailable(done.stderr.strip()[-300:])

    def run(self, *arguments: str, cwd: Path, timeout_seconds: float, **variables: str) -> str:
        """Run its Python and return what that says; `variables` are added to the environment."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("OPENAI_", "PYTEST_"))}
        inherited.pop("PYTHONPATH", None)
        unproxied = {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        done = subprocess.run(
            [self.python, *arguments],
            cwd=cwd,
            env={**inherited, **unproxied, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_seconds,
        )
        return done.stdout

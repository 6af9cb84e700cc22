"""openai-python's own tests of its API resources: where they come from, and how they are run.

Nothing of them is kept with this project. They are part of the client's source package, which is fetched, with what
they need, into a cache outside the checkout the first time they are asked for.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import venv
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
VERSION = version("openai")  # the tests of the client that the other tests use
REQUIREMENTS = (
    "pytest==9.2.0",
    "pytest-asyncio==1.5.0",
    "pytest-xdist==3.8.0",
    "aiohttp==3.14.5",
    "dirty-equals==0.11",
    "inline-snapshot==0.36.1",
    "nest-asyncio==1.6.0",
    "respx==0.23.1",
    "rich==15.0.0",
    "trio==0.35.0",
)
RESOURCES = (
    "conversations",
    "test_conversations.py",
    "responses",
    "test_responses.py",
    "test_models.py",
    "test_completions.py",
    "chat",
)
INSTALL_SECONDS = 300.0
RUN_SECONDS = 420.0


class SuiteUnavailable(Exception):
    """The suite could not be fetched: there is no network, or no registry that has it."""


class OpenAISuite:
    """The tests of one version of the client, and an environment to run them in."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    @classmethod
    def fetched(cls) -> OpenAISuite:
        """Return the suite from the cache, or fetch it; raises `SuiteUnavailable`."""
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        suite = cls(cache / "sostenuto" / f"openai-python-{VERSION}")
        if not suite._marker.exists():
            suite._fetch()
        return suite

    @property
    def _marker(self) -> Path:
        """What is there once everything else is."""
        return self._directory / ".complete"

    @property
    def _python(self) -> Path:
        return self._directory / "venv" / "bin" / "python"

    @property
    def _source(self) -> Path:
        return self._directory / f"openai-{VERSION}"

    def _fetch(self) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        venv.create(self._directory / "venv", clear=True, with_pip=True)
        self._pip("install", "--quiet", f"openai=={VERSION}", *REQUIREMENTS)
        package = ("--no-binary", "openai", "--no-deps", f"openai=={VERSION}")
        self._pip("download", "--quiet", "--dest", str(self._directory), *package)
        with tarfile.open(self._directory / f"openai-{VERSION}.tar.gz") as archive:
            archive.extractall(self._directory, filter="data")
        self._marker.touch()

    def _pip(self, *arguments: str) -> None:
        command = [self._python, "-m", "pip", "--disable-pip-version-check", *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise SuiteUnavailable(f"pip {arguments[0]} takes too long") from error
        if done.returncode != 0:
            raise SuiteUnavailable(done.stderr.strip()[-300:])

    def run(self, base_url: str, report: Path, *arguments: str, resources: Sequence[str] = RESOURCES) -> str:
        """Run the tests of `resources` against `base_url`, write a JUnit report, and return what pytest says."""
        command = [self._python, "-m", "pytest", "-p", "skip_list", "-n", "2", "-q", "--tb=short", "--durations=5"]
        command += ["-p", "no:cacheprovider", f"--junitxml={report}", *arguments]
        command += [f"tests/api_resources/{name}" for name in resources]
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("OPENAI_", "PYTEST_"))}
        environment |= {"TEST_API_BASE_URL": base_url, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        environment |= {"PYTHONPATH": str(HERE / "suite_plugins")}
        done = subprocess.run(
            command, cwd=self._source, env=environment, capture_output=True, text=True, timeout=RUN_SECONDS
        )
        sys.stdout.write(done.stdout)
        return done.stdout + done.stderr

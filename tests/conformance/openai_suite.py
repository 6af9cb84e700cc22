"""openai-python's own tests of its API resources: where they come from, and how they are run.

Nothing of them is kept with this project. They are part of the client's source package, which is fetched, with what
they need, the first time they are asked for.
"""

from __future__ import annotations

import tarfile
from importlib.metadata import version
from pathlib import Path

from tests.conformance.environment import Environment

PLUGINS = Path(__file__).parent / "suite_plugins"
VERSION = version("openai")  # the tests of the client that the other tests use
REQUIREMENTS = (
    f"openai=={VERSION}",
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
RUN_SECONDS = 600.0


class OpenAISuite:
    """The tests of one version of the client, and an environment to run them in."""

    def __init__(self) -> None:
        """Fetch them, or take what an earlier run has left; raises `Unavailable`."""
        self._environment = Environment("openai-suite", REQUIREMENTS)
        self._source = self._environment.directory / f"openai-{VERSION}"
        if not (self._source / "tests").exists():
            self._fetch(self._environment.directory)

    def _fetch(self, directory: Path) -> None:
        package = f"openai=={VERSION}"
        self._environment.pip("download", "--no-binary", "openai", "--no-deps", "--dest", str(directory), package)
        with tarfile.open(directory / f"openai-{VERSION}.tar.gz") as archive:
            archive.extractall(directory, filter="data")

    def run(self, base_url: str, report: Path) -> str:
        """Run the tests against `base_url`, write a JUnit report, and return what pytest says."""
        options = ("-n", "2", "-q", "--tb=short", "-p", "skip_list", "-p", "no:cacheprovider")
        paths = [f"tests/api_resources/{name}" for name in RESOURCES]
        return self._environment.run(
            *("-m", "pytest", *options, f"--junitxml={report}", *paths),
            cwd=self._source,
            timeout_seconds=RUN_SECONDS,
            TEST_API_BASE_URL=base_url,
            PYTHONPATH=str(PLUGINS),
        )

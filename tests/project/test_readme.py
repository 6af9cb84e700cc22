"""What the README tells a newcomer to type does what it says."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.settings import DEFAULT_MODEL
from tests.conftest import ROOT
from tests.server_process import ServerProcess

README = (ROOT / "README.md").read_text()
CURLS = re.findall(r"^curl .*?'$", README, flags=re.MULTILINE | re.DOTALL)
PROGRAMS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)

needs_default_model = pytest.mark.skipif(
    not (DEFAULT_MODEL / "model.safetensors").is_file(), reason="the default model is not here"
)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerProcess]:
    """The bundled model under the name it has without any option."""
    name = ("--served-model-name", "sostenuto-default")
    with ServerProcess(DEFAULT_MODEL, tmp_path / "data", *name) as process:
        yield process


def run(command: list[str], server: ServerProcess) -> str:
    """Run a command of the README against the test's own server; returns what it prints."""
    command = [part.replace("127.0.0.1:8000", f"127.0.0.1:{server.port}") for part in command]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=100).stdout


@needs_default_model
def test_the_curl_conversation(server: ServerProcess) -> None:
    """Two requests by hand: the second answer knows what the first was told."""
    assert len(CURLS) == 2
    first, second = (json.loads(run(["bash", "-c", curl.replace("curl", "curl -s", 1)], server)) for curl in CURLS)
    assert (first["conversation"]["version"], second["conversation"]["version"]) == (1, 2)
    assert "Ada" in second["choices"][0]["message"]["content"]


@needs_default_model
@pytest.mark.parametrize("program", PROGRAMS, ids=["chat", "responses"])
def test_the_openai_programs(server: ServerProcess, program: str) -> None:
    """The programs with the unmodified client print answers that know the name."""
    assert "Ada" in run([sys.executable, "-c", program], server)


def test_make_targets_exist() -> None:
    """Every make target that any document names is one."""
    makefile = (ROOT / "Makefile").read_text()
    documents = [README, *(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))]
    for target in {name for text in documents for name in re.findall(r"`?make ([a-z-]+)\b(?= |`|\n)", text)}:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), f"there is no make {target}"

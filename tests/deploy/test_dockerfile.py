"""The images' recipe, read as data: what goes in, who runs it, how it is started and watched."""

from __future__ import annotations

import importlib
import re
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import ROOT
from tests.deploy.recipes import DOCKERFILE, environment, exec_form, image, read_stages

TARGETS = ("cpu", "cuda")
LOCK = ROOT / "requirements.lock"


def pinned() -> dict[str, str]:
    """Return the lock's versions by canonical name."""
    lines = [line for line in LOCK.read_text().splitlines() if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}


def project() -> dict[str, object]:
    """Return pyproject.toml's project table."""
    table: dict[str, object] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return table


def admitted(path: str) -> bool:
    """Say whether .dockerignore lets `path` into the build context."""
    inside = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.strip().removeprefix("!")
        if not pattern or pattern.startswith("#"):
            continue
        parts = [path, *(str(parent) for parent in Path(path).parents)]
        if any(fnmatch(part, pattern) or fnmatch("/" + part, "*" + pattern.removeprefix("**")) for part in parts):
            inside = line.startswith("!")
    return inside


def test_both_images_share_all_but_their_dependencies() -> None:
    """Cpu and cuda are the same application stage with another environment of packages."""
    stages = read_stages()
    assert {target: stages[target].base for target in TARGETS} == dict.fromkeys(TARGETS, "application")
    for target in TARGETS:
        assert f"--from=dependencies-{target} /opt/venv /opt/venv" in stages[target].values("COPY")
    assert list(stages)[-1] == "cpu"


@pytest.mark.parametrize("target", TARGETS)
def test_nobody_runs_as_root(target: str) -> None:
    """The last user of each image is 10001, who owns the data directory and nothing else."""
    recipe = image(target)
    assert recipe.instructions[-1] == ("USER", "10001:10001")
    (setup,) = (run for run in recipe.values("RUN") if "useradd" in run)
    assert "--uid 10001" in setup
    assert "--owner 10001 --group 10001 --mode 0700 /data" in setup
    assert recipe.values("VOLUME") == ["/data"]


@pytest.mark.parametrize("target", TARGETS)
def test_the_entry_point_is_the_projects_command(target: str) -> None:
    """The image runs the console script that pyproject.toml declares, without a shell between it and its signals."""
    (entry,) = exec_form(image(target).values("ENTRYPOINT")[0])
    module, _, function = project()["scripts"][entry].partition(":")  # type: ignore[index]
    assert callable(getattr(importlib.import_module(module), function))
    assert exec_form(image(target).values("CMD")[0]) == ["serve"]


@pytest.mark.parametrize("target", TARGETS)
def test_health_is_asked_of_the_server_itself(target: str) -> None:
    """The health check is Python, which is there, asking /health on the port that the image sets."""
    (check,) = image(target).values("HEALTHCHECK")
    program, flag, code = exec_form(check.partition("CMD ")[2])
    assert (program, flag) == ("python", "-c")
    compile(code, "healthcheck", "exec")
    assert "/health" in code
    assert environment(target)["SOSTENUTO_PORT"] == image(target).values("EXPOSE")[0]


def test_base_images_are_pinned() -> None:
    """Every base is an exact version of Python, 3.11 or newer as the project asks."""
    (argument,) = re.findall(r"^ARG PYTHON_IMAGE=(\S+)$", DOCKERFILE.read_text(), re.MULTILINE)
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", argument)
    stages = read_stages()
    assert {stage.base for stage in stages.values()} - set(stages) == {"${PYTHON_IMAGE}"}


def test_the_context_holds_the_application_and_nothing_else() -> None:
    """All packages and what they are installed from get in; tests, secrets, weights and histories stay out."""
    packages = ["kernels", "engine", "server", "training", "loadtest", "chat"]
    for path in ("pyproject.toml", "requirements.lock", "README.md", *(f"{name}/__init__.py" for name in packages)):
        assert (ROOT / path).exists()
        assert admitted(path), path
    assert admitted("models/default/model.safetensors")
    for path in (".env", ".git/config", "tests/conftest.py", "models/huge.pth", "data/ledger.sqlite", "server/x.pyc"):
        assert not admitted(path), path


def test_what_is_copied_exists() -> None:
    """Every file that a COPY names is in the repository."""
    for stage in read_stages().values():
        for value in stage.values("COPY"):
            if not value.startswith("--from"):
                for source in value.split()[:-1]:
                    assert (ROOT / source).exists(), source


def test_there_are_no_secrets() -> None:
    """No key, token or password is in the recipe, not even as a build argument."""
    text = DOCKERFILE.read_text()
    assert re.findall(r"^ARG (\w+)", text, re.MULTILINE) == ["PYTHON_IMAGE"]
    for target in TARGETS:
        assert not [name for name in environment(target) if re.search("KEY|TOKEN|PASSWORD|SECRET", name)]


def needed(requirement: Requirement) -> Iterator[str]:
    """Yield `requirement`'s name and those of everything it needs here, extras included."""
    seen: set[tuple[str, str]] = set()
    waiting = [requirement]
    while waiting:
        wanted = waiting.pop()
        for extra in ("", *wanted.extras):
            if (wanted.name, extra) in seen:
                continue
            seen.add((wanted.name, extra))
            yield canonicalize_name(wanted.name)
            parts = map(Requirement, distribution(wanted.name).requires or [])
            waiting += [part for part in parts if part.marker is None or part.marker.evaluate({"extra": extra})]


def test_everything_the_image_installs_is_pinned() -> None:
    """Each dependency of the application, direct or not, has an exact version in the lock."""
    dependencies = [Requirement(text) for text in project()["dependencies"]]  # type: ignore[attr-defined]
    names = {name for dependency in dependencies for name in needed(dependency)}
    assert len(names) > len(dependencies)
    assert names - set(pinned()) == set()
    assert "setuptools" in pinned()


def test_the_lock_satisfies_the_project() -> None:
    """The lock's version of each dependency is one that pyproject.toml accepts."""
    for text in project()["dependencies"]:  # type: ignore[attr-defined]
        requirement = Requirement(text)
        assert requirement.specifier.contains(pinned()[canonicalize_name(requirement.name)]), text


def test_the_cpu_image_takes_torch_without_cuda() -> None:
    """The CPU build of the locked torch comes from PyTorch's index, before anything could pull in PyPI's."""
    (install,) = read_stages()["dependencies-cpu"].values("RUN")
    first, rest = install.split(" && ")
    assert "--index-url https://download.pytorch.org/whl/cpu" in first
    assert "+cpu" in first
    assert "--constraint requirements.lock" in rest
    assert "torch" in pinned()

"""The Dockerfile and the compose files as data, for tests on machines without a Docker engine."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass, field
from typing import Any

import yaml

from tests.conftest import ROOT

DOCKERFILE = ROOT / "deploy" / "Dockerfile"
COMPOSE = ROOT / "docker-compose.yml"


@dataclass
class Stage:
    """One build stage: its base, and its instructions in order."""

    name: str
    base: str
    instructions: list[tuple[str, str]] = field(default_factory=list)

    def values(self, instruction: str) -> list[str]:
        """Return the arguments of every `instruction`."""
        return [value for name, value in self.instructions if name == instruction]


def read_stages() -> dict[str, Stage]:
    """Return the Dockerfile's stages by name, in order."""
    stages: dict[str, Stage] = {}
    for name, value in _instructions():
        if name == "FROM":
            base, _, stage = value.partition(" AS ")
            stages[stage] = Stage(stage, base)
        elif stages:
            next(reversed(stages.values())).instructions.append((name, value))
    return stages


def image(target: str) -> Stage:
    """Return stage `target` with everything it inherits."""
    stages = read_stages()
    stage = stages[target]
    inherited = image(stage.base).instructions if stage.base in stages else []
    return Stage(target, stage.base, inherited + stage.instructions)


def environment(target: str) -> dict[str, str]:
    """Return the environment variables that image `target` sets."""
    return dict(
        word.split("=", 1) for value in image(target).values("ENV") for word in shlex.split(value) if "=" in word
    )


def exec_form(value: str) -> list[str]:
    """Return the words of an instruction in JSON form; the shell form would not pass signals on."""
    words: list[str] = json.loads(value)
    return words


def read_compose(**variables: str) -> dict[str, Any]:
    """Return docker-compose.yml with its variables filled in: from `variables`, else with their defaults."""

    def fill_in(match: re.Match[str]) -> str:
        name, operator, default = match["name"], match["operator"], match["default"]
        if name in variables:
            return variables[name]
        assert operator == ":-", f"{name} has no default and was not given"
        return str(default)

    text = re.sub(r"\$\{(?P<name>\w+)(?:(?P<operator>:[-?])(?P<default>[^}]*))?\}", fill_in, COMPOSE.read_text())
    compose: dict[str, Any] = yaml.safe_load(text)
    return compose


def _instructions() -> list[tuple[str, str]]:
    lines = [line for line in DOCKERFILE.read_text().splitlines() if line.strip() and not line.startswith("#")]
    whole = "\n".join(lines).replace("\\\n", " ")
    return [
        (name, re.sub(r"\s+", " ", value).strip())
        for name, value in (line.split(" ", 1) for line in whole.splitlines())
    ]

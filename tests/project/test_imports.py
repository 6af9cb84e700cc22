"""Imports point one way: server -> engine -> kernels -> torch. Read from the import statements themselves."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

OURS = {"kernels", "engine", "server", "training", "loadtest", "chat"}
TORCH_FREE_ENGINE = (
    "engine.messages",
    "engine.errors",
    "engine.config",
    "engine.token_chain",
    "engine.client",
    "engine.launch",
    "engine.logs",
    "engine.garbage",
    "engine.tokenizer",
    # The state store, for exports and imports: bytes in and out. What they mean is `engine.state.checkpoint`'s.
    "engine.state.store",
    "engine.state.open_store",
    "engine.state.file_store",
    "engine.state.memory_store",
    "engine.state.redis_store",
)
MAY_IMPORT = {
    "kernels": {"kernels"},
    "engine": {"engine", "kernels"},
    "server": {"server", "engine"},
    "training": {"training", "engine", "kernels"},
    "loadtest": {"loadtest"},
    "chat": {"chat", "loadtest"},
}
SOURCES = sorted(path for package in OURS for path in (ROOT / package).rglob("*.py"))


def imported_modules(path: Path) -> Iterator[str]:
    """Yield the full name of all that `path` imports, modules and what it takes from them, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; say where it comes from"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_within(module: str, packages: tuple[str, ...]) -> bool:
    """Say whether `module` is one of `packages` or inside one."""
    return any(module == package or module.startswith(package + ".") for package in packages)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_arrows(path: Path) -> None:
    """A file imports only what its package may know."""
    package = path.relative_to(ROOT).parts[0]
    for module in imported_modules(path):
        top = module.split(".")[0]
        if top in OURS:
            assert top in MAY_IMPORT[package], f"{package} must not know {module}"


@pytest.mark.parametrize("path", [p for p in SOURCES if p.is_relative_to(ROOT / "server")], ids=str)
def test_the_server_sees_only_the_torch_free_engine(path: Path) -> None:
    """The API process never imports torch, directly or through the engine."""
    for module in imported_modules(path):
        assert module.split(".")[0] != "torch"
        if module.split(".")[0] == "engine":
            assert is_within(module, TORCH_FREE_ENGINE), f"{path.name} imports {module}"


@pytest.mark.parametrize("module", TORCH_FREE_ENGINE)
def test_the_torch_free_engine_is_torch_free(module: str) -> None:
    """What the API process may import of the engine imports no torch itself, also not by way of a neighbour."""
    base = ROOT / Path(*module.split("."))
    for path in sorted(base.rglob("*.py")) if base.is_dir() else [base.with_suffix(".py")]:
        for imported in imported_modules(path):
            assert imported.split(".")[0] != "torch"
            if imported.split(".")[0] == "engine":
                assert is_within(imported, TORCH_FREE_ENGINE), f"{path.name} imports {imported}"


def test_the_terminal_takes_only_the_reader_of_events_from_the_load_test() -> None:
    """Both read OpenAI's streams; nothing else is theirs together."""
    taken = {module for path in sorted((ROOT / "chat").rglob("*.py")) for module in imported_modules(path)}
    assert {module for module in taken if module.startswith("loadtest")} == {"loadtest.sse.EventParser"}


def test_nothing_reads_pickles() -> None:
    """No module can be made to run code by a file: no pickle, no unrestricted torch.load, no eval."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                assert not name.startswith(("pickle.", "marshal.")), f"{path}: {name}"
                assert name not in {"eval", "exec", "yaml.load"}, f"{path}: {name}"
                if name == "torch.load":
                    assert any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords), path

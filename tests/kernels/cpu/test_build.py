"""The library is compiled once, and its absence or failure is loud but not fatal."""

from __future__ import annotations

import ctypes
import logging
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from kernels import cpu
from kernels.cpu import build as building
from kernels.cpu.build import CompileError, build, find_compiler

TINY = 'extern "C" __attribute__((visibility("default"))) int answer() { return 42; }\n'


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source directory of one small file in place of the real one."""
    try:
        find_compiler()
    except CompileError:
        pytest.skip("no C++ compiler")
    directory = tmp_path / "src"
    directory.mkdir()
    (directory / "tiny.cpp").write_text(TINY)
    monkeypatch.setattr(building, "SOURCES", directory)
    return directory


@pytest.fixture
def _forget_builds() -> Iterator[None]:
    """Let `register` look for a library afresh, here and afterwards."""
    cpu._library_path.cache_clear()
    yield
    cpu._library_path.cache_clear()


def test_a_library_is_compiled_once_for_its_sources(sources: Path, tmp_path: Path) -> None:
    """A second build finds the first one's file; changed sources get a file of their own."""
    cache = tmp_path / "cache"
    first = build(cache)
    written = first.stat().st_mtime_ns
    assert build(cache) == first
    assert first.stat().st_mtime_ns == written
    (sources / "tiny.cpp").write_text(TINY.replace("42", "43"))
    assert build(cache) != first


def test_two_builds_at_once_both_succeed(sources: Path, tmp_path: Path) -> None:
    """Racing builds leave one whole library and nothing else."""
    cache = tmp_path / "cache"
    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(lambda _: build(cache), range(2))
    assert first == second
    assert list(cache.iterdir()) == [first]


def test_a_compile_error_shows_the_compilers_words(sources: Path, tmp_path: Path) -> None:
    """What the compiler said reaches whoever asked, and no half-made file stays behind."""
    (sources / "tiny.cpp").write_text("int answer( { }")
    with pytest.raises(CompileError, match="error: expected"):
        build(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_tiles_the_system_refuses_are_not_compiled(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who uses tile registers without permission is ended: such a process gets a library of its own, without."""
    (sources / "tiny.cpp").write_text(f"#ifdef {building.WITHOUT_TILES.removeprefix('-D')}\n{TINY}#endif\n")
    monkeypatch.setattr(building, "_may_use_tiles", lambda: False)
    without = ctypes.CDLL(str(build(tmp_path / "cache")))
    assert without.answer() == 42
    monkeypatch.setattr(building, "_has_tiles", lambda: True)
    monkeypatch.setattr(building, "_may_use_tiles", lambda: True)
    with pytest.raises(AttributeError, match="answer"):
        _ = ctypes.CDLL(str(build(tmp_path / "cache"))).answer


@pytest.mark.usefixtures("_forget_builds")
def test_without_a_compiler_pytorch_does_the_work_after_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No compiler is not an error: `register` says so once, and returns None."""
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with caplog.at_level(logging.WARNING):
        assert cpu.register(cache_directory=tmp_path) is None
        assert cpu.register(cache_directory=tmp_path) is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "no C++ compiler found" in caplog.text


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory that cannot be made leaves the work to PyTorch."""
    file = tmp_path / "file"
    file.write_text("")
    assert cpu.register(cache_directory=file / "cache") is None


def test_eager_packs_what_pytorch_reads() -> None:
    """Inside `eager`, weights are packed as on a machine without a compiler; outside, as before."""
    weight = torch.ones(4, 4)
    if cpu.register(num_threads=1) is None:
        pytest.skip("no C++ compiler")
    with cpu.eager():
        assert torch.ops.sostenuto.pack_linear(weight).dim() == 2
    assert torch.ops.sostenuto.pack_linear(weight).dim() == 1

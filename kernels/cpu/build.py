"""Compiles the C++ operators with the machine's own compiler, for the machine's own instruction set, once.

The library lands in a cache directory under a name made of everything that shapes it: sources, flags, processor. Two
processes may build at once: each renames a finished file into place, and either one is right. `python -m
kernels.cpu.build` does the same ahead of time, for images.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "src"
COMPILERS = ("c++", "g++", "clang++")
FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",  # where two operations become one is decided in the source, so that sums are the same anywhere
    "-fno-math-errno",
    "-pthread",
)
WITHOUT_TILES = "-DSOSTENUTO_WITHOUT_TILES"
COMPILE_SECONDS = 300


class CompileError(Exception):
    """No library could be built; the message says why, with the compiler's own words."""


def default_cache() -> Path:
    """Return the directory libraries are kept in when nobody names another."""
    return Path.home() / ".cache" / "sostenuto"


def build(cache: Path | None = None, target: str = "native") -> Path:
    """Return the path of the library for this machine, compiled if the cache has none yet.

    `target` is the compiler's `-march`; another than `native` is for tests. Raises `CompileError`.
    """
    cache = default_cache() if cache is None else cache
    flags = (*FLAGS, *_target_flags(target))
    library = cache / f"kernels-{_key(flags)}.so"
    if not library.exists():
        compiler = find_compiler()
        logger.info("compiling the CPU operators with %s, once; they are kept as %s", compiler, library)
        _compile(compiler, flags, library)
    return library


def find_compiler() -> str:
    """Return the path of a C++ compiler; raises `CompileError` where there is none."""
    for name in COMPILERS:
        if path := shutil.which(name):
            return path
    raise CompileError(f"no C++ compiler found (looked for {', '.join(COMPILERS)})")


def _target_flags(target: str) -> tuple[str, ...]:
    if _is_arm():
        return (f"-mcpu={target}",)
    tiles = () if _has_tiles() and _may_use_tiles() else (WITHOUT_TILES,)
    return (f"-march={target}", *tiles)


def _has_tiles() -> bool:
    """Say whether the processor has tile registers (Intel AMX)."""
    return "amx_tile" in _processor().split()


def _may_use_tiles() -> bool:
    """Ask the kernel for this process's tile registers; whoever uses them unasked is ended.

    What is allowed once stays allowed, for threads to come as well (Linux: Documentation/arch/x86/xstate.rst).
    """
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    try:
        return bool(ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0)
    except (OSError, AttributeError):
        return False


def _is_arm() -> bool:
    return platform.machine().lower() in ("aarch64", "arm64")


def _key(flags: tuple[str, ...]) -> str:
    digest = hashlib.blake2b(digest_size=12)
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    digest.update("\0".join((*flags, _processor())).encode())
    return digest.hexdigest()


def _processor() -> str:
    """Return what tells this processor's instruction set from another's."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return f"{platform.system()} {platform.machine()} {platform.processor()}"
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(line for line in lines if line.startswith(wanted))


def _compile(compiler: str, flags: tuple[str, ...], library: Path) -> None:
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent, prefix="build-") as directory:
        sources = sorted(SOURCES.glob("*.cpp"))
        objects = [Path(directory) / f"{source.stem}.o" for source in sources]
        commands = [
            [compiler, *flags, "-c", str(source), "-o", str(target)]
            for source, target in zip(sources, objects, strict=True)
        ]
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            list(threads.map(_run, commands))
        built = Path(directory) / library.name
        _run([compiler, *flags, "-shared", *map(str, objects), "-o", str(built)])
        built.replace(library)


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CompileError(f"{command[0]}: {error}") from error
    if done.returncode != 0:
        raise CompileError(f"{' '.join(command)}\n{done.stderr.strip()}")


if __name__ == "__main__":
    print(build())  # noqa: T201

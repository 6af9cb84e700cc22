"""`sostenuto doctor`: whether this machine and its stores can keep what a server with these settings promises.

Looks and measures; changes nothing but files and keys of its own, which it removes (the directory of the states is made
if need be, as a server would). Does not start an engine.
"""

from __future__ import annotations

import enum
import os
import resource
import secrets
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from urllib.parse import unquote, urlsplit

from redis import Redis
from redis.exceptions import RedisError

from engine.errors import CheckpointError
from engine.state.open_store import open_store
from server.conversations.open_ledger import REDIS_PREFIXES, SQLITE_PREFIX
from server.settings import Settings, mask_password

NUM_PROBES = 21
PROBE_BYTES = 1 << 20
TIMEOUT_SECONDS = 2.0
SLOW_SECONDS = 0.02  # of a commit: each turn waits for one before its last word
# Flash with a protected cache takes this long at least; what is faster has not been anywhere.
HONEST_FSYNC_SECONDS = 15e-6
MIN_OPEN_FILES = 4096  # one a client, and some
REMOTE_FILESYSTEMS = ("nfs", "cifs", "smb", "9p", "fuse", "ceph", "gluster", "virtiofs")
VOLATILE_FILESYSTEMS = ("tmpfs", "ramfs")
COMPILER = "from kernels.cpu.build import find_compiler; print(find_compiler())"


class Grade(enum.StrEnum):
    """How bad it is."""

    OK = "ok"
    WARNING = "warning"  # it works, and something is not as it could be
    PROBLEM = "problem"  # a promise cannot be kept


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    grade: Grade
    text: str

    def __str__(self) -> str:
        return f"{self.grade.value:8} {self.text}"


def examine(settings: Settings) -> Iterator[Finding]:
    """Yield what is found, as it is found."""
    ledger_url, state_url = settings.resolved_ledger_url, settings.resolved_state_url
    if ledger_url.startswith(REDIS_PREFIXES):
        yield from _examine_redis("ledger", ledger_url, _ledger_settings)
    elif ledger_url == "memory:":
        yield Finding(Grade.PROBLEM, "ledger: memory: conversations end with the server")
    else:
        yield from _examine_directory("ledger", Path(ledger_url.removeprefix(SQLITE_PREFIX)).parent, holds_truth=True)
    if state_url.startswith(REDIS_PREFIXES):
        yield from _examine_redis("states", state_url, _state_settings)
    elif state_url == "memory:":
        yield Finding(Grade.WARNING, "states: memory: after a restart every conversation is replayed, none exported")
    else:
        yield from _examine_directory("states", Path(unquote(urlsplit(state_url).path)), holds_truth=False)
    if state_url != "memory:":
        yield _measure_states(state_url)
    if ledger_url == state_url:
        yield Finding(Grade.WARNING, "ledger and states share a Redis: checkpoints slow commits down, and can fill it")
    yield _open_files()
    if settings.device in ("auto", "cpu"):
        yield _compiler()


# -- directories ------------------------------------------------------------------------------------------------------


def _examine_directory(what: str, directory: Path, *, holds_truth: bool) -> Iterator[Finding]:
    existing = next(path for path in (directory, *directory.absolute().parents) if path.is_dir())
    filesystem = _filesystem_of(existing)
    if filesystem.startswith(VOLATILE_FILESYSTEMS):
        grade = Grade.PROBLEM if holds_truth else Grade.WARNING
        yield Finding(grade, f"{what}: {existing} is in memory ({filesystem}): it is empty after a restart")
    elif filesystem.startswith(REMOTE_FILESYSTEMS) and holds_truth:
        yield Finding(
            Grade.PROBLEM, f"{what}: {existing} is not a local disk ({filesystem}): locks and syncs may not be kept"
        )
    try:
        seconds = _measure_fsync(existing)
    except OSError as error:
        yield Finding(Grade.PROBLEM, f"{what}: {existing} cannot be written: {error.strerror}")
        return
    took = f"{what}: a write to {existing} is synced in {_milliseconds(seconds)}"
    if seconds < HONEST_FSYNC_SECONDS and holds_truth:
        yield Finding(
            Grade.WARNING, f"{took}: too fast to have reached a disk; a power cut may take acknowledged turns"
        )
    elif seconds > SLOW_SECONDS and holds_truth:
        yield Finding(Grade.WARNING, f"{took}: every turn waits for one")
    else:
        yield Finding(Grade.OK, took)


def _measure_fsync(directory: Path) -> float:
    """Return the median time to append a page to a file and sync it."""
    path = directory / f".doctor-{secrets.token_hex(8)}"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)

    def append() -> None:
        os.write(descriptor, bytes(4096))
        os.fsync(descriptor)

    try:
        return _median_seconds(append)
    finally:
        os.close(descriptor)
        path.unlink()


def _filesystem_of(directory: Path) -> str:
    """Return the type of the file system, as Linux lists it; empty where nobody says."""
    mounts = Path("/proc/self/mounts")
    if not mounts.exists():
        return ""
    found, depth = "", -1
    for line in mounts.read_text().splitlines():
        _, place, filesystem, *_ = line.split(" ")
        mounted = Path(place.replace("\\040", " "))
        if directory.resolve().is_relative_to(mounted) and len(mounted.parts) >= depth:
            found, depth = filesystem, len(mounted.parts)
    return found


# -- Redis ------------------------------------------------------------------------------------------------------------


def _examine_redis(
    what: str, url: str, examine_settings: Callable[[dict[str, str]], Iterator[tuple[Grade, str]]]
) -> Iterator[Finding]:
    where = f"{what}: {mask_password(url)}"
    try:
        with Redis.from_url(
            url, socket_timeout=TIMEOUT_SECONDS, socket_connect_timeout=TIMEOUT_SECONDS, decode_responses=True
        ) as redis:
            seconds = _median_seconds(redis.ping)
            yield Finding(
                Grade.WARNING if seconds > SLOW_SECONDS else Grade.OK, f"{where} answers in {_milliseconds(seconds)}"
            )
            try:
                found = cast("dict[str, str]", redis.config_get("append*", "maxmemory*"))
            except RedisError:
                yield Finding(Grade.WARNING, f"{where} hides its configuration: nobody can tell what it keeps")
                return
    except (RedisError, OSError, ValueError):  # the message may repeat a piece of the password
        yield Finding(Grade.PROBLEM, f"{where} does not answer")
        return
    for grade, text in examine_settings(found):
        yield Finding(grade, f"{where} {text}")


def _ledger_settings(found: dict[str, str]) -> Iterator[tuple[Grade, str]]:
    policy = found["maxmemory-policy"]
    if policy != "noeviction":
        yield Grade.PROBLEM, f"evicts when it is full (maxmemory-policy {policy}): conversations vanish; set noeviction"
    if found["appendonly"] != "yes":
        yield Grade.PROBLEM, "keeps no append-only file (appendonly no): turns are lost when it ends"
    elif found["appendfsync"] == "always":
        yield Grade.OK, "syncs every turn (appendfsync always): replies say fsynced"
    else:
        lost = (
            "about two seconds of turns"
            if found["appendfsync"] == "everysec"
            else "whatever the kernel had not written"
        )
        yield Grade.OK, f"keeps turns (appendfsync {found['appendfsync']}): a crash of its machine may lose {lost}"
    if found["maxmemory"] == "0":
        yield Grade.WARNING, "has no maxmemory: it may grow until the kernel ends it"


def _state_settings(found: dict[str, str]) -> Iterator[tuple[Grade, str]]:
    policy = found["maxmemory-policy"]
    if policy == "volatile-ttl":
        yield (
            Grade.WARNING,
            "evicts what ends first (volatile-ttl): checkpoints that are being uploaded; set volatile-lru",
        )
    elif policy == "noeviction":
        yield Grade.WARNING, "refuses checkpoints when it is full (noeviction); volatile-lru lets old ones go"
    else:
        yield Grade.OK, f"lets old checkpoints go when it is full ({policy})"
    if found["maxmemory"] == "0":
        yield Grade.WARNING, "has no maxmemory: it may grow until the kernel ends it"


# -- the rest ---------------------------------------------------------------------------------------------------------


def _measure_states(url: str) -> Finding:
    """Write a megabyte as a checkpoint, read it back, and remove it."""
    blob, checkpoint_id = secrets.token_bytes(PROBE_BYTES), secrets.token_hex(16)
    try:
        store = open_store(url)
    except (CheckpointError, ValueError) as error:
        return Finding(Grade.PROBLEM, f"states: {error}")
    try:
        began_at = time.perf_counter()
        store.put(checkpoint_id, blob, 60.0)
        wrote_at = time.perf_counter()
        is_same = store.get(checkpoint_id) == blob
        read_at = time.perf_counter()
        store.delete([checkpoint_id])
    except CheckpointError as error:
        return Finding(Grade.PROBLEM, f"states: {error}")
    finally:
        store.close()
    if not is_same:
        return Finding(Grade.PROBLEM, "states: what is read is not what was written")
    written, read = _milliseconds(wrote_at - began_at), _milliseconds(read_at - wrote_at)
    return Finding(Grade.OK, f"states: a megabyte is written in {written}, read in {read}")


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < MIN_OPEN_FILES:
        more = "" if hard == soft else f" (ulimit -n {hard} allows more)"
        return Finding(Grade.WARNING, f"open files: at most {soft}, and every client is one{more}")
    return Finding(Grade.OK, "open files: enough for thousands of clients")


def _compiler() -> Finding:
    """Ask in a process of its own: what knows about compilers imports what a server never does."""
    asked = subprocess.run([sys.executable, "-c", COMPILER], capture_output=True, text=True)
    if asked.returncode == 0:
        return Finding(Grade.OK, f"compiler: {asked.stdout.strip()}")
    return Finding(Grade.WARNING, "compiler: none (c++, g++, clang++): on a CPU the model runs several times slower")


def _median_seconds(work: Callable[[], Any]) -> float:
    def measure() -> float:
        began_at = time.perf_counter()
        work()
        return time.perf_counter() - began_at

    return statistics.median(measure() for _ in range(NUM_PROBES))


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.3g} ms"

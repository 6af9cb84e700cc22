"""Checkpoints as files: `DIRECTORY/<first two digits of the id>/<id>`.

A file appears under its name only when it is whole and on the disk: it is written under another name, synced, renamed,
and then its folder is synced. Its modification time says when it ends.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from engine.errors import CheckpointMissing, StoreUnavailable
from engine.state.store import require_checkpoint_id

UNFINISHED_SUFFIX = ".tmp"
UNFINISHED_SECONDS = 600.0  # what was not finished for so long was left by a process that died
QUARANTINE = "quarantine"
QUARANTINE_SECONDS = 7 * 86_400.0
MAX_QUARANTINED = 16
RESERVE_FRACTION = 0.05  # of the disk, or
RESERVE_BYTES = 1 << 30  # if that is less, is left to the turn log, which matters more


class FileStore:
    """Checkpoints in the files of a directory, which is made if need be. Several processes may share it.

    `clock` returns seconds since the epoch; if it jumps, checkpoints end early or late, which costs time, never data.
    """

    tier = "file"

    def __init__(self, directory: Path, *, clock: Callable[[], float] = time.time) -> None:
        self._directory = directory
        self._clock = clock
        with _unavailable_on_os_error():
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def put(self, checkpoint_id: str, blob: bytes | bytearray | memoryview, ttl_seconds: float) -> None:
        """See `StateStore.put`. When it returns, the blob survives a crash of the machine."""
        path = self._path(checkpoint_id)
        unfinished = path.with_suffix(f".{secrets.token_hex(8)}{UNFINISHED_SUFFIX}")  # others may write this name, too
        with _unavailable_on_os_error():
            self._require_space(memoryview(blob).nbytes)
            self._make_folder(path.parent)
            try:
                _write_private(unfinished, blob, ends_at=self._clock() + ttl_seconds)
                unfinished.rename(path)
            except OSError:
                unfinished.unlink(missing_ok=True)
                raise
            _sync_folder(path.parent)

    def get(self, checkpoint_id: str) -> bytearray:
        """See `StateStore.get`."""
        path = self._path(checkpoint_id)
        with _unavailable_on_os_error():
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            except FileNotFoundError:
                raise CheckpointMissing(f"no checkpoint {checkpoint_id} in {self._directory}") from None
            with os.fdopen(descriptor, "rb") as file:
                status = os.fstat(descriptor)
                blob = bytearray(status.st_size)
                if status.st_mtime <= self._clock() or file.readinto(blob) != len(blob):
                    raise CheckpointMissing(f"checkpoint {checkpoint_id} has ended")
                return blob

    def delete(self, checkpoint_ids: Iterable[str]) -> None:
        """See `StateStore.delete`."""
        for checkpoint_id in checkpoint_ids:
            path = self._path(checkpoint_id)
            with _unavailable_on_os_error():
                path.unlink(missing_ok=True)

    def quarantine(self, checkpoint_id: str) -> None:
        """See `StateStore.quarantine`. The newest few are kept for a week in the folder `quarantine`."""
        path = self._path(checkpoint_id)
        folder = self._directory / QUARANTINE
        with _unavailable_on_os_error(), suppress(FileNotFoundError):
            self._make_folder(folder)
            _set_end(path, self._clock() + QUARANTINE_SECONDS)
            path.rename(folder / checkpoint_id)
            newest_first = sorted(folder.iterdir(), key=lambda kept: kept.stat().st_mtime, reverse=True)
            for kept in newest_first[MAX_QUARANTINED:]:
                kept.unlink(missing_ok=True)

    def sweep(self) -> int:
        """See `StateStore.sweep`."""
        now = self._clock()
        num_removed = 0
        with _unavailable_on_os_error():
            for path in self._directory.glob("*/*"):
                with suppress(FileNotFoundError):  # another process sweeps too
                    grace_seconds = UNFINISHED_SECONDS if path.suffix == UNFINISHED_SUFFIX else 0.0
                    if path.stat().st_mtime + grace_seconds <= now:
                        path.unlink()
                        num_removed += 1
        return num_removed

    def close(self) -> None:
        """See `StateStore.close`. Nothing to release."""

    def _path(self, checkpoint_id: str) -> Path:
        require_checkpoint_id(checkpoint_id)
        return self._directory / checkpoint_id[:2] / checkpoint_id

    def _make_folder(self, folder: Path) -> None:
        try:
            folder.mkdir(mode=0o700)
        except FileExistsError:
            return
        _sync_folder(self._directory)

    def _require_space(self, num_bytes: int) -> None:
        disk = os.statvfs(self._directory)
        reserve = min(RESERVE_FRACTION * disk.f_blocks * disk.f_frsize, RESERVE_BYTES)
        if disk.f_bavail * disk.f_frsize - num_bytes < reserve:
            raise StoreUnavailable(f"the disk of {self._directory} is nearly full: the rest is the turn log's")


def _write_private(path: Path, blob: bytes | bytearray | memoryview, ends_at: float) -> None:
    """Write and sync a new file that only its owner can read."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(blob)
        file.flush()
        _set_end(descriptor, ends_at)
        os.fsync(descriptor)  # not fdatasync: the time of modification must reach the disk, too


def _set_end(file: Path | int, ends_at: float) -> None:
    os.utime(file, (ends_at, ends_at))


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _unavailable_on_os_error() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreUnavailable(f"the state directory cannot be used: {error}") from error

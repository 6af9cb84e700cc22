"""What only files do: they appear whole, are private, and leave room on the disk."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from engine.errors import StoreUnavailable
from engine.state import file_store
from tests.engine.state.stores import HOUR, FileUnderTest, new_id


@pytest.fixture
def files(tmp_path: Path) -> FileUnderTest:
    """The file store."""
    return FileUnderTest(tmp_path / "deep" / "states")


def test_files_are_private(files: FileUnderTest) -> None:
    """Only their owner can read the directory, its folders and its files, whatever the umask says."""
    umask = os.umask(0)
    try:
        under_test = FileUnderTest(files.directory / "new")
        checkpoint_id = new_id()
        under_test.store.put(checkpoint_id, b"state", HOUR)
    finally:
        os.umask(umask)
    path = under_test.directory / checkpoint_id[:2] / checkpoint_id
    modes = [entry.stat().st_mode & 0o777 for entry in (under_test.directory, path.parent, path)]
    assert modes == [0o700, 0o700, 0o600]


def test_a_file_appears_when_it_is_synced(files: FileUnderTest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blob is synced before it gets its name, and the folder after: a crash leaves it whole or not at all."""
    checkpoint_id, steps = new_id(), []
    path = files.directory / checkpoint_id[:2] / checkpoint_id
    fsync, rename = os.fsync, Path.rename
    monkeypatch.setattr(
        os, "fsync", lambda fd: (steps.append((os.readlink(f"/proc/self/fd/{fd}"), path.exists())), fsync(fd))
    )
    monkeypatch.setattr(Path, "rename", lambda self, to: (steps.append("rename"), rename(self, to))[1])
    files.store.put(checkpoint_id, b"state", HOUR)
    assert steps == [
        (str(files.directory), False),  # the new folder itself
        (unfinished := steps[1][0], False),
        "rename",
        (str(path.parent), True),
    ]
    assert unfinished.startswith(f"{path}.")
    assert unfinished.endswith(".tmp")


def test_a_failed_write_leaves_nothing(files: FileUnderTest, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the disk is full in the middle of a blob, the store is unavailable and the half-written file is gone."""
    fsync, half_written = os.fsync, []

    def fail_for_blobs(descriptor: int) -> None:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(".tmp"):
            half_written.extend(files.names())
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fail_for_blobs)
    with pytest.raises(StoreUnavailable, match="No space left"):
        files.store.put(new_id(), b"state", HOUR)
    assert len(half_written) == 1
    assert files.names() == set()


def test_the_last_of_the_disk_is_left_to_the_ledger(files: FileUnderTest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A nearly full disk takes no checkpoint, because it must take turns for longer."""
    nearly_full = SimpleNamespace(f_frsize=4096, f_blocks=1_000_000, f_bavail=49_999)
    monkeypatch.setattr(file_store.os, "statvfs", lambda _: nearly_full)
    with pytest.raises(StoreUnavailable, match="nearly full"):
        files.store.put(new_id(), b"state", HOUR)
    assert files.names() == set()


def test_a_sweep_removes_what_a_dead_process_left(files: FileUnderTest) -> None:
    """A half-written file is removed when it is old, and left alone while it may still be being written."""
    kept = new_id()
    files.store.put(kept, b"state", HOUR)
    old, young = (files.directory / kept[:2] / f"{new_id()}.tmp" for _ in range(2))
    for path, age in ((old, 601), (young, 599)):
        path.write_bytes(b"half")
        os.utime(path, (files.time - age, files.time - age))
    assert files.store.sweep() == 1
    assert files.names() == {kept, young.name}


def test_quarantine_ends_too(files: FileUnderTest) -> None:
    """A week later nothing of a quarantined state is on the disk."""
    checkpoint_id = new_id()
    files.store.put(checkpoint_id, b"suspect", HOUR)
    files.store.quarantine(checkpoint_id)
    files.travel(6 * 86_400)
    files.store.sweep()
    assert set(files.quarantined()) == {checkpoint_id}
    files.travel(86_400)
    files.store.sweep()
    assert files.quarantined() == {}


def test_a_link_is_not_followed(files: FileUnderTest, tmp_path: Path) -> None:
    """A checkpoint is a file, not a way out of the directory."""
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    os.utime(secret, (files.time + HOUR, files.time + HOUR))
    checkpoint_id = new_id()
    (files.directory / checkpoint_id[:2]).mkdir()
    (files.directory / checkpoint_id[:2] / checkpoint_id).symlink_to(secret)
    with pytest.raises(StoreUnavailable):
        files.store.get(checkpoint_id)


def test_a_lost_directory_is_unavailable(files: FileUnderTest) -> None:
    """If the directory goes away the store says so."""
    files.directory.rmdir()
    with pytest.raises(StoreUnavailable):
        files.store.put(new_id(), b"state", HOUR)

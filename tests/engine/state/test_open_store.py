from __future__ import annotations

from pathlib import Path

import pytest

from engine.state.open_store import open_store


def test_addresses_choose_the_store(tmp_path: Path) -> None:
    """Each scheme has its store, which says its tier."""
    stores = {
        "memory:": "memory",
        (tmp_path / "with space").as_uri(): "file",
        "redis://127.0.0.1:6380/2": "redis",
        "rediss://user:secret@host": "redis",
        "unix:///run/redis.sock?db=1": "redis",
    }
    for url, tier in stores.items():
        store = open_store(url)
        assert store.tier == tier
        assert "secret" not in repr(store)
        store.close()
    assert (tmp_path / "with space").is_dir()


@pytest.mark.parametrize(
    "url",
    ["", "memory", "states", "/var/lib/states", "file:states", "file://states", "file:///", "redis:", "s3://bucket"],
)
def test_other_addresses_are_refused(url: str) -> None:
    """A bad address is a `ValueError` that says what would be one."""
    with pytest.raises(ValueError, match="address"):
        open_store(url)


@pytest.mark.parametrize("url", ["redis://user:secret#@host", "redis://:secret@host:port", "redis://:secret@host/0x"])
def test_a_bad_address_shows_no_password(url: str) -> None:
    """The refusal of a Redis address repeats nothing of it."""
    with pytest.raises(ValueError, match="address") as refusal:
        open_store(url)
    assert "secret" not in str(refusal.value)

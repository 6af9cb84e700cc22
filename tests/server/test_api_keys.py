"""The file of API keys: what it may say, and what it never repeats."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from server.api_keys import ApiKeyError, digest_of, read_api_keys
from server.settings import Settings, SettingsError
from server.tenants import Tenants

SECRET = "pr1vate-key"
DIGEST = hashlib.sha256(SECRET.encode()).hexdigest()


def test_keys_and_digests_and_limits_are_read(tmp_path: Path) -> None:
    """A tenant may have several keys, spelled out or digested, and limits."""
    path = tmp_path / "keys.toml"
    path.write_text(f'[ada]\nsha256 = "{DIGEST.upper()}"\nmax_running = 2\n[bob]\nkey = ["one", "two"]\n')
    ada, bob = read_api_keys(path)
    assert (ada.name, ada.digests, ada.limits) == ("ada", (digest_of(SECRET),), {"max_running": 2})
    assert (bob.name, bob.digests, bob.limits) == ("bob", (digest_of("one"), digest_of("two")), {})


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "no key"),
        ("[ada", "not a TOML file"),
        ("[ada]", "neither"),
        ('[ada]\nkey = ""', "ada.key"),
        ("[ada]\nkey = []", "neither"),
        ("[ada]\nkey = 5", "ada.key"),
        ('[ada]\nsha256 = "abc"', "ada.sha256"),
        (f'[ada]\nkey = "{SECRET}"\nlimit = 5', "ada.limit"),
        (f'[ada]\nkey = "{SECRET}"\nmax_running = 0', "ada.max_running"),
        (f'[ada]\nkey = "{SECRET}"\nmax_running = true', "ada.max_running"),
        (f'["a b"]\nkey = "{SECRET}"', "name"),
        (f'ada = "{SECRET}"', "ada"),
        (f'[ada]\nkey = "{SECRET}"\n[bob]\nsha256 = "{DIGEST}"', "twice"),
    ],
)
def test_what_is_wrong_is_told_without_the_key(content: str, told: str, tmp_path: Path) -> None:
    """A server with a broken file does not start, and no log gets a key by that."""
    path = tmp_path / "keys.toml"
    path.write_text(content)
    with pytest.raises(ApiKeyError, match=told) as refused:
        read_api_keys(path)
    assert SECRET not in str(refused.value)
    with pytest.raises(SettingsError, match="api_keys_file") as unusable:
        Settings.load({"api_keys_file": str(path)})
    assert SECRET not in str(unusable.value)


def test_an_absent_file_is_an_error(tmp_path: Path) -> None:
    """A file that is named must be there: nobody should find an open server instead."""
    with pytest.raises(SettingsError, match="No such file"):
        Settings.load({"api_keys_file": str(tmp_path / "absent.toml")})


def test_a_file_of_keys_is_enough_to_listen_everywhere(tmp_path: Path) -> None:
    """It guards a server as a single key does."""
    path = tmp_path / "keys.toml"
    path.write_text(f'[ada]\nsha256 = "{DIGEST}"\n')
    assert Settings.load({"host": "0.0.0.0", "api_keys_file": str(path)}).host == "0.0.0.0"


def test_the_servers_own_key_is_nobody_elses(tmp_path: Path) -> None:
    """A key that opens for two tenants opens for neither: the server does not start."""
    file = tmp_path / "keys.toml"
    file.write_text('[ada]\nkey = "one-key"\n')
    with pytest.raises(ApiKeyError, match="api_key"):
        Tenants.of(Settings(api_key="one-key", api_keys_file=file))

"""Settings: where they come from, what they refuse, what they never tell."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from pydantic import SecretStr

from server.settings import Settings, SettingsError, is_loopback, mask_password


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of the machine that runs the tests reaches them."""
    for name in list(os.environ):
        if name.startswith("SOSTENUTO_"):
            monkeypatch.delenv(name)


def test_flags_win_over_environment_over_file_over_defaults(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each source overrides the ones below it, setting by setting."""
    config = tmp_path / "sostenuto.toml"
    config.write_text("port = 1\nmax_num_seqs = 1\nmax_logprobs = 1\n")
    monkeypatch.setenv("SOSTENUTO_PORT", "2")
    monkeypatch.setenv("SOSTENUTO_MAX_NUM_SEQS", "2")
    settings = Settings.load({"port": "3"}, config)
    assert (settings.port, settings.max_num_seqs, settings.max_logprobs) == (3, 2, 1)
    assert settings.max_num_queued_reqs == Settings().max_num_queued_reqs


def test_the_file_may_be_named_in_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """SOSTENUTO_CONFIG stands for --config."""
    config = tmp_path / "sostenuto.toml"
    config.write_text("port = 4\n")
    monkeypatch.setenv("SOSTENUTO_CONFIG", str(config))
    assert Settings.load({}).port == 4


def test_making_settings_reads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only `load` looks at the environment."""
    monkeypatch.setenv("SOSTENUTO_PORT", "2")
    assert Settings().port == 8000


def test_unknown_keys_fail_wherever_they_stand(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A misspelt key is an error in the file and in the environment."""
    config = tmp_path / "sostenuto.toml"
    config.write_text("max_num_sequences = 1\n")
    with pytest.raises(SettingsError, match="max_num_sequences: there is no such setting"):
        Settings.load({}, config)
    monkeypatch.setenv("SOSTENUTO_MAX_SEQS", "1")
    with pytest.raises(SettingsError, match="SOSTENUTO_MAX_SEQS: there is no such setting"):
        Settings.load({})


def test_every_problem_is_told_at_once() -> None:
    """Two wrong values give two lines."""
    with pytest.raises(SettingsError) as raised:
        Settings.load({"port": "99999", "max_num_seqs": "none"})
    assert [problem.split(":")[0] for problem in raised.value.problems] == ["max_num_seqs", "port"] or [
        problem.split(":")[0] for problem in raised.value.problems
    ] == ["port", "max_num_seqs"]


@pytest.mark.parametrize("content", ["port = ", "[port", "port = nan"])
def test_a_broken_file_is_told_not_ignored(content: str, tmp_path: Path) -> None:
    """Neither broken TOML nor an impossible value starts a server."""
    config = tmp_path / "broken.toml"
    config.write_text(content)
    with pytest.raises(SettingsError):
        Settings.load({}, config)


def test_an_absent_file_is_an_error(tmp_path: Path) -> None:
    """A config file that is named must be there."""
    with pytest.raises(SettingsError, match="No such file"):
        Settings.load({}, tmp_path / "absent.toml")


def test_settings_cannot_be_changed() -> None:
    """They are frozen."""
    with pytest.raises(ValueError, match="frozen"):
        Settings().port = 1  # type: ignore[misc]


def test_the_key_may_lie_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """api_key_file is read, without the newline an editor leaves."""
    path = tmp_path / "key"
    path.write_text("s3cret\n")
    monkeypatch.setenv("SOSTENUTO_API_KEY_FILE", str(path))
    key = Settings.load({}).api_key
    assert key is not None
    assert key.get_secret_value() == "s3cret"


def test_secrets_are_never_printed() -> None:
    """Neither the key nor a store's password is in what --check-config prints, nor in repr."""
    settings = Settings(
        api_key=SecretStr("s3cret-key"),
        ledger_url="redis://ada:s3cret-pass@db:6379/0",
        state_url="redis://:s3cret-pass@db:6379/1",
    )
    printed = str(settings.printable())
    assert "s3cret" not in printed
    assert "redis://ada:**********@db:6379/0" in printed
    assert "s3cret-key" not in repr(settings)


def test_a_refused_secret_is_not_repeated() -> None:
    """The complaint about a key does not contain it."""
    with pytest.raises(SettingsError) as raised:
        Settings.load({"api_key": "  ", "port": "s3cret"})
    assert "s3cret" not in str(raised.value)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org", ""])
def test_without_a_key_only_loopback_is_served(host: str) -> None:
    """Anything else must be asked for in so many words."""
    with pytest.raises(SettingsError, match="insecure_no_auth"):
        Settings.load({"host": host})
    assert Settings.load({"host": host, "insecure_no_auth": True}).host == host
    assert Settings.load({"host": host, "api_key": "key"}).host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "localhost", "::1", "[::1]"])
def test_loopback_is_known_in_all_its_names(host: str) -> None:
    """These need no key."""
    assert is_loopback(host)


def test_stores_default_to_the_data_directory(tmp_path: Path) -> None:
    """Embedded ledger and state files lie side by side."""
    settings = Settings(data_dir=tmp_path)
    assert settings.resolved_ledger_url == f"sqlite:///{tmp_path}/ledger.sqlite"
    assert settings.resolved_state_url == f"file://{tmp_path}/states"


@pytest.mark.parametrize(("name", "url"), [("ledger_url", "postgres://db"), ("state_url", "sqlite:///x")])
def test_stores_of_other_kinds_are_refused(name: str, url: str) -> None:
    """A URL must name a store that exists here."""
    with pytest.raises(SettingsError, match=name):
        Settings.load({name: url})


def test_a_step_must_have_room_for_every_sequence() -> None:
    """A token budget below the number of sequences is refused before an engine is started with it."""
    with pytest.raises(SettingsError, match="max_num_batched_tokens"):
        Settings.load({"max_num_seqs": 65, "max_num_batched_tokens": 64})


@pytest.mark.parametrize(
    ("model", "name"), [("/m/rwkv7-0.1b.pth", "rwkv7-0.1b"), ("/m/tiny.safetensors", "tiny"), ("/m/goose", "goose")]
)
def test_a_model_is_named_after_its_file(model: str, name: str) -> None:
    """Without a served name the file's or directory's counts."""
    assert Settings(model=model).model_name == name
    assert Settings(model=model, served_model_name="ada").model_name == "ada"


def test_the_engine_is_told_what_was_set() -> None:
    """Settings that shape the engine reach its configuration."""
    settings = Settings(model="/m/x.pth", dtype="float32", max_num_seqs=3, max_num_batched_tokens=7, head_norm_eps=0.5)
    config = settings.engine_config
    assert (config.model_path, config.dtype, config.max_num_seqs) == ("/m/x.pth", "float32", 3)
    assert (config.max_num_batched_tokens, config.head_norm_eps) == (7, 0.5)


def test_a_url_without_a_password_is_printed_as_it_is() -> None:
    """Only passwords are masked."""
    assert mask_password("redis://db:6379/0") == "redis://db:6379/0"


def test_no_setting_comes_or_goes_unnoticed() -> None:
    """The list of settings is an interface: changing it is a decision."""
    assert sorted(Settings.model_fields) == [
        "api_key",
        "api_key_file",
        "api_keys_file",
        "body_seconds",
        "checkpoint_ttl_seconds",
        "conversation_ttl_seconds",
        "data_dir",
        "device",
        "dtype",
        "head_norm_eps",
        "host",
        "hot_state_bytes",
        "initial_states",
        "insecure_no_auth",
        "lease_seconds",
        "ledger_url",
        "log_level",
        "max_body_bytes",
        "max_checkpoints",
        "max_import_bytes",
        "max_logprobs",
        "max_num_batched_tokens",
        "max_num_queued_reqs",
        "max_num_seqs",
        "max_output_tokens",
        "max_running",
        "model",
        "num_threads",
        "openapi",
        "port",
        "prefix_min_tokens",
        "prefix_states",
        "prefix_store_min_tokens",
        "requests_per_minute",
        "served_model_name",
        "shutdown_timeout",
        "state_dtype",
        "state_url",
        "template",
        "tokenizer",
        "tokens_per_minute",
    ]

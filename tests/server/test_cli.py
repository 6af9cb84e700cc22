"""The command line: what it prints and how it exits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from server import cli
from server.cli import run
from tests.conftest import ROOT


def test_check_config_prints_the_effective_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    """One JSON object, flags applied, secrets masked; nothing is started."""
    assert run(["serve", "/m/goose.pth", "--check-config", "--port", "9", "--api-key", "s3cret"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["port"], printed["served_model_name"]) == (9, "goose")
    assert "s3cret" not in str(printed)


def test_without_a_model_it_says_what_is_missing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the bundled default model is absent, serving it exits 2 and says so."""
    monkeypatch.setattr("server.settings.DEFAULT_MODEL", tmp_path / "absent")
    assert run(["serve"]) == 2
    assert "default model" in capsys.readouterr().err


def test_a_directory_without_weights_is_no_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A recipe for a model is not the model yet."""
    (tmp_path / "train.toml").write_text("")
    assert run(["serve", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err


def test_an_absent_model_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    """The path that leads nowhere is in the message."""
    assert run(["serve", "/absent/goose.pth"]) == 2
    assert "/absent/goose.pth" in capsys.readouterr().err


def test_a_refused_configuration_exits_2(capsys: pytest.CaptureFixture[str]) -> None:
    """Every problem has a line."""
    assert run(["serve", "--host", "0.0.0.0"]) == 2
    assert "insecure_no_auth" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["serve", "--no-such-flag"], ["serve", "--max-num", "3"], []])
def test_unknown_flags_and_abbreviations_are_refused(arguments: list[str]) -> None:
    """A flag must be written as it is."""
    with pytest.raises(SystemExit) as exited:
        run(arguments)
    assert exited.value.code == 2


def test_every_flag_of_the_interface_exists(capsys: pytest.CaptureFixture[str]) -> None:
    """VLLM's spellings, where vLLM has the flag."""
    with pytest.raises(SystemExit):
        run(["serve", "--help"])
    printed = capsys.readouterr().out
    flags = (
        "--host --port --device --dtype --tokenizer --served-model-name --max-num-seqs --max-num-batched-tokens "
        "--max-num-queued-reqs --max-logprobs --head-norm-eps --shutdown-timeout --api-key --data-dir --ledger-url "
        "--state-url --config --check-config"
    )
    assert [flag for flag in flags.split() if f"{flag} " not in printed and f"{flag}]" not in printed] == []


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    """`sostenuto --version`."""
    with pytest.raises(SystemExit) as exited:
        run(["--version"])
    assert exited.value.code == 0
    assert capsys.readouterr().out.startswith("sostenuto ")


def test_help_needs_no_engine() -> None:
    """The module of the command imports neither the web framework nor the engine's client."""
    source = Path(cli.__file__).read_text()
    assert "\nfrom server.process" not in source
    assert "\nfrom engine" not in source


@pytest.mark.parametrize("command", ["eval", "loadtest"])
def test_programs_of_their_own_are_reached(command: str) -> None:
    """Commands that live outside the server are started under its name, with what follows theirs."""
    asked = [sys.executable, "-m", "server", command, "--help"]
    told = subprocess.run(asked, capture_output=True, text=True, cwd=ROOT, check=True, timeout=100).stdout
    assert told.startswith("usage:")
    assert command in told.splitlines()[0]

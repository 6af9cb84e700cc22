"""The command line of a load test."""

from __future__ import annotations

import random

import pytest

from loadtest.options import Span, parse_options


def test_a_span_is_a_number_or_a_range() -> None:
    """`7` is always 7; `2-4` draws each of 2, 3 and 4."""
    assert Span.parse("7") == Span(7, 7)
    assert str(Span.parse("2-4")) == "2-4"
    randomness = random.Random(1)
    assert {Span.parse("2-4").draw(randomness) for _ in range(100)} == {2, 3, 4}


@pytest.mark.parametrize("text", ["0", "4-2", "-3", "x", "1-", "1.5", ""])
def test_a_wrong_span_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What is no range of whole numbers above 0 ends with status 2 and the option's name."""
    with pytest.raises(SystemExit) as exit_:
        parse_options([f"--max-tokens={text}"])
    assert exit_.value.code == 2
    assert "--max-tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--rate", "0"],
        ["--rate", "nan"],
        ["--duration", "inf"],
        ["--users", "0"],
        ["--turns", "1.5"],
        ["--think-time", "-1"],
        ["--rate", "2", "--users", "3"],
        ["--unknown"],
    ],
)
def test_senseless_options_are_refused(arguments: list[str]) -> None:
    """Numbers out of range, both loops at once and unknown options end with status 2."""
    with pytest.raises(SystemExit) as exit_:
        parse_options(arguments)
    assert exit_.value.code == 2


def test_the_url_may_be_the_one_openai_clients_use() -> None:
    """A trailing slash or /v1 does not matter."""
    assert parse_options(["--url", "http://host:1/v1/"]).url == "http://host:1"


def test_a_rate_makes_the_loop_open() -> None:
    """With --rate arrivals do not wait for the server; without, users do."""
    assert parse_options(["--rate", "2"]).loop == "open"
    assert parse_options(["--users", "2"]).loop == "closed"


def test_help_explains_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    """--help names every option with what it does, and the exit statuses."""
    with pytest.raises(SystemExit) as exit_:
        parse_options(["--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    for flag in ("--rate", "--users", "--history", "--seed", "--output", "--duration", "--turns", "--warmup"):
        assert flag in text
    assert "Exit status" in text

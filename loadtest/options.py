"""What a load test is told to do: the command line, checked and frozen."""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

History = Literal["server", "client"]

DESCRIPTION = """\
Hold many multi-turn conversations with an OpenAI-compatible server and report how long its answers took.

Closed loop (--users N): N users talk one after the other; a user waits for the reply, thinks, and goes on. A slow
server slows its users down, so the tail is what these users saw, not what independent arrivals would have seen.
Open loop (--rate R): conversations begin as a Poisson process, however slow the server is.

In both, every latency counts from the moment a turn was *meant* to start, not from when the request was sent, so time
spent waiting for a connection or for this program is not left out (no coordinated omission)."""

EPILOG = """\
N-M means a whole number drawn evenly from N to M for each conversation or turn; N alone is always N.
The progress bar goes to standard error; the last line of standard output is one JSON object.
Exit status: 0 all promises kept, 1 a promise was broken or no turn succeeded, 2 wrong usage."""


@dataclass(frozen=True, slots=True)
class Span:
    """A range of whole numbers, both ends included; written `16` or `16-64`."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str) -> Span:
        """Return the span written in `text`; raises `argparse.ArgumentTypeError`."""
        low, dash, high = text.partition("-")
        try:
            span = cls(int(low), int(high if dash else low))
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor a range like 16-64") from None
        if not 1 <= span.low <= span.high:
            raise argparse.ArgumentTypeError(f"{text!r} must rise and begin at 1 or more")
        return span

    def draw(self, randomness: random.Random) -> int:
        """Return one of its numbers, all equally likely."""
        return randomness.randint(self.low, self.high)

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}-{self.high}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """One load test."""

    url: str
    model: str | None = None  # None: the first one the server lists
    api_key: str | None = None
    history: History = "server"  # who keeps what was said
    rate: float | None = None  # new conversations a second (open loop); None: closed loop
    users: int = 8  # of the closed loop
    duration_seconds: float = 30.0
    max_turns: int | None = None
    conversation_turns: Span = Span(4, 4)
    think_seconds: float = 0.0  # mean, exponentially distributed
    prompt_words: Span = Span(8, 32)
    max_tokens: Span = Span(32, 32)
    temperature: float = 1.0
    ignore_eos: bool = False
    seed: int = 0
    warmup_seconds: float = 0.0
    timeout_seconds: float = 120.0
    grace_seconds: float = 30.0
    max_in_flight: int = 1024
    processes: int = 1  # that share the load
    delete: bool = False
    output: Path | None = None
    quiet: bool = False

    @property
    def loop(self) -> Literal["open", "closed"]:
        """Whether turns wait for the server (`closed`) or not (`open`)."""
        return "closed" if self.rate is None else "open"


def parse_options(arguments: Sequence[str] | None = None) -> Options:
    """Return the options on the command line; prints the usage and exits with 2 where they are wrong."""
    values = vars(_parser().parse_args(arguments))
    values["url"] = values["url"].rstrip("/").removesuffix("/v1")
    return Options(**values)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="loadtest",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_server(parser.add_argument_group("server"))
    _add_load(parser.add_argument_group("load"))
    _add_conversations(parser.add_argument_group("conversations"))
    _add_output(parser.add_argument_group("output"))
    return parser


def _add_server(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--url", default="http://127.0.0.1:8000", help="where the server is (default: %(default)s)")
    group.add_argument("--model", help="model to ask for (default: the first one the server lists)")
    group.add_argument("--api-key", metavar="KEY", help="sent as a bearer token")
    group.add_argument(
        "--timeout",
        dest="timeout_seconds",
        metavar="SECONDS",
        type=_positive,
        default=120.0,
        help="a turn that takes longer has failed (default: 120)",
    )


def _add_load(group: argparse._ArgumentGroup) -> None:
    loop = group.add_mutually_exclusive_group()
    loop.add_argument("--rate", metavar="R", type=_positive, help="open loop: R new conversations a second (Poisson)")
    loop.add_argument("--users", metavar="N", type=_count, default=8, help="closed loop: N users (default: 8)")
    group.add_argument(
        "--duration",
        dest="duration_seconds",
        metavar="SECONDS",
        type=_positive,
        default=30.0,
        help="no turn begins later than this (default: 30)",
    )
    group.add_argument("--turns", dest="max_turns", metavar="N", type=_count, help="begin at most N turns in all")
    group.add_argument(
        "--warmup",
        dest="warmup_seconds",
        metavar="SECONDS",
        type=_not_negative,
        default=0.0,
        help="leave turns meant to start before this out of the statistics (default: 0)",
    )
    group.add_argument(
        "--grace",
        dest="grace_seconds",
        metavar="SECONDS",
        type=_not_negative,
        default=30.0,
        help="let running turns finish this long after the end, then cut them off (default: 30)",
    )
    group.add_argument(
        "--max-in-flight",
        metavar="N",
        type=_count,
        default=1024,
        help="turns on the wire at once; more wait, and their waiting counts (default: 1024)",
    )
    group.add_argument(
        "--processes",
        metavar="N",
        type=_count,
        default=1,
        help="processes that share the load: one cannot read what a fast server sends to many users (default: 1)",
    )


def _add_conversations(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--history",
        choices=("server", "client"),
        default="server",
        help="server: send conversation_id and the new message only; client: resend everything said (default: server)",
    )
    group.add_argument(
        "--conversation-turns", metavar="N-M", type=Span.parse, default=Span(4, 4), help="turns of each (default: 4)"
    )
    group.add_argument(
        "--think-time",
        dest="think_seconds",
        metavar="SECONDS",
        type=_not_negative,
        default=0.0,
        help="mean pause between a reply and the next turn, exponentially distributed (default: 0)",
    )
    group.add_argument(
        "--prompt-words", metavar="N-M", type=Span.parse, default=Span(8, 32), help="words a user says (default: 8-32)"
    )
    group.add_argument(
        "--max-tokens", metavar="N-M", type=Span.parse, default=Span(32, 32), help="reply length limit (default: 32)"
    )
    group.add_argument("--temperature", type=_not_negative, default=1.0, help="0 is greedy (default: 1)")
    group.add_argument(
        "--ignore-eos", action="store_true", help="ask for replies of full length (an extension some servers have)"
    )
    group.add_argument("--seed", type=int, default=0, help="of arrivals, pauses, lengths and words (default: 0)")
    group.add_argument(
        "--delete", action="store_true", help="delete each conversation when it is over (server history only)"
    )


def _add_output(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--output", metavar="DIR", type=Path, help="write report.html, report.png, summary.json and turns.jsonl there"
    )
    group.add_argument("--quiet", action="store_true", help="no progress bar")


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return number


def _not_negative(text: str) -> float:
    if (number := _number(text)) < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return number


def _positive(text: str) -> float:
    if (number := _number(text)) <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)

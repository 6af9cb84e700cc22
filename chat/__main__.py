"""`python -m chat`: talk to a model in a terminal, or through a pipe, one line a turn."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys

from chat.api import Api, ApiError
from chat.screen import PROMPT, Screen
from chat.talk import Talk

START_ERROR = 1


def main() -> int:
    """Talk until there is nothing more to say; return the exit status."""
    arguments = _parser().parse_args()
    given = {"max_tokens": arguments.max_tokens, "temperature": arguments.temperature}
    options = {name: value for name, value in given.items() if value is not None}
    screen = Screen()
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # what is no text is not the end of the conversation
    is_interactive = sys.stdin.isatty()
    if is_interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # from now on input() has a history and can be edited
    with Api(arguments.url, arguments.api_key, arguments.model) as api:
        talk = Talk(api, screen, options)
        try:
            talk.join(arguments.conversation)
        except ApiError as error:
            screen.complain(str(error))
            return START_ERROR
        if is_interactive:
            screen.remark("(/help lists commands, Ctrl-D leaves)")
        _read_lines(talk, screen, PROMPT if is_interactive else "")
    return 0


def _read_lines(talk: Talk, screen: Screen, prompt: str) -> None:
    goes_on = True
    while goes_on:
        try:
            goes_on = talk.take(input(prompt))
        except EOFError:
            screen.end()
            return
        except KeyboardInterrupt:
            screen.remark("\n(Ctrl-D or /quit leaves)")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=sys.argv[0] if " " in sys.argv[0] else "chat",
        description="Talk to a Sostenuto server in a terminal. Conversations stay there: join one again by its id.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--url", default="http://127.0.0.1:8000", metavar="URL", help="the server (default: %(default)s)"
    )
    parser.add_argument("--conversation", metavar="ID", help="join this conversation, or begin it; default: a new one")
    parser.add_argument("--model", metavar="NAME", help="the model that must answer; default: whichever is served")
    parser.add_argument("--api-key", metavar="KEY", help="better set in the environment, as SOSTENUTO_API_KEY")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="longest answer; default: the server's")
    parser.add_argument("--temperature", type=float, metavar="X", help="default: the server's")
    return parser


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(START_ERROR)

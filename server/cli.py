"""The `sostenuto` command."""

from __future__ import annotations

import argparse
import json
import runpy
import sys
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from server.settings import DEFAULT_MODEL, Settings, SettingsError, api_key_in_environment
from server.version import server_version

USAGE_ERROR = 2
START_ERROR = 1
INTERRUPTED = 130

# Commands that are programs of their own: which module runs, and with which words before the given ones.
PROGRAMS = {
    "train": ("training", ["train"], "train a model, or go on from the newest checkpoint"),
    "tokenize": ("training", ["tokenize"], "make the vocabulary and the token tables of a training run"),
    "eval": ("training", ["eval"], "measure a model: LAMBADA, bits per byte, multiple choice, recall"),
    "export": ("training", ["export"], "write a training run's weights as a model to serve"),
    "chat": ("chat", [], "talk to a server in this terminal"),
    "loadtest": ("loadtest", [], "hold many conversations with a server and report how long it took"),
}

NO_DEFAULT_MODEL = f"""\
sostenuto: no MODEL given, and the bundled default model is not there yet ({DEFAULT_MODEL}).
Name one: sostenuto serve path/to/model.pth"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its status: 0, 1 if the server cannot start, 2 if it is asked wrongly."""
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments and arguments[0] in PROGRAMS:
        return _run_program(*arguments)
    given = vars(_parser().parse_args(arguments))
    command = given.pop("command")
    config, check_config = given.pop("config", None), given.pop("check_config", False)
    try:
        settings = Settings.load(given, config)
    except SettingsError as error:
        return _fail(f"sostenuto: {error}", USAGE_ERROR)
    if command == "doctor":
        return _examine(settings)
    if check_config:
        print(json.dumps(settings.printable(), indent=2))
        return 0
    if not settings.has_model:
        missing = NO_DEFAULT_MODEL if settings.model is None else f"sostenuto: no such model: {settings.model}"
        return _fail(missing, USAGE_ERROR)
    return _serve(settings)


def _run_program(command: str, *arguments: str) -> int:
    """Run a command that lives outside this package, in this process, as `python -m` would."""
    module, words, _ = PROGRAMS[command]
    if command == "chat" and (api_key := api_key_in_environment()) is not None:
        words = [*words, f"--api-key={api_key}"]  # only within this process: no list of processes shows it
    sys.argv = [f"sostenuto {command}", *words, *arguments]
    runpy.run_module(module, run_name="__main__")
    return 0


def _examine(settings: Settings) -> int:
    from server.doctor import Grade, examine

    worst = 0
    for finding in examine(settings):
        print(finding, flush=True)
        worst = max(worst, START_ERROR if finding.grade is Grade.PROBLEM else 0)
    return worst


def _serve(settings: Settings) -> int:
    # Imported late: --help, --version and a refused configuration need neither an engine nor a web framework.
    from engine.errors import EngineError
    from server.conversations.ledger import LedgerError
    from server.start import serve
    from server.templates import TemplateError

    try:
        return serve(settings)
    except KeyboardInterrupt:
        return INTERRUPTED
    except SettingsError as error:
        return _fail(f"sostenuto: {error}", USAGE_ERROR)
    except (EngineError, LedgerError, TemplateError, OSError) as error:
        return _fail(f"sostenuto: cannot start: {error}", START_ERROR)


def _fail(message: str, status: int) -> int:
    print(message, file=sys.stderr)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sostenuto", description="An async inference server with stateful conversations for RWKV language models."
    )
    parser.add_argument("--version", action="version", version=f"sostenuto {server_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    serve = commands.add_parser(
        "serve",
        help="serve a model over the OpenAI API",
        description="Serve a model over the OpenAI API. Every flag can also be set in the environment "
        "(SOSTENUTO_MAX_NUM_SEQS=8) or in a TOML file (max_num_seqs = 8); flags win over both.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    serve.add_argument("--config", type=Path, metavar="FILE", help="TOML file of settings")
    serve.add_argument("--check-config", action="store_true", help="print the effective configuration and exit")
    for name, field in Settings.model_fields.items():
        _add_flag(serve, name, field.annotation, str(field.description), field.get_default())
    doctor = commands.add_parser(
        "doctor",
        help="say whether this machine and its stores can keep what a server promises",
        description="Measure the stores and look at their settings. Takes the flags of serve; exits with 1 if a "
        "promise cannot be kept.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    doctor.add_argument("--config", type=Path, metavar="FILE", help="TOML file of settings")
    for name, field in Settings.model_fields.items():
        _add_flag(doctor, name, field.annotation, str(field.description), field.get_default())
    for name, (_, _, description) in PROGRAMS.items():
        commands.add_parser(name, help=description)
    return parser


def _add_flag(parser: argparse.ArgumentParser, name: str, annotation: object, description: str, default: Any) -> None:
    described = description if default is None or default is False else f"{description} (default: {default})"
    described = described.replace("%", "%%")
    if name == "model":
        parser.add_argument(name, nargs="?", metavar="MODEL", help=described)
    elif annotation is bool:
        parser.add_argument(_flag(name), action=argparse.BooleanOptionalAction, help=described)
    else:
        parser.add_argument(_flag(name), metavar=_metavar(annotation), help=described)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _metavar(annotation: object) -> str:
    if typing.get_origin(annotation) is types.UnionType:
        annotation = typing.get_args(annotation)[0]
    return {int: "N", float: "X", Path: "PATH"}.get(typing.cast("type", annotation), "VALUE")

"""An engine process: `python -m engine ENDPOINT`, with an `EngineConfig` as one line of JSON on standard input.

Standard input stays open as a lifeline: when it ends, the parent is gone and so is this process, at once. Until then
only the parent decides: signals that a terminal or a service manager sends to the whole group are ignored, so that the
parent can drain. Standard output carries one thing: why the engine could not start. Exit status: 0 its parent ended it,
1 the device failed, 2 it could not start.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path

import msgspec
import zmq

from engine.config import EngineConfig
from engine.errors import EngineError, ModelFileError, StoreUnavailable, TokenizerError
from engine.logs import configure_logging

_log = logging.getLogger(__name__)


def main(endpoint: str) -> int:
    """Run an engine at `endpoint` until the parent is gone; returns the exit status."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    answer = _take_standard_output()
    configure_logging()
    # What is loaded now stays, and the collector would look at all of it again and again.
    gc.disable()
    from engine.process import run_engine

    config = msgspec.json.decode(sys.stdin.buffer.readline(), type=EngineConfig)
    threading.Thread(target=_exit_with_parent, args=(endpoint,), name="lifeline", daemon=True).start()
    try:
        run_engine(config, zmq.Context.instance(), endpoint, threading.Event())
    except (ModelFileError, TokenizerError, StoreUnavailable, ValueError) as error:
        _log.error("the engine cannot start", extra={"reason": str(error)})
        os.write(answer, str(error).encode())
        return 2
    except EngineError:
        _log.exception("the engine gives up")
        return 1
    return 0


def _take_standard_output() -> int:
    """Return a descriptor of standard output, and send what anybody else prints there to standard error."""
    answer = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return answer


def _exit_with_parent(endpoint: str) -> None:
    """Wait for standard input to end, then leave without a word and without a trace."""
    # Unbuffered: a thread that sleeps inside sys.stdin would not let the interpreter end.
    while os.read(sys.stdin.fileno(), 4096):
        pass
    if endpoint.startswith("ipc://"):
        path = Path(endpoint.removeprefix("ipc://"))
        with suppress(OSError):
            path.unlink()
            path.parent.rmdir()
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

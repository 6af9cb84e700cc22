"""A person at a terminal: types, and reads until something stands there. Bounded by a deadline, not by a pace."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from types import TracebackType

from tests.conftest import ROOT

PATIENCE_SECONDS = 60.0


class Terminal:
    """`python -m chat` with `arguments`, on a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        self._ours, theirs = pty.openpty()
        self._shown = ""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "chat", *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            cwd=ROOT,
            start_new_session=True,
            preexec_fn=lambda: _make_controlling(theirs),
        )
        os.close(theirs)

    def type(self, text: str) -> None:
        """Press keys."""
        os.write(self._ours, text.encode())

    def expect(self, text: str) -> str:
        """Read on until `text` comes; returns what came before it, and what it came with."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while text not in self._shown:
            seconds = deadline - time.monotonic()
            ready, _, _ = select.select([self._ours], [], [], max(0.0, seconds))
            assert ready, f"{text!r} did not come:\n{self._shown}"
            self._shown += self._read()
        before, found, self._shown = self._shown.partition(text)
        return before + found

    def _read(self) -> str:
        try:
            piece = os.read(self._ours, 65_536)
        except OSError:  # Linux's way to say that nobody has the other end open
            piece = b""
        assert piece, f"it ended:\n{self._shown}"
        return piece.decode(errors="replace")

    def leave(self) -> int:
        """Press Ctrl-D and return the exit status."""
        self.type("\x04")
        return self.process.wait(PATIENCE_SECONDS)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._ours)


def _make_controlling(terminal: int) -> None:
    """Let Ctrl-C on `terminal` reach the new session's process, even if the tests themselves are deaf to it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)

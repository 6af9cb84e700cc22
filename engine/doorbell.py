"""Waking a thread that waits for sockets, from any other thread."""

from __future__ import annotations

import socket
from contextlib import suppress


class Doorbell:
    """Something to poll that becomes readable when it is rung, and stays so until it is answered."""

    def __init__(self) -> None:
        self._inside, self._outside = socket.socketpair()
        self._inside.setblocking(False)
        self._outside.setblocking(False)

    def fileno(self) -> int:
        """Return the descriptor to poll for reading."""
        return self._inside.fileno()

    def ring(self) -> None:
        """Wake whoever waits; any thread, any number of times, even after `close`."""
        # Full means it rings already; closed means nobody is left to hear it.
        with suppress(BlockingIOError, OSError):
            self._outside.send(b"\0")

    def answer(self) -> None:
        """Stop the ringing."""
        with suppress(BlockingIOError):
            while self._inside.recv(4096):
                pass

    def close(self) -> None:
        """Take the bell down."""
        self._inside.close()
        self._outside.close()

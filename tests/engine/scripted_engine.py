"""An engine that says what a test tells it to, on a real socket in a real thread: for testing the client alone."""

from __future__ import annotations

import threading
from collections.abc import Callable

import zmq

from engine import messages
from engine.messages import Command, EngineReady, Event, Hello

READY = EngineReady(
    fingerprint="f00d",
    generation="7",
    vocab_size=256,
    num_layers=1,
    width=64,
    num_parameters=1,
    state_bytes=1,
    device="cpu",
    dtype="float32",
    max_num_seqs=4,
    max_num_batched_tokens=16,
)

Answer = Callable[[Command], list[Event]]


class ScriptedEngine:
    """Answers every command but Hello with what `answer` returns; ends like a crash when `answer` raises."""

    def __init__(self, answer: Answer) -> None:
        self.commands: list[Command] = []
        self._answer = answer
        self._heard = threading.Condition()

    def __call__(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str, stop: threading.Event) -> None:
        """Serve one client until `stop` is set."""
        with context.socket(zmq.ROUTER) as socket:
            socket.linger = 0
            socket.bind(endpoint)
            while not stop.is_set():
                if socket.poll(20):
                    client, data = socket.recv_multipart()
                    for event in self._hear(messages.decode_command(data)):
                        socket.send_multipart([client, messages.encode(event)])

    def _hear(self, command: Command) -> list[Event]:
        with self._heard:
            self.commands.append(command)
            self._heard.notify_all()
        return [READY] if isinstance(command, Hello) else self._answer(command)

    def wait_for(self, kind: type[Command]) -> Command:
        """Return the first command of a kind, waiting for it (not on an event loop)."""
        with self._heard:
            assert self._heard.wait_for(lambda: any(isinstance(c, kind) for c in self.commands), timeout=10)
            return next(command for command in self.commands if isinstance(command, kind))

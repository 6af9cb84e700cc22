"""How many chunks a second one core of the server can send: `python -m tests.benchmarks.sse_bench`.

This process plays both ends: the engine, which makes a token for every stream as soon as the last ones have arrived,
and the clients, which only count. So the server is never waited for by anything it could hide behind, and what is
measured is its own CPU time, all its threads included. Tokens are such that each makes a chunk.

A second section asks whether the server keeps up: many streams, and an engine that makes its steps at a fixed rate or
all at once, and waits for nobody. A server that lags must put more tokens into a chunk.
"""

from __future__ import annotations

import argparse
import itertools
import json
import operator
import os
import random
import selectors
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import zmq

from engine import messages, tokenizer
from engine.messages import (
    EngineReady,
    EngineStats,
    FinishReason,
    Hello,
    ResumeKind,
    SequenceOutput,
    SequenceStarted,
    StepReport,
    StepStats,
    Submit,
)
from tests.conftest import ROOT
from tests.redis_server import free_port

VOCAB_SIZE = 65_536
START_SECONDS = 30.0
POLL_SECONDS = 0.0003
END_OF_EVENT = b"\n\n"
TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
READY = EngineReady(
    fingerprint="0" * 64, generation="7", vocab_size=VOCAB_SIZE, num_layers=12, width=768, num_parameters=191_034_624,
    state_bytes=2_433_024, device="none", dtype="none", max_num_seqs=1024, max_num_batched_tokens=1024,
)  # fmt: skip

CHAT = {"messages": [{"role": "user", "content": "x"}]}
COMPLETION = {"prompt": "x"}
PATHS = {"/v1/completions": COMPLETION, "/v1/chat/completions": CHAT}
BARE, PLAIN = "/bare", "/plain"  # what the same process does at best, and by the usual libraries: see `sse_server`


@dataclass(frozen=True, slots=True)
class Settings:
    """How much is measured."""

    num_streams: int = 64
    num_tokens: int = 600  # a stream and round
    rounds: int = 5
    tokens_at_once: int = 1  # that reach a stream before it is looked at again
    pressed_streams: int = 384
    steps_per_second: float = 160.0  # 61,440 tokens a second
    pressed_steps: int = 800


class PlayedEngineEnd:
    """The engine's end of the seam, played by hand."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str) -> None:
        self._socket = context.socket(zmq.ROUTER)
        self._socket.set(zmq.SNDHWM, 0)  # as the engine does: a full queue drops what comes
        self._socket.bind(endpoint)
        self._client = b""
        self._random = random.Random(0)
        self._num_steps = 0
        world = tokenizer.load("world", "", VOCAB_SIZE)
        ids = (i for i in range(1, VOCAB_SIZE) if not i & 3)
        self._token_ids = [i for i in ids if (text := _text(world, i)) and "\ufffd" not in text and text.strip()]

    def greet(self) -> None:
        """Wait for the server's hello and answer it."""
        self._client, data = self._socket.recv_multipart()
        assert isinstance(messages.decode_command(data), Hello)
        self._send(READY)

    def admit(self, count: int) -> list[str]:
        """Wait for `count` sequences, start them, and return their ids."""
        ids = []
        while len(ids) < count:
            command = messages.decode_command(self._socket.recv_multipart()[1])
            if isinstance(command, Submit):
                ids.append(command.request.request_id)
        started = [SequenceStarted(request_id=request_id, resume=ResumeKind.NEW) for request_id in ids]
        self._send(StepReport(events=[*started]))
        return ids

    def step(self, ids: list[str], *, is_last: bool = False) -> None:
        """Say one token for every sequence."""
        self.send(self.report(ids, is_last=is_last))

    def report(self, ids: list[str], *, is_last: bool = False) -> bytes:
        """Return a step's message with one token for every sequence."""
        self._num_steps += 1
        reason = FinishReason.LENGTH if is_last else None
        outputs = [
            SequenceOutput(
                request_id=request_id, token_ids=[self._random.choice(self._token_ids)], finish_reason=reason
            )
            for request_id in ids
        ]
        step = StepStats(step_seconds=0.001, num_decode_tokens=len(ids), num_prefill_tokens=0, num_sequences=len(ids))
        stats = EngineStats(
            num_steps=self._num_steps, num_running=len(ids), num_waiting=0, num_slots_used=len(ids), num_slots=1024,
            num_hot_states=0, hot_state_bytes=0, pending_checkpoints=0, counters=dict.fromkeys(COUNTERS, 0.0),
        )  # fmt: skip
        return messages.encode(StepReport(events=[*outputs], step=step, stats=stats))

    def send(self, data: bytes) -> None:
        """Send a message."""
        self._socket.send_multipart([self._client, data])

    def _send(self, event: messages.Event) -> None:
        self.send(messages.encode(event))

    def close(self) -> None:
        """Go away."""
        self._socket.close(linger=0)


COUNTERS = [f"rwkv_counter_{number}_total" for number in range(12)]


def _text(world: tokenizer.Tokenizer, token_id: int) -> str:
    return world.token_bytes(token_id).decode(errors="replace")


class Clients:
    """Streams that are counted, not understood."""

    def __init__(self, port: int, count: int, path: str, max_tokens: int, **fields: float) -> None:
        self.num_chunks = 0
        self._selector = selectors.DefaultSelector()
        self._begun: dict[int, bytes] = {}  # of an event that has not come to its end, by descriptor
        self._done: set[int] = set()  # descriptors of streams at their end
        asked = {**PATHS.get(path, {}), "max_tokens": max_tokens, "ignore_eos": True, "stream": True, **fields}
        body = json.dumps(asked).encode()
        target = path if path in PATHS else f"{path}?{max_tokens}"
        head = f"POST {target} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        head += f"content-length: {len(body)}\r\n\r\n"
        for _ in range(count):
            connection = socket.create_connection(("127.0.0.1", port))
            connection.sendall(head.encode() + body)
            connection.setblocking(False)
            self._selector.register(connection, selectors.EVENT_READ)

    def count_until(self, num_chunks: int, num_done: int = 0, poll_seconds: float = POLL_SECONDS) -> None:
        """Read until so many chunks with text have come, and so many streams are at their end.

        Looks at the sockets now and then instead of waiting for them: waking a reader is work of the writer's.
        """
        while self.num_chunks < num_chunks or self.num_done < num_done:
            time.sleep(poll_seconds)
            self.read()

    def read(self) -> None:
        """Count what has come."""
        for key, _ in self._selector.select(0):
            assert isinstance(key.fileobj, socket.socket)
            data = key.fileobj.recv(1 << 18)
            if not data:  # idle for longer than the server keeps a connection
                assert key.fd in self._done, "the server closed a stream before its end"
                self._selector.unregister(key.fileobj)
                key.fileobj.close()
            whole, end, self._begun[key.fd] = (self._begun.get(key.fd, b"") + data).rpartition(END_OF_EVENT)
            events = whole + end
            self.num_chunks += events.count(b'"text":"') + events.count(b'"content":"') - events.count(b'"role":')
            if b"data: [DONE]" in events:
                self._done.add(key.fd)

    @property
    def num_done(self) -> int:
        """How many streams are at their end."""
        return len(self._done)

    def close(self) -> None:
        """Leave."""
        for key in [*self._selector.get_map().values()]:
            assert isinstance(key.fileobj, socket.socket)
            key.fileobj.close()
        self._selector.close()


class SseBench:
    """A server, its played engine, and rounds of streams."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def run(self) -> dict[str, object]:
        """Return chunks per second of CPU time, by endpoint, as medians of interleaved rounds; and under pressure."""
        rates: dict[str, list[float]] = {path: [] for path in (BARE, PLAIN, *PATHS)}
        pressed: dict[str, list[Pressed]] = {"paced": [], "at_once": []}
        with tempfile.TemporaryDirectory(prefix="sostenuto-sse-") as name, zmq.Context[zmq.Socket[bytes]]() as context:
            engine = PlayedEngineEnd(context, endpoint := f"ipc://{name}/engine")
            with running_server(endpoint, Path(name)) as (pid, port):
                engine.greet()
                wait_for(port)
                for number, path in itertools.product(range(self.settings.rounds + 1), rates):
                    rate = self.round(engine, pid, port, path) if path in PATHS else self.alone(pid, port, path)
                    rates[path] += [rate] if number else []  # the first is not counted
                for name, outcomes in itertools.islice(itertools.cycle(pressed.items()), 2 * self.settings.rounds):
                    seconds_per_step = 1 / self.settings.steps_per_second if name == "paced" else 0.0
                    outcomes.append(self.press(engine, pid, port, seconds_per_step))
            engine.close()
        return {
            "sse_chunks_per_second": {path: round(statistics.median(values)) for path, values in rates.items()},
            "sse_over_bare": _ratios(rates, BARE),
            "sse_over_plain": _ratios(rates, PLAIN),
            "sse_under_pressure": {name: _median(outcomes) for name, outcomes in pressed.items() if outcomes},
        }

    def alone(self, pid: int, port: int, path: str) -> float:
        """Let streams that need no engine run to their end; returns chunks per CPU second."""
        count, num_tokens = self.settings.num_streams, self.settings.num_tokens
        began = cpu_seconds(pid)
        clients = Clients(port, count, path, num_tokens)
        clients.count_until(0, count)
        clients.close()
        return count * num_tokens / (cpu_seconds(pid) - began)

    def round(self, engine: PlayedEngineEnd, pid: int, port: int, path: str) -> float:
        """Run all streams from their begin to their end; returns chunks per CPU second of the middle."""
        count, num_tokens, at_once = self.settings.num_streams, self.settings.num_tokens, self.settings.tokens_at_once
        clients = Clients(port, count, path, num_tokens)
        try:
            ids = engine.admit(count)
            engine.step(ids)
            clients.count_until(count)
            began, had = cpu_seconds(pid), clients.num_chunks
            for _ in range(0, num_tokens - 2, at_once):
                for _ in range(at_once):
                    engine.step(ids)
                clients.count_until(clients.num_chunks + count)
            rate = (clients.num_chunks - had) / (cpu_seconds(pid) - began)
            engine.step(ids, is_last=True)
            clients.count_until(0, count)
        finally:
            clients.close()
        return rate

    def press(self, engine: PlayedEngineEnd, pid: int, port: int, seconds_per_step: float) -> Pressed:
        """Let the engine make its steps whether the server keeps up or not."""
        count, num_steps = self.settings.pressed_streams, self.settings.pressed_steps
        clients = Clients(port, count, "/v1/completions", num_steps + 1)
        try:
            ids = engine.admit(count)
            reports = [engine.report(ids) for _ in range(16)]  # made beforehand, and said again and again
            last = engine.report(ids, is_last=True)
            began, due = cpu_seconds(pid), time.monotonic()
            started_at = due
            for number in range(num_steps):
                engine.send(reports[number % len(reports)])
                due += seconds_per_step
                while time.monotonic() < due:
                    clients.read()
                    time.sleep(POLL_SECONDS)
            engine.send(last)
            told_at = time.monotonic()
            clients.count_until(0, count)
            ended_at = time.monotonic()
            num_tokens = count * (num_steps + 1)
            return Pressed(
                tokens_per_second=num_tokens / (ended_at - started_at),
                cpu_us_per_token=1e6 * (cpu_seconds(pid) - began) / num_tokens,
                tokens_per_chunk=num_tokens / clients.num_chunks,
                behind_seconds=ended_at - told_at,
            )
        finally:
            clients.close()


class Pressed(NamedTuple):
    """How a server did whose engine waits for nobody."""

    tokens_per_second: float
    cpu_us_per_token: float
    tokens_per_chunk: float
    behind_seconds: float  # from the engine's last word to the last client's


def _ratios(rates: dict[str, list[float]], to: str) -> dict[str, float]:
    return {path: round(statistics.median(map(operator.truediv, rates[path], rates[to])), 3) for path in PATHS}


def _median(outcomes: list[Pressed]) -> dict[str, float]:
    return {
        name: round(statistics.median(values), 3)
        for name, values in zip(Pressed._fields, zip(*outcomes, strict=True), strict=True)
    }


@contextmanager
def running_server(endpoint: str, directory: Path) -> Iterator[tuple[int, int]]:
    """Run `tests.benchmarks.sse_server` as a process; yields its process id and port."""
    port = free_port()
    command = [sys.executable, "-m", "tests.benchmarks.sse_server", endpoint, str(port), str(directory / "data")]
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        yield process.pid, port
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()


def wait_for(port: int) -> None:
    """Return when somebody listens at `port`."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except ConnectionRefusedError:
            assert time.monotonic() < deadline, "the server does not listen"
            time.sleep(0.05)
        else:
            return


def cpu_seconds(pid: int) -> float:
    """Return the CPU time, user and system, that all threads of a process have taken."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_SECOND


def main() -> None:
    """Measure and print; the last line is JSON."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.sse_bench", description=__doc__)
    parser.add_argument("--streams", type=int, default=Settings().num_streams)
    parser.add_argument("--tokens", type=int, default=Settings().num_tokens)
    parser.add_argument("--rounds", type=int, default=Settings().rounds)
    options = parser.parse_args()
    settings = Settings(options.streams, options.tokens, options.rounds)
    print(json.dumps(SseBench(settings).run()))


if __name__ == "__main__":
    main()

"""The real server as a process: started, stopped and killed as an operator would, reached over a loopback socket."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import httpx
import openai

from tests.conftest import ROOT
from tests.redis_server import free_port

START_SECONDS = 90.0


class ServerProcess:
    """`sostenuto serve` on a fixed loopback port, so that it can be killed and started again with the same data."""

    def __init__(self, model: Path, data_dir: Path, *options: str) -> None:
        self.model = model
        self.data_dir = data_dir
        self.options = options
        self.port = free_port()
        self.log_path = data_dir.with_suffix(".log")
        self.process: subprocess.Popen[bytes] | None = None
        # No certificates are loaded for a loopback address, and a killed server's connections are not used again.
        self.http = httpx.Client(
            base_url=self.url, timeout=60, verify=False, limits=httpx.Limits(max_keepalive_connections=0)
        )

    @property
    def url(self) -> str:
        """The root address."""
        return f"http://127.0.0.1:{self.port}"

    def client(self, *, strict: bool = False, max_retries: int = 0) -> openai.OpenAI:
        """Return the unmodified OpenAI client, pointed at this server."""
        return openai.OpenAI(
            base_url=f"{self.url}/v1",
            api_key="unused",
            max_retries=max_retries,
            timeout=60,
            _strict_response_validation=strict,
        )

    def start(self) -> None:
        """Start it and wait until it is healthy."""
        self.launch()
        assert self.process is not None
        try:
            self._wait(self.process, time.monotonic() + START_SECONDS)
        except BaseException:
            self.kill()  # or it takes time from every test that follows
            raise

    def launch(self) -> None:
        """Start it, without waiting."""
        command = [sys.executable, "-m", "server", "serve", str(self.model), "--port", str(self.port)]
        command += ["--data-dir", str(self.data_dir), "--served-model-name", "test", "--num-threads", "1"]
        command += self.options
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT)

    def _wait(self, process: subprocess.Popen[bytes], deadline: float) -> None:
        while not self.is_healthy():
            assert process.poll() is None, f"the server ended:\n{self.log_path.read_text()[-4000:]}"
            assert time.monotonic() < deadline, f"the server is not healthy:\n{self.log_path.read_text()[-4000:]}"
            time.sleep(0.05)

    def is_healthy(self) -> bool:
        """Say whether /health answers 200."""
        try:
            return self.http.get("/health", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    def kill(self) -> None:
        """End the server as a crash would; its engine process follows by itself."""
        self._end(signal.SIGKILL)

    def stop(self) -> int:
        """End it in order; returns its exit status."""
        return self._end(signal.SIGTERM)

    def pause(self) -> None:
        """Freeze the server process (not its engine)."""
        assert self.process is not None
        os.kill(self.process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on after `pause`."""
        assert self.process is not None
        os.kill(self.process.pid, signal.SIGCONT)

    def restart(self) -> None:
        """Kill it and start it again on the same data."""
        self.kill()
        self.start()

    def _end(self, number: int) -> int:
        assert self.process is not None
        if self.process.poll() is None:
            os.kill(self.process.pid, number)
        status = self.process.wait(timeout=60)
        self.process = None
        return status

    def __enter__(self) -> ServerProcess:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process is not None:
            self.kill()
        self.http.close()


def redis_options(url: str, lease_seconds: float = 2.0) -> Sequence[str]:
    """Return the options that keep ledger and states in one Redis, with a lease short enough for a test to outwait."""
    return ("--ledger-url", url, "--state-url", url, "--lease-seconds", str(lease_seconds))

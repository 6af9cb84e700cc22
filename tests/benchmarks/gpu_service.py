"""The whole service under load: a real server on loopback, users in processes of their own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx

USERS = (1, 32, 128, 384)
TURNS_A_USER = 4
USERS_A_PROCESS = 32  # whose streams a process can read as fast as they come
START_SECONDS = 300.0


def measure_service(
    model: Path,
    directory: Path,
    users: tuple[int, ...] = USERS,
    max_tokens: int = 256,
    load_seconds: int = 120,
    options: tuple[str, ...] = (),
) -> dict[str, object]:
    """Return for each number of users output tokens a second and latencies; each user has words of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "server", "serve", str(model), "--port", str(port)]
    command += ["--data-dir", str(directory / "data"), "--max-num-seqs", str(max(users))]
    command += ["--max-num-batched-tokens", "2048", *options]
    with (directory / "server.log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_until_ready(server, url, directory / "server.log")
            return {str(n): _load(url, n, directory / f"users-{n}", max_tokens, load_seconds) for n in users}
        finally:
            server.terminate()
            server.wait(timeout=60)


def _wait_until_ready(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            break
        try:
            if httpx.get(f"{url}/health").status_code == httpx.codes.OK:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise RuntimeError(f"the server did not start: {log.read_text()[-2000:]}")


def _load(url: str, num_users: int, output: Path, max_tokens: int, load_seconds: int) -> dict[str, object]:
    processes = min(-(-num_users // USERS_A_PROCESS), max(1, (os.cpu_count() or 1) - 2))  # two are the server's
    command = [sys.executable, "-m", "loadtest", "--url", url, "--users", str(num_users), "--quiet"]
    command += ["--processes", str(processes)]
    command += ["--turns", str(TURNS_A_USER * num_users), "--duration", str(load_seconds), "--history", "client"]
    command += ["--conversation-turns", "1", "--prompt-words", "48", "--max-tokens", str(max_tokens), "--ignore-eos"]
    subprocess.run([*command, "--output", str(output)], check=True)
    summary = json.loads((output / "summary.json").read_bytes())
    wanted = ("output_tokens_per_second", "failed_turns", "ttft_seconds", "inter_token_seconds", "timer_lag_seconds")
    return {name: summary[name] for name in wanted}

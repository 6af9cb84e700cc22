"""A real Prometheus for one test: our configuration and rules, faster, and a target of the test's own."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
import yaml

from tests.conftest import ROOT
from tests.redis_server import free_port

CONFIGURATION = ROOT / "deploy" / "prometheus" / "prometheus.yml"


class PrometheusServer:
    """A prometheus process on a free loopback port that scrapes `target` (host:port) in place of the real servers."""

    def __init__(self, directory: Path, target: str) -> None:
        self.directory = directory
        self.target = target
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None
        self._http = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", trust_env=False, timeout=20)

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Return the samples of an instant query; fails with Prometheus' own words."""
        answer = self._http.get("/api/v1/query", params={"query": expression})
        assert answer.status_code == 200, f"{expression}: {answer.text}"
        body = answer.json()
        assert not body.get("warnings"), f"{expression}: {body['warnings']}"
        result: list[dict[str, Any]] = body["data"]["result"]
        return result

    def rules(self) -> list[dict[str, Any]]:
        """Return every rule with its health."""
        groups = self._http.get("/api/v1/rules").json()["data"]["groups"]
        return [rule for group in groups for rule in group["rules"]]

    def wait_for_scrapes(self, number: int) -> None:
        """Return when the target was scraped `number` times and every rule evaluated since."""
        self._wait(lambda: self._scrapes() >= number)
        scraped = time.time()
        self._wait(lambda: all(_evaluated_after(rule, scraped) for rule in self.rules()))

    def _scrapes(self) -> float:
        samples = self.query('sum(sum_over_time(up{job="sostenuto"}[1h]))')
        return float(samples[0]["value"][1]) if samples else 0.0

    def _wait(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 30
        while not condition():
            assert self.process is not None
            assert self.process.poll() is None, self._log()
            assert time.monotonic() < deadline, self._log()
            time.sleep(0.2)

    def _answers(self) -> bool:
        try:
            return self._http.get("/-/ready").status_code == 200
        except httpx.TransportError:
            return False

    def _log(self) -> str:
        return (self.directory / "prometheus.log").read_text()

    def _write_configuration(self) -> Path:
        configuration = yaml.safe_load(CONFIGURATION.read_text())
        configuration["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
        configuration["rule_files"] = [str(CONFIGURATION.parent / name) for name in configuration["rule_files"]]
        jobs = [job for job in configuration["scrape_configs"] if job["job_name"] == "sostenuto"]
        jobs[0]["static_configs"] = [{"targets": [self.target]}]
        configuration["scrape_configs"] = jobs
        path = self.directory / "prometheus.yml"
        path.write_text(yaml.safe_dump(configuration))
        return path

    def __enter__(self) -> PrometheusServer:
        program = shutil.which("prometheus")
        assert program is not None, "prometheus is not on the PATH: run `make test`, which installs it"
        arguments = [
            f"--config.file={self._write_configuration()}",
            f"--storage.tsdb.path={self.directory / 'data'}",
            f"--web.listen-address=127.0.0.1:{self.port}",
        ]
        with (self.directory / "prometheus.log").open("wb") as log:
            self.process = subprocess.Popen([program, *arguments], stdout=log, stderr=log)
        self._wait(self._answers)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(timeout=20)


def _evaluated_after(rule: dict[str, Any], moment: float) -> bool:
    # RFC 3339 with nanoseconds: more digits than Python reads, so the fraction is left out.
    seconds = re.sub(r"\.\d+", "", rule["lastEvaluation"])
    return datetime.fromisoformat(seconds).timestamp() >= moment

"""The numbers a client sees over HTTP are the model's: published logits, and a float64 reference's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.server_process import ServerProcess

PROMPT = list(b'"in')  # the prompt of the published logits


def complete(server: ServerProcess, prompt_ids: list[int], **options: Any) -> dict[str, Any]:
    """Run one greedy completion and return its only choice."""
    body = {"model": "test", "prompt": prompt_ids, "max_tokens": 1, "temperature": 0, "return_token_ids": True}
    response = server.http.post("/v1/completions", json=body | options)
    assert response.status_code == 200, response.text
    choice: dict[str, Any] = response.json()["choices"][0]
    return choice


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return log-probabilities in float64."""
    logits = logits.astype(np.float64)
    return np.asarray(logits - np.logaddexp.reduce(logits))


def byte_of(key: str) -> int:
    """Return the byte a token key of the byte tokenizer stands for."""
    return int(key.removeprefix("bytes:\\x"), 16) if key.startswith("bytes:\\x") else ord(key)


def test_published_logits_arrive_over_http(shared_dir: Path, tmp_path: Path) -> None:
    """All 256 log-probabilities after the published prompt agree with the published logits within 2e-6."""
    expected = log_softmax(np.load(shared_dir / "models/tiny-rwkv-7v0.expected-logits.npy").reshape(-1))
    model = shared_dir / "models/tiny-rwkv-7v0.pth"
    options = ("--dtype", "float32", "--tokenizer", "bytes", "--max-logprobs", "256")
    with ServerProcess(model, tmp_path / "data", *options) as server:
        choice = complete(server, PROMPT, logprobs=256, echo=True)
    assert choice["token_ids"][:-1] == PROMPT or choice["token_ids"] == [int(expected.argmax())]
    top = {byte_of(key): value for key, value in choice["logprobs"]["top_logprobs"][-1].items()}
    assert len(top) == 256
    got = np.array([top[token_id] for token_id in range(256)])
    assert np.abs(got - expected).max() <= 2e-6


@pytest.fixture
def float32_server(tiny_model: Path, tmp_path: Path) -> Iterator[ServerProcess]:
    """The synthetic multi-head model, served in float32."""
    with ServerProcess(tiny_model, tmp_path / "data", "--dtype", "float32", "--max-logprobs", "256") as server:
        yield server


def test_a_multi_head_model_agrees_with_float64_over_http(float32_server: ServerProcess, tiny_model: Path) -> None:
    """Echoed prompt log-probabilities of a synthetic model with several heads agree with the float64 reference."""
    from tests.parity.float64_model import reference_logits

    prompt = [(7 * n * n + 3 * n) % 256 for n in range(300)]
    logits = reference_logits(tiny_model, prompt)
    choice = complete(float32_server, prompt, logprobs=5, echo=True)
    reported = choice["logprobs"]["token_logprobs"]
    assert reported[0] is None
    assert len(reported) == len(prompt) + 1
    expected = [log_softmax(logits[n - 1])[prompt[n]] for n in range(1, len(prompt))]
    assert np.abs(np.array(reported[1:-1]) - np.array(expected)).max() <= 2e-5
    assert choice["logprobs"]["top_logprobs"][-1][choice["logprobs"]["tokens"][-1]] == reported[-1]

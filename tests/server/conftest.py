"""Running servers for the HTTP tests: real processes, real sockets, a small real model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch

from engine.weights.synthetic import SyntheticShape, save_synthetic
from tests.server_process import ServerProcess

MODEL = "tiny"
OPTIONS = ("--served-model-name", MODEL, "--dtype", "float32", "--num-threads", "1")


@pytest.fixture(scope="session")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server with the byte vocabulary, shared by all tests that leave it as it was."""
    with ServerProcess(tiny_model, tmp_path_factory.mktemp("server") / "data", *OPTIONS) as process:
        yield process


@pytest.fixture(scope="session")
def world_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server with the World vocabulary, which has an end of text."""
    directory = tmp_path_factory.mktemp("world")
    shape = SyntheticShape(num_layers=1, width=32, vocab_size=65536)
    model = save_synthetic(directory / "world.safetensors", shape, dtype=torch.float32)
    with ServerProcess(model, directory / "data", *OPTIONS) as process:
        yield process


@pytest.fixture
def http(server: ServerProcess) -> Iterator[httpx.Client]:
    """A client of the shared server."""
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


@pytest.fixture
def world(world_server: ServerProcess) -> Iterator[httpx.Client]:
    """A client of the server with the World vocabulary."""
    with httpx.Client(base_url=world_server.url, timeout=60) as client:
        yield client

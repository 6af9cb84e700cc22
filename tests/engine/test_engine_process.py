"""A real engine process with a small real model: how it starts, dies, and comes back."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio

from engine.client import AsyncEngine
from engine.config import EngineConfig
from engine.errors import CheckpointMissing, EngineDied
from engine.launch import EngineProcess
from engine.messages import ResumeKind, SequenceOutput, SequenceStarted, StateSource
from tests.conftest import ROOT
from tests.engine.stub_engine import chain_of, request_of

PROMPT = list(b"Good morning.")
ENDLESS = 1_000_000  # tokens


shared_engine = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module")
def config(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    """A small engine that writes its states to files."""
    state_url = (tmp_path_factory.mktemp("engine") / "states").as_uri()
    return EngineConfig(model_path=str(tiny_model), max_num_seqs=4, num_threads=1, state_url=state_url)


@pytest.fixture(scope="module")
def host(config: EngineConfig) -> EngineProcess:
    """Where the engine runs."""
    return EngineProcess(config)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(host: EngineProcess) -> AsyncIterator[AsyncEngine]:
    """An engine in a process of its own, for all tests here: starting one takes seconds."""
    engine = AsyncEngine(host)
    await engine.start()
    yield engine
    await engine.close()


async def turn(
    engine: AsyncEngine, source: StateSource | None = None, request_id: str = "a"
) -> tuple[ResumeKind, list[int]]:
    """Run a turn; returns how it resumed and what it generated."""
    started: SequenceStarted | None = None
    token_ids: list[int] = []
    async for event in engine.generate(request_of(request_id, PROMPT, source=source, max_tokens=12)):
        if isinstance(event, SequenceStarted):
            started = event
        else:
            token_ids += event.token_ids
    assert started is not None
    return started.resume, token_ids


@shared_engine
async def test_hot_restored_and_replayed_turns_are_the_same(engine: AsyncEngine) -> None:
    """However the state was had, the next turn is the same, token for token."""
    _, first = await turn(engine)
    history = PROMPT + first
    chain, num_tokens = chain_of(history), len(history)
    stored = await engine.save_state(chain, num_tokens)
    hot = await turn(engine, StateSource(num_tokens=num_tokens, chain=chain))
    engine.forget_state(chain)
    restored = await turn(engine, StateSource(num_tokens=num_tokens, chain=chain, checkpoint=stored.ref))
    replayed = await turn(engine, StateSource(num_tokens=num_tokens, chain=chain, replay_ids=history))
    assert [kind for kind, _ in (hot, restored, replayed)] == ["hot", "restored", "replayed"]
    assert hot[1] == restored[1] == replayed[1]


@shared_engine
async def test_a_killed_engine_fails_what_runs_and_is_replaced(engine: AsyncEngine, host: EngineProcess) -> None:
    """SIGKILL in the middle of sequences: all raise at once, another process comes, and saved states go on."""
    _, first = await turn(engine)
    history = PROMPT + first
    stored = await engine.save_state(chain_of(history), len(history))
    source = StateSource(num_tokens=len(history), chain=chain_of(history), checkpoint=stored.ref)
    _, uninterrupted = await turn(engine, source)

    async def run_for_ever(number: int) -> None:
        async for event in engine.generate(request_of(f"endless-{number}", PROMPT, max_tokens=ENDLESS)):
            if isinstance(event, SequenceOutput) and event.token_ids:
                has_begun[number].set()

    has_begun = [asyncio.Event() for _ in range(3)]
    endless = [asyncio.create_task(run_for_ever(number)) for number in range(3)]
    for begun in has_begun:
        await begun.wait()
    first_pid = host.pid
    assert first_pid is not None
    os.kill(first_pid, signal.SIGKILL)
    assert [type(error) for error in await asyncio.gather(*endless, return_exceptions=True)] == [EngineDied] * 3
    while not engine.is_ready:  # noqa: ASYNC110 - what is tested is that it happens, without being told
        await asyncio.sleep(0.05)
    assert host.pid != first_pid
    with pytest.raises(CheckpointMissing):
        await engine.save_state(chain_of(history), len(history))
    assert await turn(engine, source) == (ResumeKind.RESTORED, uninterrupted)


@shared_engine
async def test_leaving_the_iterator_aborts_the_sequence(engine: AsyncEngine) -> None:
    """The slot is free as soon as the engine has heard of it, and the next sequence runs."""
    events = engine.generate(request_of("endless", PROMPT, max_tokens=ENDLESS))
    async for event in events:
        if isinstance(event, SequenceOutput) and event.token_ids:
            break
    await events.aclose()
    await turn(engine, request_id="next")
    while engine.latest_stats is None or engine.latest_stats.num_slots_used:  # noqa: ASYNC110 - reports come by themselves
        await asyncio.sleep(0.05)


@shared_engine
async def test_signals_meant_for_the_server_do_not_end_the_engine(engine: AsyncEngine, host: EngineProcess) -> None:
    """An interrupt or a polite end goes to the whole group; the server decides what becomes of its engine."""
    pid = host.pid
    assert pid is not None
    os.kill(pid, signal.SIGINT)
    os.kill(pid, signal.SIGTERM)
    _, token_ids = await turn(engine)
    assert len(token_ids) == 12
    assert host.pid == pid


async def test_a_model_that_cannot_be_loaded_is_named_at_the_start(tmp_path: Path) -> None:
    """The engine's own words reach whoever starts it."""
    (tmp_path / "broken.safetensors").write_bytes(b"not a model")
    engine = AsyncEngine.spawn(EngineConfig(model_path=str(tmp_path / "broken.safetensors")))
    with pytest.raises(EngineDied, match=r"broken\.safetensors"):
        await engine.start()
    await engine.close()


def start_by_hand(config: EngineConfig, endpoint: str) -> subprocess.Popen[bytes]:
    """Start an engine process, to do to it what no client does."""
    process = subprocess.Popen(
        [sys.executable, "-m", "engine", endpoint],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
    )
    assert process.stdin is not None
    process.stdin.write(msgspec.json.encode(config) + b"\n")
    process.stdin.flush()
    return process


def test_an_engine_without_a_parent_ends_and_leaves_no_socket(config: EngineConfig, tmp_path: Path) -> None:
    """The lifeline is cut: the process is gone at once, whatever it was doing."""
    directory = tmp_path / "socket"
    directory.mkdir(mode=0o700)
    process = start_by_hand(config, f"ipc://{directory}/engine")
    while not (directory / "engine").exists():
        assert process.poll() is None
    output, _ = process.communicate(timeout=60)
    assert (process.returncode, output) == (0, b"")
    assert not directory.exists()


def test_an_engine_logs_json_lines_and_keeps_standard_output_for_itself(tmp_path: Path) -> None:
    """What it says on standard error is for machines; why it could not start is alone on standard output."""
    process = start_by_hand(EngineConfig(model_path=str(tmp_path / "absent.pth")), f"ipc://{tmp_path}/engine")
    assert process.wait(timeout=60) == 2
    output, log = process.communicate()
    assert b"absent.pth" in output
    assert [json.loads(line)["level"] for line in log.splitlines()] == ["error"]


@pytest.mark.asyncio
async def test_a_launched_child_is_the_one_that_start_returns(config: EngineConfig) -> None:
    """Once: after it has ended, another is started; and one that nobody asked for ends with its host."""
    host = EngineProcess(config)
    await host.launch()
    launched = host.pid
    engine = AsyncEngine(host)
    await engine.start()
    assert host.pid == launched
    assert launched is not None
    os.kill(launched, signal.SIGKILL)
    while not (engine.restarts and engine.is_ready):  # noqa: ASYNC110 - as above
        await asyncio.sleep(0.05)
    assert host.pid not in (None, launched)
    await engine.close()
    await host.launch()
    await host.stop()
    assert host.pid is None

"""A whole engine on a stub runner: real sockets, real scheduler, real state store, no model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import zmq

from engine.config import EngineConfig
from engine.loop import EngineLoop
from engine.messages import (
    EngineReady,
    GenerationRequest,
    SamplingParams,
    StateSource,
    StopRules,
)
from engine.scheduler.output_gate import ByteVocabulary
from engine.state.memory_store import MemoryStore
from engine.state.store import StateStore
from engine.token_chain import extend_digest, root_digest
from tests.engine.stub_runner import STUB_SPEC, StubRunner
from tests.engine.stub_vocabulary import StubVocabulary

BYTES = StubVocabulary([bytes([byte]) for byte in range(256)])
ROOT = root_digest()

CONFIG = EngineConfig(model_path="", max_num_seqs=4, max_num_batched_tokens=16)

READY = EngineReady(
    fingerprint=STUB_SPEC.fingerprint,
    generation=STUB_SPEC.generation,
    vocab_size=256,
    num_layers=1,
    width=1,
    num_parameters=1,
    state_bytes=STUB_SPEC.num_bytes,
    device="none",
    dtype="none",
    max_num_seqs=CONFIG.max_num_seqs,
    max_num_batched_tokens=CONFIG.max_num_batched_tokens,
)


@dataclass
class StubEngine:
    """Makes engines on stub runners; the newest runner and the one store are there to be looked at."""

    config: EngineConfig = CONFIG
    store: StateStore = field(default_factory=MemoryStore)
    vocabulary: ByteVocabulary = BYTES
    make_runner: Callable[[], StubRunner] = StubRunner
    runners: list[StubRunner] = field(default_factory=list)

    @property
    def runner(self) -> StubRunner:
        """The runner of the newest engine."""
        return self.runners[-1]

    def make_loop(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str) -> EngineLoop:
        """Return an engine that listens at `endpoint`."""
        self.runners.append(self.make_runner())
        return EngineLoop(self.config, self.runner, self.vocabulary, self.store, READY, context, endpoint)

    def __call__(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str, stop: threading.Event) -> None:
        """Run an engine, as `AsyncEngine.in_process` wants it."""
        self.make_loop(context, endpoint).run(stop)


def chain_of(history: Sequence[int]) -> bytes:
    """Return the chain of a history."""
    return extend_digest(ROOT, history)


def request_of(
    request_id: str,
    prompt_ids: Sequence[int] = (1, 2, 3),
    *,
    source: StateSource | None = None,
    max_tokens: int = 4,
    keep_state: bool = True,
) -> GenerationRequest:
    """Return a request for a first turn, or for one that goes on from `source`."""
    return GenerationRequest(
        request_id=request_id,
        prompt_ids=list(prompt_ids),
        sampling=SamplingParams(seed=1),
        stop=StopRules(max_tokens=max_tokens),
        source=source or StateSource(num_tokens=0, chain=ROOT),
        keep_state=keep_state,
    )

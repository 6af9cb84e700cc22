"""A whole engine but its sockets, stepped by hand, and what came of each request."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from engine.config import EngineConfig
from engine.messages import (
    GenerationRequest,
    Grammar,
    SequenceFailed,
    SequenceStarted,
    StateSource,
    TokenLogprobs,
)
from engine.models.rwkv7 import RWKV7
from engine.pipeline import Pipeline
from engine.runner.grammars import GrammarMatcher
from engine.runner.model_runner import TorchModelRunner
from engine.scheduler.prefixes import Prefixes
from engine.scheduler.scheduler import Scheduler
from engine.state.checkpoint import encode_state
from engine.state.checkpointer import Checkpointer
from engine.state.hot_states import HotStates
from engine.state.prefix_store import PrefixStore
from engine.state.store import StateStore
from engine.token_chain import extend_digest, root_digest
from tests.engine.stub_vocabulary import StubVocabulary

VOCABULARY = StubVocabulary([bytes([byte]) for byte in range(131)])


def no_grammar(grammar: Grammar) -> Future[GrammarMatcher]:
    """Compile nothing: no request here has a grammar."""
    raise AssertionError(grammar)


@dataclass
class Run:
    """What came of one request."""

    request: GenerationRequest
    num_cached: int = 0
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    state: bytes = b""
    has_ended: bool = False

    @property
    def outcome(self) -> tuple[list[int], list[TokenLogprobs], bytes]:
        """Everything that must be equal, however the prompt was begun."""
        return self.token_ids, self.logprobs, self.state


class Engine:
    """A scheduler with a real model, real memory for states and a real store behind, stepped by hand."""

    def __init__(
        self,
        model: RWKV7,
        store: StateStore,
        budget: int = 32,
        hot_state_bytes: int = 1 << 30,
        make_runner: Callable[[RWKV7, int], TorchModelRunner] = TorchModelRunner,
    ) -> None:
        config = EngineConfig(
            model_path="",
            max_num_seqs=4,
            max_num_batched_tokens=budget,
            prefix_min_tokens=4,
            prefix_store_min_tokens=8,
            max_logprobs=131,
        )
        self.runner = make_runner(model, 9)
        self.hot_states = HotStates(hot_state_bytes)
        self.doorbell = threading.Semaphore(0)
        self.checkpointer = Checkpointer(store, self.runner.spec, 3600.0, self.doorbell.release)
        self.store = PrefixStore(self.checkpointer, self.hot_states, self.runner.spec, "cpu")
        self.prefixes = Prefixes(config, self.runner.spec.num_bytes, self.hot_states, self.store)
        self.scheduler = Scheduler(
            config, self.runner, VOCABULARY, self.hot_states, self.prefixes, self.checkpointer.fetch, no_grammar
        )
        self.pipeline = Pipeline(self.scheduler, self.runner)

    def close(self) -> None:
        """Let the store's threads end."""
        self.checkpointer.close()

    def run(self, *requests: GenerationRequest) -> list[Run]:
        """Run requests that arrive at once."""
        runs = {request.request_id: Run(request) for request in requests}
        for request in requests:
            self.scheduler.submit(b"client", request)
        while not all(run.has_ended for run in runs.values()) or self.scheduler.num_running:
            self.pipeline.launch()
            if not self.pipeline.num_in_flight and not self.scheduler.has_work:
                assert self.doorbell.acquire(timeout=20), "the store never answers"
            self.pipeline.read()
            for _, event in self.scheduler.take_events():
                assert not isinstance(event, SequenceFailed), event
                run = runs[event.request_id]
                if isinstance(event, SequenceStarted):
                    run.num_cached = event.num_cached_tokens
                else:
                    run.token_ids += event.token_ids
                    run.logprobs += event.logprobs or []
                    run.has_ended = event.finish_reason is not None
        for run in runs.values():
            run.state = self.final_state(run) if run.request.keep_state else b""
        return list(runs.values())

    def final_state(self, run: Run) -> bytes:
        """Return the state that a run left, as its checkpoint."""
        consumed = [*run.request.prompt_ids, *run.token_ids]
        state = self.hot_states.get(StateSource(num_tokens=len(consumed), chain=extend_digest(root_digest(), consumed)))
        assert state is not None
        return bytes(encode_state(state, self.runner.spec))

    def settle(self) -> None:
        """Wait until what is on its way to the store is there."""
        while self.store._writing:
            assert self.doorbell.acquire(timeout=20), "the store never answers"
            self.prefixes.advance()

"""From a configuration to an engine that runs."""

from __future__ import annotations

import functools
import threading

import zmq

from engine import garbage, tokenizer
from engine.config import EngineConfig
from engine.loop import EngineLoop
from engine.messages import EngineReady, InitialStateRef
from engine.runner.model_runner import TorchModelRunner, load_runner
from engine.state.initial_states import load_initial_states
from engine.state.open_store import open_store


def run_engine(
    config: EngineConfig, context: zmq.Context[zmq.Socket[bytes]], endpoint: str, stop: threading.Event
) -> None:
    """Load the model, open the state store, and serve clients at `endpoint` until `stop` is set.

    Raises `ModelFileError`, `TokenizerError`, `StoreUnavailable`, `ValueError` for settings that do not go together,
    and `EngineError` when the device is gone. With `functools.partial(run_engine, config)`, `AsyncEngine.in_process`
    runs it in a thread.
    """

    @functools.cache
    def load_tokenizer(vocab_size: int) -> tokenizer.Tokenizer:
        return tokenizer.load(config.tokenizer, config.model_path, vocab_size)

    runner = load_runner(config, lambda model: load_tokenizer(model.config.vocab_size).forbidden_ids)
    initial_states = load_initial_states(config.initial_states, runner.spec) if config.initial_states else {}
    loop = EngineLoop(
        config,
        runner,
        load_tokenizer(runner.vocab_size),
        open_store(config.state_url),
        describe(config, runner, tuple(initial_states)),
        context,
        endpoint,
        initial_states=initial_states,
    )
    garbage.settle()  # what was loaded stays
    loop.run(stop)


def describe(
    config: EngineConfig, runner: TorchModelRunner, initial_states: tuple[InitialStateRef, ...]
) -> EngineReady:
    """Return what clients are told of the engine."""
    model = runner.model
    return EngineReady(
        fingerprint=runner.spec.fingerprint,
        generation=runner.spec.generation,
        vocab_size=runner.vocab_size,
        num_layers=model.config.num_layers,
        width=model.config.width,
        num_parameters=model.config.num_parameters,
        state_bytes=runner.spec.num_bytes,
        device=str(model.device),
        dtype="int8" if model.is_int8 else str(model.dtype).removeprefix("torch."),
        state_dtype=config.state_dtype,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        initial_states=initial_states,
    )

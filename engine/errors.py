"""What can go wrong in the engine.

EngineError
├── ModelFileError           a weights file cannot be used; lists every problem it has
├── TokenizerError           a tokenizer cannot be loaded, or does not fit the model
├── InvalidRequest           a request names something impossible; carries the field
├── QueueFull                more sequences wait than the operator allows
├── StateUnavailable         the state a request starts from can't be had; the caller must replay its tokens
├── InitialStateUnavailable  the tuned state a history begins from is not here under its name; nothing can replace it
├── CheckpointError          the state store
│   ├── CheckpointMissing    no such checkpoint (expired, evicted, never written)
│   ├── CheckpointRejected   it is there, but is not what was asked for; never loaded, not even partly
│   └── StoreUnavailable     the store did not answer
├── NumericalError           a row of the batch became NaN or infinite; fails that row alone
├── EngineDraining           the engine takes no new work
└── EngineDied               the engine process is gone; every sequence it ran has failed
"""

from __future__ import annotations

from collections.abc import Sequence


class EngineError(Exception):
    """Base of everything the engine raises."""


class ModelFileError(EngineError):
    """A weights file cannot be used. `problems` names all of them at once."""

    def __init__(self, path: str, problems: Sequence[str]) -> None:
        self.path = path
        self.problems = tuple(problems)
        super().__init__("\n".join([f"cannot use model file {path}:", *(f"  - {problem}" for problem in problems)]))


class TokenizerError(EngineError):
    """A tokenizer cannot be loaded, or does not fit the model."""


class InvalidRequest(EngineError):
    """A request asks for something impossible. `field` names the part at fault, in the engine's own words."""

    def __init__(self, field: str, message: str) -> None:
        self.field = field
        super().__init__(message)


class QueueFull(EngineError):
    """More sequences wait than the operator allows."""


class StateUnavailable(EngineError):
    """The state a request starts from cannot be had. Submit again with the tokens to replay."""


class InitialStateUnavailable(EngineError):
    """The tuned state that a history begins from is not here, or its name has another content now."""


class CheckpointError(EngineError):
    """Base of what the state store raises."""


class CheckpointMissing(CheckpointError):
    """There is no such checkpoint: it expired, was evicted, or was never written. Costs time, never data."""


class CheckpointRejected(CheckpointError):
    """A checkpoint is not what was asked for. `reason` is a label: format, digest, fingerprint, layout, chain, ..."""

    def __init__(self, reason: str, message: str) -> None:
        self.reason = reason
        super().__init__(message)


class StoreUnavailable(CheckpointError):
    """The state store did not answer in time, or refused."""


class NumericalError(EngineError):
    """A row of the batch became NaN or infinite. Fails that row alone."""


class EngineDraining(EngineError):
    """The engine finishes what it runs and takes no new work."""


class EngineDied(EngineError):
    """The engine process is gone. Every sequence it ran has failed and none of them changed a conversation."""

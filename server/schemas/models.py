"""Bodies of `/v1/models`."""

from __future__ import annotations

import msgspec


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """A model: OpenAI's four fields, and what is worth knowing about a recurrent one."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "sostenuto"
    generation: str  # of the RWKV architecture
    num_parameters: int
    state_bytes: int  # of one conversation, however long
    vocab_size: int
    fingerprint: str
    dtype: str
    state_dtype: str


class InitialStateCard(msgspec.Struct, frozen=True, kw_only=True):
    """A tuned state that histories may begin from."""

    id: str
    object: str = "initial_state"
    fingerprint: str  # of its content


class InitialStateList(msgspec.Struct, frozen=True, kw_only=True):
    """All tuned states."""

    object: str = "list"
    data: list[InitialStateCard]


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    """All models."""

    object: str = "list"
    data: list[ModelCard]

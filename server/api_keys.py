"""The file of API keys: whose they are, and what each may use.

    [ada]                            # the tenant's name: letters, digits, - and _
    sha256 = ["9f86d0...", ...]      # of each key that is hers, in hex; several, so that keys can be changed
    requests_per_minute = 60         # limits of her own; what is absent is as the settings say
    tokens_per_minute = 100_000
    max_running = 4

`key = "..."` takes the key itself, or several. Better not: the file then is as secret as they are.
"""

from __future__ import annotations

import hashlib
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveInt,
    SecretStr,
    StringConstraints,
    ValidationError,
)

TENANT_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


class ApiKeyError(ValueError):
    """The file cannot be used; says which tenant's entry is wrong, never a key."""


@dataclass(frozen=True, slots=True)
class KeyHolder:
    """A tenant as the file describes it. `digests` are SHA-256, of each of its keys."""

    name: str
    digests: tuple[bytes, ...]
    limits: dict[str, int]


def digest_of(key: str) -> bytes:
    """Return what is kept of a key: keys are long and random, so one round of SHA-256 cannot be guessed back."""
    return hashlib.sha256(key.encode()).digest()


def read_api_keys(path: Path) -> list[KeyHolder]:
    """Return the tenants in the file at `path`; raises `ApiKeyError`, and `OSError` if it cannot be read."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ApiKeyError(f"not a TOML file: {error}") from error
    holders = [_holder(name, table) for name, table in tables.items()]
    if not holders:
        raise ApiKeyError("there is no key in it")
    digests = [digest for holder in holders for digest in holder.digests]
    if len(set(digests)) < len(digests):
        raise ApiKeyError("a key stands in it twice: whose it is would be anybody's guess")
    return holders


def _holder(name: str, table: object) -> KeyHolder:
    if TENANT_NAME.fullmatch(name) is None:
        raise ApiKeyError("a tenant's name must be 1 to 64 letters, digits, - and _")
    try:
        entry = _Entry.model_validate(table)
    except ValidationError as error:
        problem = error.errors(include_input=False, include_url=False)[0]
        raise ApiKeyError(f"{name}{''.join(f'.{step}' for step in problem['loc'])}: {problem['msg']}") from None
    digests = (
        *(bytes.fromhex(text) for text in entry.sha256),
        *(digest_of(key.get_secret_value()) for key in entry.key),
    )
    if not digests:
        raise ApiKeyError(f"{name}: has neither sha256 nor key")
    return KeyHolder(name, digests, entry.model_dump(include=LIMITS, exclude_none=True))


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _as_secrets(value: Any) -> Any:
    keys = _as_list(value)
    return [SecretStr(key) if isinstance(key, str) else key for key in keys] if isinstance(keys, list) else keys


class _Entry(BaseModel):
    """One tenant's table."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    sha256: Annotated[
        list[Annotated[str, StringConstraints(pattern=r"^[0-9a-fA-F]{64}$")]], BeforeValidator(_as_list)
    ] = []
    key: Annotated[list[Annotated[SecretStr, Field(min_length=1)]], BeforeValidator(_as_secrets)] = []
    requests_per_minute: PositiveInt | None = None
    tokens_per_minute: PositiveInt | None = None
    max_running: PositiveInt | None = None


LIMITS = {"requests_per_minute", "tokens_per_minute", "max_running"}

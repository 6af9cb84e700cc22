"""Whose request it is. A tenant is the holder of an API key; a server with one key, or none, has one tenant: "" ."""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass

from fastapi import Request

from server.api_keys import ApiKeyError, KeyHolder, digest_of, read_api_keys
from server.rate_limits import Budget, Limits
from server.settings import Settings


@dataclass(frozen=True, slots=True)
class Tenant:
    """Who asks, and what they have left."""

    name: str
    budget: Budget


class Tenants:
    """Everybody who may ask."""

    def __init__(self, keys: Sequence[tuple[bytes, Tenant]], everybody: Tenant | None) -> None:
        self._keys = keys
        self._everybody = everybody

    @classmethod
    def of(cls, settings: Settings) -> Tenants:
        """Return the tenants that the settings name; raises `ApiKeyError`, and `OSError` for an absent file."""
        limits = Limits(settings.requests_per_minute, settings.tokens_per_minute, settings.max_running)
        only = Tenant("", Budget(limits))
        keys: list[tuple[bytes, Tenant]] = []
        if settings.api_key is not None:
            keys.append((digest_of(settings.api_key.get_secret_value()), only))
        for holder in read_api_keys(settings.api_keys_file) if settings.api_keys_file is not None else ():
            keys += _keys_of(holder, limits)
        if len({digest for digest, _ in keys}) < len(keys):
            raise ApiKeyError("the server's own api_key stands in it, too: whose it is would be anybody's guess")
        return cls(keys, None if keys else only)

    def find(self, token: bytes) -> Tenant | None:
        """Return whose key `token` is.

        Digests have one length, and all are looked at: it takes the same time whatever was sent.
        """
        if self._everybody is not None:
            return self._everybody
        given = hashlib.sha256(token).digest()
        found = None
        for digest, tenant in self._keys:
            if hmac.compare_digest(given, digest):
                found = tenant
        return found


def _keys_of(holder: KeyHolder, defaults: Limits) -> list[tuple[bytes, Tenant]]:
    tenant = Tenant(holder.name, Budget(dataclasses.replace(defaults, **holder.limits)))
    return [(digest, tenant) for digest in holder.digests]


def tenant_of(request: Request) -> str:
    """Return the name of the tenant that asks."""
    tenant: Tenant = request.state.tenant
    return tenant.name


def budget_of(request: Request) -> Budget:
    """Return what the tenant that asks has left."""
    tenant: Tenant = request.state.tenant
    return tenant.budget

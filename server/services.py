"""What every endpoint works with: the pieces of one running server. `server.assembly` puts them together."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from fastapi import Depends, Request

from engine.client import AsyncEngine
from engine.messages import EngineReady
from engine.tokenizer import Tokenizer
from server.conversations.transfers import Transfers
from server.conversations.turns import Turns
from server.drain import Drain
from server.metrics import Metrics
from server.presence import Presence
from server.pulse import Pulse
from server.settings import Settings
from server.templates import Piece, Template
from server.tenants import Tenants

if TYPE_CHECKING:  # they work with services themselves
    from server.idempotency import Claims
    from server.responses.archive import Archive
    from server.runs import Runs
    from server.stored_chats import StoredChats

# Encoding takes about 100 ns a character; longer texts leave the event loop.
MAX_CHARS_ENCODED_ON_LOOP = 1 << 14


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The model as clients see it."""

    name: str
    created: int  # seconds since the epoch: when this server began to serve it
    engine: EngineReady

    @property
    def system_fingerprint(self) -> str:
        """Changes when the weights do."""
        return f"fp_{self.engine.fingerprint[:12]}"


@dataclass(frozen=True, slots=True)
class Services:
    """The pieces of one running server."""

    settings: Settings
    tenants: Tenants
    engine: AsyncEngine
    turns: Turns
    transfers: Transfers
    tokenizer: Tokenizer
    template: Template
    metrics: Metrics
    model: ServedModel
    drain: Drain
    presence: Presence
    archive: Archive
    claims: Claims
    stored_chats: StoredChats
    runs: Runs
    pulse: Pulse

    async def encode(self, text: str) -> list[int]:
        """Return the tokens of `text`; what looks like a special token in it is text like any other."""
        if len(text) <= MAX_CHARS_ENCODED_ON_LOOP:
            return self.tokenizer.encode(text)
        return await asyncio.to_thread(self.tokenizer.encode, text)

    async def encode_pieces(self, pieces: Sequence[Piece]) -> tuple[list[int], list[int]]:
        """Return what the function of this name returns; long texts are encoded off the event loop."""
        if sum(len(piece) for piece in pieces if isinstance(piece, str)) <= MAX_CHARS_ENCODED_ON_LOOP:
            return encode_pieces(self.tokenizer, pieces)
        return await asyncio.to_thread(encode_pieces, self.tokenizer, pieces)


def encode_pieces(tokenizer: Tokenizer, pieces: Sequence[Piece]) -> tuple[list[int], list[int]]:
    """Return the tokens of `pieces`, each encoded by itself, and where all of them but the last end.

    The ends are where a prompt's borders are: they ascend and lie inside the prompt: 0 < end < number of tokens.
    """
    token_ids: list[int] = []
    ends: set[int] = set()
    for piece in pieces:
        ends.add(len(token_ids))
        token_ids += tokenizer.encode(piece) if isinstance(piece, str) else piece
    return token_ids, sorted(ends - {0, len(token_ids)})


def services_of(request: Request) -> Services:
    """Return the services of the app that answers `request`."""
    services: Services = request.app.state.services
    return services


ServicesOf = Annotated[Services, Depends(services_of)]

"""What of a response can be found, by whom, before it is generated."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from engine.config import EngineConfig
from engine.launch import EngineThread
from server.app import create_app
from server.assembly import open_services
from server.conversations.sqlite_ledger import SqliteLedger
from server.generation import Generation
from server.presence import KIND as SERVER_KIND
from server.presence import Presence
from server.rate_limits import Budget, Limits
from server.responses.answering import Answering
from server.responses.archive import KIND, Archive
from server.schemas.responses import ResponseRequest
from server.services import Services
from server.settings import Settings
from server.templates import TemplateError
from tests.engine.stub_engine import StubEngine

BACKGROUND = {"input": "Hello.", "background": True, "max_output_tokens": 8000, "ignore_eos": True}


@pytest.fixture
async def services(tiny_model: Path, tmp_path: Path) -> AsyncIterator[Services]:
    """The pieces of a server on a stub engine, for a tenant that may run one request."""
    settings = Settings(
        model=str(tiny_model), data_dir=tmp_path / "data", tokenizer="bytes", template="world", max_running=1
    )
    config = EngineConfig(model_path="", max_num_seqs=4, max_num_batched_tokens=64)
    async with open_services(settings, EngineThread(StubEngine(config))) as services:
        yield services


async def test_what_is_queued_is_found_by_other_servers_as_queued(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They can tell that its server lives as soon as they can find it."""
    ledger = services.turns.ledger
    monkeypatch.setattr(ledger, "is_shared", True)
    answering = Answering(services, ResponseRequest.model_validate(BACKGROUND), "")
    await answering.announce("queued")
    another = Archive(ledger, Presence(ledger), ttl_seconds=60)
    stored = await another.find("", answering.draft.response_id)
    assert stored.response.status == "queued"


async def test_a_lone_server_gives_no_sign_of_life(services: Services) -> None:
    """Nobody could see it, and each would be a write to the disk."""
    async with services.presence.shown():
        assert await services.turns.ledger.documents(SERVER_KIND) == []


async def test_a_response_that_is_refused_cannot_be_found(services: Services) -> None:
    """Nobody knows its id, and nobody would ever delete it."""
    ledger = services.turns.ledger
    async with httpx.AsyncClient(transport=httpx.ASGITransport(create_app(services)), base_url="http://x") as http:
        taken = (await http.post("/v1/responses", json=BACKGROUND)).json()["id"]
        refused = await http.post("/v1/responses", json=BACKGROUND)
        assert refused.status_code == 429
        assert [document.document_id for document in await ledger.documents(KIND)] == [taken]
        await http.delete(f"/v1/responses/{taken}")
    assert await ledger.documents(KIND) == []


async def test_a_response_that_fails_can_be_found_all_the_while(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its log goes before its failure is noted: in between it is in progress, as it was."""
    seen: list[str] = []
    discard = services.turns.discard
    nothing = {"input": [{"role": "user", "content": " "}], "background": True}
    answering = Answering(services, ResponseRequest.model_validate(nothing), "")

    async def look() -> None:
        seen.append((await services.archive.find("", answering.draft.response_id)).response.status)

    async def discard_and_look(log_id: str) -> None:
        await discard(log_id)
        await look()

    monkeypatch.setattr(services.turns, "discard", discard_and_look)
    generation = Generation(services.drain, Budget(Limits()), answering.work)
    with pytest.raises(TemplateError):
        await generation.take()
    await look()
    assert seen == ["in_progress", "failed"]


async def test_what_ended_while_the_ledger_was_gone_is_not_waited_for(services: Services) -> None:
    """Its end could not be noted; it is found as failed all the same, and can be deleted."""
    ledger = services.turns.ledger
    assert isinstance(ledger, SqliteLedger)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(create_app(services)), base_url="http://x") as http:
        made = (await http.post("/v1/responses", json=BACKGROUND)).json()["id"]
        while (await http.get(f"/v1/responses/{made}")).json()["status"] == "queued":
            pass
        run = services.runs.find(made)
        assert run is not None
        ledger._failure = "unplugged"
        run.cancel()
        await run.wait()
        ledger._failure = None
        found = (await http.get(f"/v1/responses/{made}")).json()
        assert (found["status"], found["error"]["code"]) == ("failed", "store_unavailable")
        assert (await http.delete(f"/v1/responses/{made}")).status_code == 200
        assert (await http.get(f"/v1/responses/{made}")).status_code == 404

"""From settings to the pieces of a running server, and back: opened in order, closed in the reverse order."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from urllib.parse import urlsplit

from engine.client import AsyncEngine
from engine.launch import EngineHost, EngineProcess
from engine.messages import StepReport
from engine.state.open_store import open_store
from engine.state.store import StateStore
from engine.tokenizer import load as load_tokenizer
from server.conversations.ledger import Ledger, LedgerUnavailable
from server.conversations.open_ledger import open_ledger
from server.conversations.transfers import Transfers
from server.conversations.turns import ModelIdentity, Turns
from server.drain import Drain
from server.idempotency import Claims
from server.metrics import HttpMetrics, Metrics
from server.presence import Presence
from server.pulse import Pulse
from server.responses.archive import Archive
from server.runs import Runs
from server.services import ServedModel, Services
from server.settings import Settings, SettingsError
from server.stored_chats import StoredChats
from server.templates import BUILTIN as BUILTIN_TEMPLATES
from server.templates import choose as choose_template
from server.tenants import Tenants
from server.version import server_version

logger = logging.getLogger(__name__)

SWEEP_SECONDS = 600.0
LAG_PROBE_SECONDS = 1.0
# Checkpoints that are still being written when the server ends; what is not written by then is replayed.
SETTLE_SECONDS = 20.0


@asynccontextmanager
async def open_services(settings: Settings, host: EngineHost | None = None) -> AsyncGenerator[Services]:
    """Start everything a server needs, and end it at exit; raises what keeps it from starting.

    The engine runs in a process of its own, or in `host`.
    """
    metrics = Metrics(state_tier=urlsplit(settings.resolved_state_url).scheme)
    pulse = Pulse()

    def report(step: StepReport) -> None:
        pulse.report(step)
        metrics.engine.report(step)

    async with AsyncExitStack() as stack:
        tenants = Tenants.of(settings)
        settings.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        template = choose_template(settings.template, settings.model_path)
        ledger = _ledger(settings)
        await ledger.open()
        stack.push_async_callback(ledger.close)
        engine = AsyncEngine(host or EngineProcess(settings.engine_config), on_report=report)
        stack.push_async_callback(engine.close)
        ready = await engine.start()
        metrics.engine.up.set_function(lambda: engine.is_ready)
        metrics.engine.restarts.set_function(lambda: engine.restarts)
        metrics.engine.ready(ready, settings.model_name, server_version())
        tokenizer = load_tokenizer(settings.tokenizer, settings.model_path, ready.vocab_size)
        turns = Turns(
            ledger,
            engine,
            ModelIdentity(settings.model_name, ready.fingerprint, template.name, ready.initial_states),
            metrics.turns,
            lease_seconds=settings.lease_seconds,
            conversation_ttl_seconds=settings.conversation_ttl_seconds,
            max_checkpoints=settings.max_checkpoints,
        )
        store = _shared_store(settings, stack)
        drain = Drain()
        presence = Presence(ledger)
        stack.push_async_callback(_settle, turns, drain)
        await _in_background(stack, _sweep(turns))
        await _in_background(stack, _probe_loop(metrics.http))
        logger.info(
            "model loaded",
            extra={
                "model": settings.model_name,
                "device": ready.device,
                "dtype": ready.dtype,
                "state_dtype": ready.state_dtype,
            },
        )
        yield Services(
            settings=settings,
            tenants=tenants,
            engine=engine,
            turns=turns,
            transfers=Transfers(
                turns, store, vocab_size=ready.vocab_size, templates={template.name, *BUILTIN_TEMPLATES}
            ),
            tokenizer=tokenizer,
            template=template,
            metrics=metrics,
            model=ServedModel(settings.model_name, int(time.time()), ready),
            drain=drain,
            presence=presence,
            archive=Archive(ledger, presence, settings.conversation_ttl_seconds),
            claims=Claims(ledger, presence),
            stored_chats=StoredChats(ledger, settings.conversation_ttl_seconds),
            runs=Runs(drain, metrics.http),
            pulse=pulse,
        )


def _ledger(settings: Settings) -> Ledger:
    try:
        return open_ledger(settings.resolved_ledger_url)
    except ValueError as error:
        raise SettingsError([f"ledger_url: {error}"]) from error


def _shared_store(settings: Settings, stack: AsyncExitStack) -> StateStore | None:
    """Return the engine's state store, unless it lies in the engine's memory."""
    if settings.resolved_state_url == "memory:":
        return None
    try:
        store = open_store(settings.resolved_state_url)
    except ValueError as error:
        raise SettingsError([f"state_url: {error}"]) from error
    stack.callback(store.close)
    return store


async def _settle(turns: Turns, drain: Drain) -> None:
    """Let the checkpoints of committed turns reach the store."""
    if drain.is_forced:
        return
    try:
        await asyncio.wait_for(turns.settle(), SETTLE_SECONDS)
    except TimeoutError:
        logger.warning("checkpoints not written: these conversations will replay", extra={"seconds": SETTLE_SECONDS})


async def _in_background(stack: AsyncExitStack, work: Coroutine[None, None, None]) -> None:
    """Run `work` until the stack closes; its failure is raised there."""
    task = asyncio.create_task(work)

    async def end() -> None:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    stack.push_async_callback(end)


async def _sweep(turns: Turns) -> None:
    while True:
        try:
            await turns.sweep()
        except LedgerUnavailable:
            logger.warning("expired conversations not swept: the ledger does not answer")
        await asyncio.sleep(SWEEP_SECONDS)


async def _probe_loop(metrics: HttpMetrics) -> None:
    """Measure how late the event loop wakes a sleeper."""
    while True:
        before = time.perf_counter()
        await asyncio.sleep(LAG_PROBE_SECONDS)
        metrics.loop_lag_seconds.observe(max(0.0, time.perf_counter() - before - LAG_PROBE_SECONDS))

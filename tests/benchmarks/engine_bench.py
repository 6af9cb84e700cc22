"""Measurements of one engine process: throughput, time to first token, step by context, latency under load."""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import statistics
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from engine.client import AsyncEngine
from engine.config import EngineConfig
from engine.messages import (
    CheckpointRef,
    EngineReady,
    GenerationRequest,
    SamplingParams,
    SequenceOutput,
    StateSource,
    StopRules,
)
from engine.token_chain import extend_digest, root_digest

# What reading one set of contexts may take: where that is too long for the longest of them, it is left out.
READING_SECONDS = 40.0

VOCAB_SIZE = 65_529  # ids the World tokenizer has bytes for


@dataclass(frozen=True, slots=True)
class Settings:
    """How much is measured."""

    batch_sizes: tuple[int, ...] = (1, 4, 16, 64)
    decode_tokens: int = 32  # a sequence and round
    rounds: int = 3
    prefill_tokens: int = 512
    history_tokens: tuple[int, ...] = (1024, 4096, 16_384)
    contexts: tuple[int, ...] = (512, 8192, 32_768, 131_072)
    context_decode_tokens: int = 48
    streams: int = 8
    long_prompt_tokens: int = 2048
    step_budgets: tuple[int, ...] = (64, 256)

    @classmethod
    def quick(cls) -> Settings:
        """A run of about a minute."""
        return cls(
            decode_tokens=8, rounds=1, history_tokens=(256, 512), contexts=(64, 512), context_decode_tokens=8,
            long_prompt_tokens=256,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class KnownState:
    """A state the engine has been brought to, and how to get it back."""

    num_tokens: int
    chain: bytes
    checkpoint: CheckpointRef | None = None

    def source(self) -> StateSource:
        """Name it for a request."""
        return StateSource(num_tokens=self.num_tokens, chain=self.chain, checkpoint=self.checkpoint)


ZERO = KnownState(num_tokens=0, chain=root_digest())


class EngineBench:
    """Runs every section on engines of its own, one at a time."""

    def __init__(self, model: Path, directory: Path, num_threads: int, settings: Settings) -> None:
        self.settings = settings
        self.model = model
        self.directory = directory
        self.num_threads = num_threads
        self.random = random.Random(0)
        self.prefill_rate = math.inf  # tokens a second, once that is known

    def config(self, max_num_batched_tokens: int = 512) -> EngineConfig:
        """The engine under test: defaults, and states in files."""
        return EngineConfig(
            model_path=str(self.model),
            tokenizer="world",
            num_threads=self.num_threads,
            max_num_batched_tokens=max_num_batched_tokens,
            state_url=f"file://{self.directory}/states",
        )

    async def run(self) -> dict[str, object]:
        """Run every section; returns the JSON object."""
        engine, ready = await self.start(self.config())
        try:
            results: dict[str, object] = {
                "model": {"layers": ready.num_layers, "width": ready.width, "parameters": ready.num_parameters},
                "dtype": ready.dtype,
                "decode_tokens_per_second": await self.decode(engine),
                "prefill_tokens_per_second": await self.prefill(engine),
                "ttft_seconds": await self.time_to_first_token(engine),
                "step_seconds_by_context": await self.step_by_context(engine),
                "state_bytes": ready.state_bytes,
            }
        finally:
            await engine.close()
        results["inter_token_seconds"] = await self.inter_token()
        return results

    async def start(self, config: EngineConfig) -> tuple[AsyncEngine, EngineReady]:
        """Start an engine process and run one short sequence on it, so that nothing is measured cold."""
        engine = AsyncEngine.spawn(config)
        ready = await engine.start()
        await self.generate(engine, ZERO, self.tokens(16), max_tokens=4)
        return engine, ready

    def tokens(self, count: int) -> list[int]:
        """Return random token ids."""
        return [self.random.randrange(1, VOCAB_SIZE) for _ in range(count)]

    async def generate(
        self, engine: AsyncEngine, state: KnownState, prompt_ids: list[int], max_tokens: int, *, keep: bool = False
    ) -> tuple[list[float], list[int]]:
        """Run one greedy sequence; returns the arrival time of every token since submission, and the tokens."""
        request = GenerationRequest(
            request_id=uuid.uuid4().hex,
            prompt_ids=prompt_ids,
            sampling=SamplingParams(seed=0, temperature=0.0),
            stop=StopRules(max_tokens=max_tokens),
            source=state.source(),
            keep_state=keep,
        )
        started_at = time.perf_counter()
        arrivals: list[float] = []
        token_ids: list[int] = []
        async for event in engine.generate(request):
            if isinstance(event, SequenceOutput):
                arrivals += [time.perf_counter() - started_at] * len(event.token_ids)
                token_ids += event.token_ids
        return arrivals, token_ids

    async def decode(self, engine: AsyncEngine) -> dict[str, float]:
        """Tokens a second of B sequences that decode together, prompt excluded."""
        rates: dict[int, list[float]] = {size: [] for size in self.settings.batch_sizes}
        for size, _ in tqdm(self.interleaved(self.settings.batch_sizes), desc="decode"):
            rates[size].append(await self.decode_rate(engine, size))
        return {str(size): round(statistics.median(values), 1) for size, values in rates.items()}

    async def decode_rate(self, engine: AsyncEngine, batch_size: int) -> float:
        """Measure from the moment when every sequence has its first token until the first one ends."""
        sequences = [
            self.generate(engine, ZERO, self.tokens(4), max_tokens=self.settings.decode_tokens + 1)
            for _ in range(batch_size)
        ]
        arrivals = [times for times, _ in await asyncio.gather(*sequences)]
        begin, end = max(times[0] for times in arrivals), min(times[-1] for times in arrivals)
        count = sum(begin < moment <= end for times in arrivals for moment in times)
        return count / (end - begin)

    async def prefill(self, engine: AsyncEngine) -> dict[str, float]:
        """Prompt tokens a second of a lone prompt, up to its first sampled token."""
        count = self.settings.prefill_tokens
        rates = []
        for _ in tqdm(range(self.settings.rounds), desc="prefill"):
            arrivals, _ = await self.generate(engine, ZERO, self.tokens(count), max_tokens=1)
            rates.append(count / arrivals[0])
        self.prefill_rate = statistics.median(rates)
        return {str(count): round(self.prefill_rate, 1)}

    def affordable(self, counts: tuple[int, ...]) -> tuple[int, ...]:
        """Return the counts of tokens that this machine reads in time, two at least."""
        return counts[:2] + tuple(count for count in counts[2:] if count <= READING_SECONDS * self.prefill_rate)

    async def time_to_first_token(self, engine: AsyncEngine) -> dict[str, dict[str, float]]:
        """Time to the first token of a 16-token turn after a history: its state restored, or its tokens prefilled."""
        counts = self.affordable(self.settings.history_tokens)
        histories = {count: self.tokens(count) for count in counts}
        states = {count: await self.stored(engine, history) for count, history in histories.items()}
        restored: dict[int, list[float]] = {count: [] for count in counts}
        for count, _ in tqdm(self.interleaved(counts, rounds=3 * self.settings.rounds), desc="restored"):
            engine.forget_state(states[count].chain)
            arrivals, _ = await self.generate(engine, states[count], self.tokens(16), max_tokens=1)
            restored[count].append(arrivals[0])
        cold = {}
        for count, history in tqdm(histories.items(), desc="cold"):
            cold[str(count)] = (await self.generate(engine, ZERO, history + self.tokens(16), max_tokens=1))[0][0]
        return {
            "restored": {str(count): round(statistics.median(times), 5) for count, times in restored.items()},
            "cold": {count: round(seconds, 5) for count, seconds in cold.items()},
        }

    async def stored(self, engine: AsyncEngine, history: list[int]) -> KnownState:
        """Prefill a history and write its state to the state store."""
        await self.generate(engine, ZERO, history, max_tokens=0, keep=True)
        chain = extend_digest(root_digest(), history)
        stored = await engine.save_state(chain, len(history))
        return KnownState(num_tokens=len(history), chain=chain, checkpoint=stored.ref)

    async def step_by_context(self, engine: AsyncEngine) -> dict[str, float]:
        """Seconds a decode step takes after contexts of different lengths, interleaved."""
        contexts = self.affordable(self.settings.contexts)
        states = {}
        history: list[int] = []
        state = ZERO
        for count in tqdm(contexts, desc="contexts"):
            more = self.tokens(count - len(history))
            await self.generate(engine, state, more, max_tokens=0, keep=True)
            history += more
            state = KnownState(num_tokens=count, chain=extend_digest(state.chain, more))
            states[count] = state
        steps: dict[int, list[float]] = {count: [] for count in states}
        for count, _ in self.interleaved(contexts, rounds=2 * self.settings.rounds):
            tokens = self.settings.context_decode_tokens
            arrivals, _ = await self.generate(engine, states[count], self.tokens(1), max_tokens=tokens)
            steps[count] += [later - earlier for earlier, later in itertools.pairwise(arrivals)]
        return {str(count): round(statistics.median(values), 6) for count, values in steps.items()}

    async def inter_token(self) -> dict[str, dict[str, float]]:
        """Inter-token latency of running streams, alone and while a long prompt arrives, by step budget."""
        results = {}
        for budget in self.settings.step_budgets:
            engine, _ = await self.start(self.config(max_num_batched_tokens=budget))
            try:
                results[f"budget_{budget}"] = await self.disturbed(engine, budget)
            finally:
                await engine.close()
        return results

    async def disturbed(self, engine: AsyncEngine, budget: int) -> dict[str, float]:
        """Let streams run, send a long prompt into them, and compare their gaps with the time of one full step."""
        prompt_tokens = self.settings.long_prompt_tokens
        full_step = (await self.generate(engine, ZERO, self.tokens(budget), max_tokens=1))[0][0]
        steps_needed = prompt_tokens // (budget - self.settings.streams) + 1
        started_at = time.perf_counter()
        streams = [
            asyncio.create_task(self.generate(engine, ZERO, self.tokens(4), max_tokens=24 + 2 * steps_needed))
            for _ in range(self.settings.streams)
        ]
        await asyncio.sleep(20 * (await self.generate(engine, ZERO, self.tokens(2), max_tokens=2))[0][0] / 2)
        begin = time.perf_counter() - started_at
        await self.generate(engine, ZERO, self.tokens(prompt_tokens), max_tokens=1)
        end = time.perf_counter() - started_at
        gaps = [pair for stream in streams for pair in itertools.pairwise((await stream)[0])]
        during = [later - earlier for earlier, later in gaps if begin <= earlier and later <= end]
        alone = [later - earlier for earlier, later in gaps if later < begin or earlier > end]
        return {
            "alone_p50": round(statistics.median(alone), 5),
            "during_p50": round(statistics.median(during), 5),
            "during_max": round(max(during), 5),
            "full_step": round(full_step, 5),
            "max_over_full_step": round(max(during) / full_step, 2),
        }

    def interleaved(self, sizes: tuple[int, ...], rounds: int | None = None) -> list[tuple[int, int]]:
        """Return every size once a round."""
        return [(size, number) for number in range(rounds or self.settings.rounds) for size in sizes]

"""When each turn begins: the open and the closed loop, their limits, and an orderly end."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice

from loadtest.client import ChatClient, Message
from loadtest.options import Options
from loadtest.reply import TurnRecord
from loadtest.share import Share
from loadtest.workload import ConversationPlan, Workload

LAG_INTERVAL_SECONDS = 0.01
# A user whose turn failed waits before the next conversation: a server that refuses at once is not hammered.
FAILURE_PAUSE_SECONDS = 0.5


@dataclass(slots=True)
class LoadRun:
    """What a load test saw."""

    options: Options
    model: str
    elapsed_seconds: float = 0.0
    records: list[TurnRecord] = field(default_factory=list)  # in the order in which they ended
    lags: list[float] = field(default_factory=list)  # by how much this program's own timers were late
    num_conversations: int = 0
    in_flight: int = 0


class LoadGenerator:
    """Runs one load test, or a share of one, on the current event loop.

    `on_turn`, if given, hears of each turn as it ends. `stop()` ends the run early, as if its time were over.
    """

    def __init__(
        self,
        options: Options,
        on_turn: Callable[[LoadRun, TurnRecord], None] | None = None,
        share: Share | None = None,
    ) -> None:
        self._options = options
        self._share = share or Share()
        self._workload = Workload(options)
        self._on_turn = on_turn
        self._began: float | None = None
        self._stopped = asyncio.Event()
        self._turns_begun = 0
        self._connections = asyncio.Semaphore(options.max_in_flight)
        # Not from the seed: a second run must not go on with the conversations of the first.
        self._name = f"load-{secrets.token_hex(4)}"

    def clock(self) -> float:
        """Return the seconds since the run began; 0 before it has."""
        return 0.0 if self._began is None else time.perf_counter() - self._began

    def stop(self) -> None:
        """Begin no more turns."""
        self._stopped.set()

    async def run(self) -> LoadRun:
        """Run to the end and return what was seen; raises `ServerUnusable` before the first turn."""
        async with ChatClient(self._options, self.clock) as client:
            run = LoadRun(self._options, await client.find_model())
            self._began = time.perf_counter()
            lag_meter = asyncio.create_task(self._measure_lag(run))
            conversations = asyncio.create_task(self._converse_all(client, run))
            try:
                await self._until_over(conversations)
            finally:
                lag_meter.cancel()
                conversations.cancel()
                await asyncio.gather(lag_meter, conversations, return_exceptions=True)
            if not conversations.cancelled():
                conversations.result()
            run.elapsed_seconds = self.clock()
        return run

    async def _until_over(self, conversations: asyncio.Task[None]) -> None:
        """Return when the conversations are over, or the grace after the run's end is."""
        end = asyncio.create_task(self._end_of_run())
        await asyncio.wait((conversations, end), return_when=asyncio.FIRST_COMPLETED)
        end.cancel()
        self.stop()
        await asyncio.wait((conversations,), timeout=self._options.grace_seconds)

    async def _end_of_run(self) -> None:
        await self._sleep_until(self._options.duration_seconds)

    async def _converse_all(self, client: ChatClient, run: LoadRun) -> None:
        if self._options.rate is None:
            numbers = self._share.numbers()
            async with asyncio.TaskGroup() as users:
                for _ in range(self._options.users):
                    users.create_task(self._user(client, run, numbers))
            return
        async with asyncio.TaskGroup() as conversations:
            arrivals = enumerate(self._workload.arrivals(self._options.rate))
            for number, arrival in islice(arrivals, self._share.index, None, self._share.count):
                if not await self._sleep_until(arrival):
                    break
                plan = self._workload.conversation(number)
                conversations.create_task(self._converse(client, run, plan, arrival))

    async def _user(self, client: ChatClient, run: LoadRun, numbers: Iterator[int]) -> None:
        """One user of the closed loop: conversation after conversation."""
        start = self.clock()
        while not self._over():
            plan = self._workload.conversation(next(numbers))
            start = await self._converse(client, run, plan, start)

    async def _converse(self, client: ChatClient, run: LoadRun, plan: ConversationPlan, start: float) -> float:
        """Hold one conversation whose first turn is meant to begin at `start`; return when the next may begin."""
        server_keeps = self._options.history == "server"
        name = f"{self._name}-{plan.number}" if server_keeps else None
        history: list[Message] = []
        version = 0
        for idx, turn in enumerate(plan.turns):
            start += turn.think_seconds
            if not (await self._sleep_until(start) and self._may_begin(run, start, first=idx == 0)):
                break
            history.append({"role": "user", "content": turn.prompt})
            record = TurnRecord(plan.number, idx + 1, start)
            messages = history[-1:] if server_keeps else history
            previous_version = version if server_keeps else None
            try:
                async with self._connections:
                    run.in_flight += 1
                    try:
                        text = await client.turn(
                            record, turn, messages=messages, conversation_id=name, previous_version=previous_version
                        )
                    finally:
                        run.in_flight -= 1
            finally:
                self._note(run, record)
            start = record.end
            if record.error is not None:
                start += FAILURE_PAUSE_SECONDS
                break
            history.append({"role": "assistant", "content": text})
            version = record.version or version + 1
        if name is not None and self._options.delete:
            await client.delete(name)
        return start

    def _note(self, run: LoadRun, record: TurnRecord) -> None:
        if record.error is None and record.end == 0.0:  # cut off while it waited for a connection
            record.error, record.end = "unfinished", self.clock()
        run.records.append(record)
        if self._on_turn is not None:
            self._on_turn(run, record)

    def _may_begin(self, run: LoadRun, start: float, *, first: bool) -> bool:
        # Timers that are due together run in any order: the start itself decides, not who of them woke first.
        if self._over() or start > self._options.duration_seconds:
            return False
        self._turns_begun += 1
        run.num_conversations += first
        if self._turns_begun == self._options.max_turns:
            self.stop()
        return True

    def _over(self) -> bool:
        return self._stopped.is_set()

    async def _sleep_until(self, when: float) -> bool:
        """Sleep until `when` on the run's clock; return False at once where the run is over before."""
        delay = when - self.clock()
        if delay <= 0:
            # Users without a pause must not keep the loop to themselves.
            await asyncio.sleep(0)
            return not self._over()
        try:
            async with asyncio.timeout(delay):
                await self._stopped.wait()
        except TimeoutError:
            return True
        return False

    async def _measure_lag(self, run: LoadRun) -> None:
        while True:
            due = self.clock() + LAG_INTERVAL_SECONDS
            await asyncio.sleep(LAG_INTERVAL_SECONDS)
            run.lags.append(max(0.0, self.clock() - due))

"""Decode steps, sampling included, as captured graphs: one for each batch size of a ladder, in one pool of memory.

A graph reads its rows from one table on the device and leaves the sampled tokens there, where the next step may take
them before the host has read them. Rows that only fill up a graph have slot -1, which no operator touches. The graphs
themselves are behind `Graphs`, so that all the rest is tested without a card; the capture has not run on one yet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from engine.messages import SamplingParams
from engine.models.config import ModelConfig
from engine.models.rwkv7 import RWKV7
from engine.runner.input_batch import InputBatch
from engine.runner.sampler import uniform
from engine.state.pool import StatePool

BUCKETS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)

PADDING_SLOT = -1

# What a step must know of each row, one field after the other in one piece of memory: one copy a step.
_FIELDS = {
    "token_ids": torch.int64,
    "sources": torch.int64,  # the row of the last step whose sampled token this row consumes, -1: `token_ids`
    "slots": torch.int64,
    "top_p": torch.float64,
    "uniform": torch.float64,
    "temperature": torch.float32,
    "min_p": torch.float32,
    "top_k": torch.int32,
}
_FIELD_BYTES = 8  # of each row in each field, for all to be aligned


@dataclass(frozen=True, slots=True)
class DecodeRow:
    """One sequence of a decode step: what it consumes, and how its next token is chosen."""

    slot: int
    sampling: SamplingParams
    position: int  # of the sampled token; with the seed, it keys the random number
    token_id: int = 0
    source: int | None = None  # consume what this row of the last launch sampled, not `token_id`


class RowTable:
    """The fields of up to `num_rows` rows, side by side."""

    def __init__(self, num_rows: int, device: torch.device, is_pinned: bool = False) -> None:
        self.data = torch.zeros(len(_FIELDS), num_rows * _FIELD_BYTES, dtype=torch.uint8, device=device)
        if is_pinned:
            self.data = self.data.pin_memory()
        self._fields = {name: self.data[i].view(dtype)[:num_rows] for i, (name, dtype) in enumerate(_FIELDS.items())}

    def first(self, num_rows: int) -> dict[str, torch.Tensor]:
        """Return the first rows of every field, by name."""
        return {name: field[:num_rows] for name, field in self._fields.items()}

    def fill(self, rows: Sequence[DecodeRow], bucket: int) -> None:
        """Write `rows`, and padding up to `bucket`."""
        padding = bucket - len(rows)
        columns: dict[str, list[int] | list[float]] = {
            "token_ids": [row.token_id for row in rows] + [0] * padding,
            "sources": [-1 if row.source is None else row.source for row in rows] + [-1] * padding,
            "slots": [row.slot for row in rows] + [PADDING_SLOT] * padding,
            "top_p": [row.sampling.top_p for row in rows] + [1.0] * padding,
            "uniform": [uniform(row.sampling.seed, row.position) for row in rows] + [0.0] * padding,
            "temperature": [row.sampling.temperature for row in rows] + [0.0] * padding,
            "min_p": [row.sampling.min_p for row in rows] + [0.0] * padding,
            "top_k": [row.sampling.top_k for row in rows] + [0] * padding,
        }
        for name, field in self.first(bucket).items():
            field.copy_(torch.tensor(columns[name], dtype=field.dtype))


# Runs one step for the rows of a table (by field), given what the last one sampled; returns sampled ids, -1 for broken.
DecodeStep = Callable[[dict[str, torch.Tensor], torch.Tensor], torch.Tensor]


class Graphs(Protocol):
    """What records work of the device, and says when it is done."""

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """Return a function that does again, on the device alone, what `run` asks of it."""
        ...

    def mark(self) -> Callable[[], None]:
        """Return a function that waits until all that has been asked of the device so far is done."""
        ...


class CudaGraphs:
    """Implements `Graphs` with CUDA graphs that share one pool: they never run at the same time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """Run once to compile and to settle the allocator, then capture."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            run()
        return graph.replay

    def mark(self) -> Callable[[], None]:
        """Wait for an event."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return event.synchronize


class Launch:
    """A step that was asked for."""

    def __init__(self, sampled: torch.Tensor, wait: Callable[[], None]) -> None:
        self._sampled = sampled
        self._wait = wait
        self._token_ids: list[int] | None = None

    def token_ids(self) -> list[int]:
        """Wait for the step, and return what each row sampled; -1 where its logits are no distribution."""
        if self._token_ids is None:
            self._wait()
            self._token_ids = self._sampled.tolist()
        return self._token_ids


class DecodeGraphs:
    """Decode steps of up to `max_rows` rows. Belongs to the engine's one thread.

    Two steps may be in flight: tables and results on the host are two, used in turn.
    """

    def __init__(self, step: DecodeStep, max_rows: int, device: torch.device, graphs: Graphs) -> None:
        self.buckets = buckets_for(max_rows)
        self._graphs = graphs
        most, is_pinned = self.buckets[-1], device.type == "cuda"
        self._table = RowTable(most, device)
        self._host_tables = [RowTable(most, torch.device("cpu"), is_pinned) for _ in range(2)]
        self._sampled = torch.zeros(most, dtype=torch.int64, device=device)
        results = [torch.zeros(most, dtype=torch.int64) for _ in range(2)]
        self._results = [result.pin_memory() if is_pinned else result for result in results]
        self._in_flight: list[Launch | None] = [None, None]
        self._num_launches = 0
        self._clear()
        # Largest first: what the smaller ones need then fits into what is there.
        self._replays = {bucket: self._record(step, bucket) for bucket in reversed(self.buckets)}

    @property
    def max_rows(self) -> int:
        """As many rows as the largest graph has."""
        return self.buckets[-1]

    def launch(self, rows: Sequence[DecodeRow]) -> Launch:
        """Ask the device for a step of `rows`, distinct slots; does not wait for it, nor for the last one."""
        turn = self._num_launches % 2
        if (before := self._in_flight[turn]) is not None:
            before.token_ids()  # its table and its result are about to be written over
        bucket = bucket_of(len(rows), self.buckets)
        self._host_tables[turn].fill(rows, bucket)
        self._table.data.copy_(self._host_tables[turn].data, non_blocking=True)
        self._replays[bucket]()
        result = self._results[turn][: len(rows)]
        result.copy_(self._sampled[: len(rows)], non_blocking=True)
        launch = Launch(result, self._graphs.mark())
        self._in_flight[turn] = launch
        self._num_launches += 1
        return launch

    def _clear(self) -> None:
        """Let the table hold nothing but padding, so that recording touches no state."""
        self._host_tables[0].fill([], self.max_rows)
        self._table.data.copy_(self._host_tables[0].data)

    def _record(self, step: DecodeStep, bucket: int) -> Callable[[], None]:
        fields = self._table.first(bucket)

        def run() -> None:
            self._sampled[:bucket].copy_(step(fields, self._sampled))

        return self._graphs.record(run)


def buckets_for(max_rows: int) -> tuple[int, ...]:
    """Return the batch sizes to record so that `max_rows` fit, or as many as the ladder has."""
    if max_rows < 1:
        raise ValueError(f"max_rows must be at least 1, not {max_rows}")
    needed = sum(bucket < max_rows for bucket in BUCKETS) + 1
    return BUCKETS[:needed]


def bucket_of(num_rows: int, buckets: Sequence[int]) -> int:
    """Return the smallest of the rising `buckets` that holds `num_rows`; raises `ValueError` where none does."""
    if num_rows < 1:
        raise ValueError("a step needs a row")
    for bucket in buckets:
        if bucket >= num_rows:
            return bucket
    raise ValueError(f"{num_rows} rows do not fit into {buckets[-1]}")


def consumed_ids(fields: dict[str, torch.Tensor], last_sampled: torch.Tensor) -> torch.Tensor:
    """Return what each row consumes. A source that sampled nothing counts as id 0: its own output says it is broken."""
    sources = fields["sources"]
    sampled = last_sampled.index_select(0, sources.clamp(min=0)).clamp_(min=0)
    return torch.where(sources >= 0, sampled, fields["token_ids"])


def can_record(config: ModelConfig) -> bool:
    """Say whether the Triton operators, who alone know padding rows, run all of such a model."""
    from kernels.triton import shift_mix, wkv7

    return config.head_size in wkv7.HEAD_SIZES and config.width <= shift_mix.MAX_WIDTH


def triton_step(model: RWKV7, pool: StatePool, forbidden_ids: torch.Tensor) -> DecodeStep:
    """Return the step on the Triton operators: the host reads nothing from the device and gives it no values."""
    from kernels.triton.sampling import SamplingRows, sample_rows

    rows_and_one = torch.arange(BUCKETS[-1] + 1, device=model.device)

    def step(fields: dict[str, torch.Tensor], last_sampled: torch.Tensor) -> torch.Tensor:
        num_rows = len(fields["slots"])
        batch = InputBatch(
            token_ids=consumed_ids(fields, last_sampled),
            slots=fields["slots"],
            starts=rows_and_one[: num_rows + 1],
            output_rows=rows_and_one[:num_rows],
        )
        logits = model.logits(model.forward(batch, pool))
        logits.index_fill_(1, forbidden_ids, -torch.inf)
        parameters = (fields[name] for name in ("temperature", "top_k", "top_p", "min_p", "uniform"))
        return sample_rows(logits, SamplingRows(*parameters))

    return step

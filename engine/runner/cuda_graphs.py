"""Decode steps, sampling included, as captured graphs: one for each batch size of a ladder, in one pool of memory.

A graph reads its rows from one table on the device and leaves the sampled tokens there, where the next step may take
them before the host has read them. Rows that only fill up a graph have slot -1, which no operator touches; a row that
follows one which sampled a stop token becomes such a row on the device itself, so its state has consumed nothing more
than the host would have let it. The graphs themselves are behind `Graphs`, so that all the rest is tested without a
card; the capture has not run on one yet.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from engine.messages import SamplingParams
from engine.models.config import ModelConfig
from engine.models.rwkv7 import RWKV7
from engine.runner.input_batch import InputBatch
from engine.runner.sampler import hash_seeds, uniforms
from engine.state.pool import StatePool

BUCKETS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)

PADDING_SLOT = -1
NOTHING_SAMPLED = -1
MAX_STOP_IDS = 8  # of a row that is to be followed

# What a step must know of each row, widest types first: dtype, values a row, and what stands there in padding.
_FIELDS: dict[str, tuple[torch.dtype, int, float]] = {
    "token_ids": (torch.int64, 1, 0),
    "sources": (torch.int64, 1, -1),  # the row of the last step whose sampled token it consumes, -1: `token_ids`
    "slots": (torch.int64, 1, PADDING_SLOT),
    "top_p": (torch.float64, 1, 1),
    "uniform": (torch.float64, 1, 0),
    "temperature": (torch.float32, 1, 0),
    "min_p": (torch.float32, 1, 0),
    "top_k": (torch.int32, 1, 0),
    "stop_ids": (torch.int32, MAX_STOP_IDS, -1),  # sampled by the row's source, these end it there; -1: none
}

Rows = npt.NDArray[np.void]  # of `_ROW`

# What the host knows of each row: a step that follows another has the same rows, less those that end.
_ROW = np.dtype(
    [
        ("token_ids", np.int64),
        ("sources", np.int64),
        ("slots", np.int64),
        ("hashed_seeds", np.uint64),
        ("positions", np.uint64),
        ("top_p", np.float64),
        ("temperature", np.float32),
        ("min_p", np.float32),
        ("top_k", np.int32),
        ("stop_ids", np.int32, (MAX_STOP_IDS,)),
    ]
)


class DecodeRow(msgspec.Struct, frozen=True):
    """One sequence of a decode step: what it consumes, and how its next token is chosen."""

    slot: int
    sampling: SamplingParams
    position: int  # of the sampled token; with the seed, it keys the random number
    token_id: int = 0
    source: int | None = None  # consume what this row of the last launch sampled, not `token_id`
    stop_token_ids: tuple[int, ...] = ()  # at most `MAX_STOP_IDS` if the row is to be followed


class RowTable:
    """The fields of up to `num_rows` rows, side by side in one piece of memory: one copy a step."""

    def __init__(self, num_rows: int, device: torch.device, is_pinned: bool = False) -> None:
        sizes = [num_rows * width * dtype.itemsize for dtype, width, _ in _FIELDS.values()]
        self.data = torch.zeros(sum(sizes), dtype=torch.uint8, device=device)
        if is_pinned:
            self.data = self.data.pin_memory()
        self._fields: dict[str, torch.Tensor] = {}
        for (name, (dtype, width, _)), data in zip(_FIELDS.items(), torch.split(self.data, sizes), strict=True):
            field = data.view(dtype)
            self._fields[name] = field if width == 1 else field.view(num_rows, width)

    def first(self, num_rows: int) -> dict[str, torch.Tensor]:
        """Return the first rows of every field, by name."""
        return {name: field[:num_rows] for name, field in self._fields.items()}


class HostTable(RowTable):
    """A table in host memory, where rows are written."""

    def __init__(self, num_rows: int, is_pinned: bool) -> None:
        super().__init__(num_rows, torch.device("cpu"), is_pinned)
        self._arrays: dict[str, npt.NDArray[Any]] = {name: field.numpy() for name, field in self._fields.items()}

    def fill(self, rows: Rows, bucket: int) -> None:
        """Write `rows`, and padding up to `bucket`."""
        count = len(rows)
        for name, array in self._arrays.items():
            if name == "uniform":
                array[:count] = uniforms(rows["hashed_seeds"], rows["positions"])
            else:
                array[:count] = rows[name]
            array[count:bucket] = _FIELDS[name][2]


def rows_of(rows: Sequence[DecodeRow]) -> Rows:
    """Return `rows` as columns."""
    table: Rows = np.empty(len(rows), _ROW)
    params = [row.sampling for row in rows]
    table["token_ids"] = [row.token_id for row in rows]
    table["sources"] = [-1 if row.source is None else row.source for row in rows]
    table["slots"] = [row.slot for row in rows]
    table["hashed_seeds"] = hash_seeds(np.array([p.seed for p in params], np.uint64))
    table["positions"] = [row.position for row in rows]
    table["top_p"] = [p.top_p for p in params]
    table["temperature"] = [p.temperature for p in params]
    table["min_p"] = [p.min_p for p in params]
    table["top_k"] = [p.top_k for p in params]
    table["stop_ids"] = -1
    for i, row in enumerate(rows):
        if row.stop_token_ids:
            table["stop_ids"][i] = _padded(row.stop_token_ids)
    return table


@functools.lru_cache(maxsize=1024)
def _padded(stop_token_ids: tuple[int, ...]) -> npt.NDArray[np.int32]:
    """Return a row's stop ids; more than it can have are for a row that nobody follows."""
    ids = np.full(MAX_STOP_IDS, -1, np.int32)
    known = stop_token_ids[:MAX_STOP_IDS]
    ids[: len(known)] = known
    return ids


# Runs one step for the rows of a table (by field), given what the last one sampled; returns sampled ids, -1 for none.
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


class DecodeLaunch:
    """A step that was asked for."""

    def __init__(self, sampled: torch.Tensor, wait: Callable[[], None]) -> None:
        self._sampled = sampled
        self._wait = wait
        self._token_ids: list[int] | None = None

    def token_ids(self) -> list[int]:
        """Wait for the step, and return what each row sampled; -1 for padding and where logits are no distribution."""
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
        self._host_tables = [HostTable(most, is_pinned) for _ in range(2)]
        self._sampled = torch.zeros(most, dtype=torch.int64, device=device)
        results = [torch.zeros(most, dtype=torch.int64) for _ in range(2)]
        self._results = [result.pin_memory() if is_pinned else result for result in results]
        self._in_flight: list[DecodeLaunch | None] = [None, None]
        self._num_launches = 0
        self._rows = rows_of([])  # of the last launch
        self._clear()
        # Largest first: what the smaller ones need then fits into what is there.
        self._replays = {bucket: self._record(step, bucket) for bucket in reversed(self.buckets)}

    @property
    def max_rows(self) -> int:
        """As many rows as the largest graph has."""
        return self.buckets[-1]

    def launch(self, rows: Sequence[DecodeRow]) -> DecodeLaunch:
        """Ask the device for a step of `rows`, distinct slots; does not wait for it, nor for the last one."""
        return self._launch(rows_of(rows))

    def follow(self, rows: Sequence[int]) -> DecodeLaunch:
        """Ask for the step after the last one: these of its rows, each consuming what it samples there.

        A row that samples one of its stop ids there, or nothing, becomes padding. Costs the host little: what does not
        change of a row is not touched.
        """
        sources = np.array(rows, np.int64)
        following = self._rows[sources]
        following["sources"] = sources
        following["positions"] += np.uint64(1)
        return self._launch(following)

    def _launch(self, rows: Rows) -> DecodeLaunch:
        turn = self._num_launches % 2
        if (before := self._in_flight[turn]) is not None:
            before.token_ids()  # its table and its result are about to be written over
        bucket = bucket_of(len(rows), self.buckets)
        self._host_tables[turn].fill(rows, bucket)
        self._table.data.copy_(self._host_tables[turn].data, non_blocking=True)
        self._replays[bucket]()
        result = self._results[turn][: len(rows)]
        result.copy_(self._sampled[: len(rows)], non_blocking=True)
        launch = DecodeLaunch(result, self._graphs.mark())
        self._in_flight[turn] = launch
        self._num_launches += 1
        self._rows = rows
        return launch

    def _clear(self) -> None:
        """Let the table hold nothing but padding, so that recording touches no state."""
        self._host_tables[0].fill(self._rows, self.max_rows)
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


def consumed(fields: dict[str, torch.Tensor], last_sampled: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the token that each row consumes, and its slot: padding's where its source ended or sampled nothing."""
    sources = fields["sources"]
    follows = sources >= 0
    sampled = last_sampled.index_select(0, sources.clamp(min=0))
    has_ended = follows & ((sampled < 0) | (sampled[:, None] == fields["stop_ids"]).any(dim=1))
    token_ids = torch.where(follows, sampled.clamp(min=0), fields["token_ids"])
    return token_ids, fields["slots"].masked_fill(has_ended, PADDING_SLOT)


def can_record(config: ModelConfig) -> bool:
    """Say whether the Triton operators, who alone know padding rows, run all of such a model."""
    from kernels.triton import shift_mix, wkv7

    return config.head_size in wkv7.HEAD_SIZES and config.width <= shift_mix.MAX_WIDTH


def triton_step(model: RWKV7, pool: StatePool, forbidden_ids: torch.Tensor) -> DecodeStep:
    """Return the step on the Triton operators: the host reads nothing from the device and gives it no values."""
    from kernels.triton.sampling import SamplingRows, sample_rows

    rows_and_one = torch.arange(BUCKETS[-1] + 1, device=model.device)

    def step(fields: dict[str, torch.Tensor], last_sampled: torch.Tensor) -> torch.Tensor:
        token_ids, slots = consumed(fields, last_sampled)
        num_rows = len(slots)
        batch = InputBatch(
            token_ids=token_ids,
            slots=slots,
            starts=rows_and_one[: num_rows + 1],
            output_rows=rows_and_one[:num_rows],
        )
        logits = model.logits(model.forward(batch, pool))
        logits.index_fill_(1, forbidden_ids, -torch.inf)
        parameters = (fields[name] for name in ("temperature", "top_k", "top_p", "min_p", "uniform"))
        return sample_rows(logits, SamplingRows(*parameters)).masked_fill_(slots < 0, NOTHING_SAMPLED)

    return step

"""Steps, sampling included, as captured graphs: one for each size of a ladder, in one pool of memory.

There are sizes for steps that only decode, a token a row, and coarser ones, of tokens and rows, for *mixed* steps where
rows consume pieces of prompts beside others that decode. A graph reads its rows from one table on the device and leaves
the sampled tokens there, where the next step may take them before the host has read them, whatever the size of either.
Rows that only fill up a graph have slot -1, which no operator touches; a row that follows one which sampled a stop
token becomes such a row on the device itself, so its state has consumed nothing more than the host would have let it.
The graphs themselves are behind `Graphs`, so that all the rest is tested without a card; a server with mixed ones ran
on one, and nobody has compared their bits there.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, NamedTuple, Protocol

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
MIXED_TOKENS = (128, 256, 512, 768, 1024, 1536, 2048)
MIXED_ROWS = (16, 128)  # and as many as there can be

TOKENS_A_PROMPT = 32  # on average, at least: a mixed step of more, shorter prompts takes a larger graph

PADDING_SLOT = -1
MAX_STOP_IDS = 8  # of a row that is to be followed

# What a step must know, widest types first: dtype, values a row (or token), and what stands there in padding.
_FIELDS: dict[str, tuple[torch.dtype, int, float]] = {
    "token_ids": (torch.int64, 1, 0),  # of each token
    "sources": (torch.int64, 1, -1),  # the row of the last step whose sample that token is, -1: it is in `token_ids`
    "starts": (torch.int64, 1, 0),  # where the rows begin among the tokens, and the last one's end
    "slots": (torch.int64, 1, PADDING_SLOT),
    "top_p": (torch.float64, 1, 1),
    "uniform": (torch.float64, 1, 0),
    "temperature": (torch.float32, 1, 0),
    "min_p": (torch.float32, 1, 0),
    "top_k": (torch.int32, 1, 0),
    "stop_ids": (torch.int32, MAX_STOP_IDS, -1),  # sampled by the row's source, these end it there; -1: none
}
_OF_TOKENS = ("token_ids", "sources")

Rows = npt.NDArray[np.void]  # of `_ROW`

# What the host knows of each row: a step that follows another has the same rows, less those that end, and new ones.
_ROW = np.dtype(
    [
        ("num_tokens", np.int64),
        ("token_ids", np.int64),  # the last one's: none but a last one has a source
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
    """One sequence of a step: what it consumes, and how its next token is chosen."""

    slot: int
    sampling: SamplingParams
    position: int  # of the sampled token; with the seed, it keys the random number
    token_id: int = 0
    earlier_ids: Sequence[int] = ()  # consumed before `token_id`: then it is a piece of a prompt
    source: int | None = None  # consume what this row of the last launch sampled, not `token_id`
    stop_token_ids: tuple[int, ...] = ()  # at most `MAX_STOP_IDS` if the row is to be followed


class Size(NamedTuple):
    """How many tokens and rows a graph has; as many of both: it only decodes."""

    num_tokens: int
    num_rows: int

    @property
    def num_long(self) -> int:
        """How many rows may have several tokens: the kernels begin programs for as many, whether there are or not."""
        return 0 if self.num_tokens == self.num_rows else self.num_tokens // TOKENS_A_PROMPT

    def length(self, field: str) -> int:
        """Return how long a field of the table is."""
        if field in _OF_TOKENS:
            return self.num_tokens
        return self.num_rows + 1 if field == "starts" else self.num_rows


class RowTable:
    """The fields of steps up to a size, side by side in one piece of memory: one copy a step."""

    def __init__(self, most: Size, device: torch.device, is_pinned: bool = False) -> None:
        sizes = [most.length(name) * width * dtype.itemsize for name, (dtype, width, _) in _FIELDS.items()]
        self.data = torch.zeros(sum(sizes), dtype=torch.uint8, device=device)
        if is_pinned:
            self.data = self.data.pin_memory()
        self._fields: dict[str, torch.Tensor] = {}
        for (name, (dtype, width, _)), data in zip(_FIELDS.items(), torch.split(self.data, sizes), strict=True):
            field = data.view(dtype)
            self._fields[name] = field if width == 1 else field.view(-1, width)

    def first(self, size: Size) -> dict[str, torch.Tensor]:
        """Return the fields of a step of this size, by name."""
        return {name: field[: size.length(name)] for name, field in self._fields.items()}


class HostTable(RowTable):
    """A table in host memory, where rows are written."""

    def __init__(self, most: Size, is_pinned: bool) -> None:
        super().__init__(most, torch.device("cpu"), is_pinned)
        self._arrays: dict[str, npt.NDArray[Any]] = {name: field.numpy() for name, field in self._fields.items()}

    def fill(self, rows: Rows, earlier_ids: Sequence[int], size: Size) -> None:
        """Write `rows`, with what they consume before their last tokens, and padding up to `size`."""
        ends = np.cumsum(rows["num_tokens"])
        self._fill_tokens(rows, ends, earlier_ids, size.num_tokens)
        self._fill_starts(ends, size)
        count = len(rows)
        for name, array in self._arrays.items():
            if name in _OF_TOKENS or name == "starts":
                continue
            if name == "uniform":
                array[:count] = uniforms(rows["hashed_seeds"], rows["positions"])
            else:
                array[:count] = rows[name]
            array[count : size.num_rows] = _FIELDS[name][2]

    def _fill_tokens(self, rows: Rows, ends: npt.NDArray[np.int64], earlier_ids: Sequence[int], most: int) -> None:
        for name in _OF_TOKENS:
            array = self._arrays[name][:most]
            array[:] = _FIELDS[name][2]
            array[ends - 1] = rows[name]
        if earlier_ids:
            is_earlier = np.ones(len(rows) + len(earlier_ids), bool)
            is_earlier[ends - 1] = False
            self._arrays["token_ids"][: len(is_earlier)][is_earlier] = earlier_ids

    def _fill_starts(self, ends: npt.NDArray[np.int64], size: Size) -> None:
        """The first padding row has the tokens that are left; in a step that only decodes each has one."""
        starts, count = self._arrays["starts"], len(ends)
        starts[0] = 0
        starts[1 : count + 1] = ends
        if size.num_tokens == size.num_rows:
            starts[count + 1 : size.num_rows + 1] = np.arange(count + 1, size.num_rows + 1)
        else:
            starts[count + 1 : size.num_rows + 1] = size.num_tokens


def rows_of(rows: Sequence[DecodeRow]) -> Rows:
    """Return `rows` as columns."""
    table: Rows = np.empty(len(rows), _ROW)
    params = [row.sampling for row in rows]
    table["num_tokens"] = [1 + len(row.earlier_ids) for row in rows]
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


# Runs one step of a table (by field), given what rows of the last one sampled, which it replaces by what its own do, -1
# for nothing.
DecodeStep = Callable[[dict[str, torch.Tensor], torch.Tensor], None]


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
    """Steps of up to `max_rows` rows that decode, and mixed ones of up to `max_tokens` tokens if there are to be any.

    Belongs to the engine's one thread. Two steps may be in flight: tables and results on the host are two, in turn.
    """

    def __init__(
        self, step: DecodeStep, max_rows: int, device: torch.device, graphs: Graphs, max_tokens: int = 0
    ) -> None:
        self.buckets = buckets_for(max_rows)
        self.sizes = [Size(bucket, bucket) for bucket in self.buckets]
        self.mixed_sizes = mixed_sizes_for(max_rows, max_tokens) if max_tokens else []
        sizes = self.sizes + self.mixed_sizes
        most = Size(max(size.num_tokens for size in sizes), max(size.num_rows for size in sizes))
        self._graphs = graphs
        is_pinned = device.type == "cuda"
        self._table = RowTable(most, device)
        self._host_tables = [HostTable(most, is_pinned) for _ in range(2)]
        self._sampled = torch.zeros(most.num_rows, dtype=torch.int64, device=device)
        results = [torch.zeros(most.num_rows, dtype=torch.int64) for _ in range(2)]
        self._results = [result.pin_memory() if is_pinned else result for result in results]
        self._in_flight: list[DecodeLaunch | None] = [None, None]
        self._num_launches = 0
        self._rows = rows_of([])  # of the last launch
        # Largest first: what the smaller ones need then fits into what is there.
        self._replays = {size: self._record(step, size) for size in sorted(sizes, reverse=True)}

    @property
    def max_rows(self) -> int:
        """As many rows as the largest graph that only decodes has."""
        return self.buckets[-1]

    def size_of(self, num_tokens: int, num_rows: int, num_long: int = 0) -> Size | None:
        """Return the smallest size for a step in which `num_long` rows have several tokens; None: none for a graph."""
        if num_tokens == num_rows:
            return next((size for size in self.sizes if size.num_rows >= num_rows > 0), None)
        wanted = (num_tokens, num_rows + 1, num_long + 1)  # with a row of padding that has what is left
        return next((s for s in self.mixed_sizes if all(map(operator.le, wanted, (*s, s.num_long)))), None)

    def launch(self, rows: Sequence[DecodeRow]) -> DecodeLaunch:
        """Ask the device for a step of `rows`, distinct slots; does not wait for it, nor for the last one."""
        return self._launch(rows_of(rows), _earlier_ids(rows))

    def follow(self, rows: Sequence[int], new_rows: Sequence[DecodeRow] = ()) -> DecodeLaunch:
        """Ask for the step after the last one: these of its rows, each consuming what it samples there, then new ones.

        A row that samples one of its stop ids there, or nothing, becomes padding. Costs the host little: what does not
        change of a row is not touched.
        """
        sources = np.array(rows, np.int64)
        following = self._rows[sources]
        following["num_tokens"] = 1
        following["sources"] = sources
        following["positions"] += np.uint64(1)
        if new_rows:
            following = np.concatenate([following, rows_of(new_rows)])
        return self._launch(following, _earlier_ids(new_rows))

    def _launch(self, rows: Rows, earlier_ids: Sequence[int]) -> DecodeLaunch:
        turn = self._num_launches % 2
        if (before := self._in_flight[turn]) is not None:
            before.token_ids()  # its table and its result are about to be written over
        num_tokens, num_rows = len(rows) + len(earlier_ids), len(rows)
        num_long = int(np.count_nonzero(rows["num_tokens"] > 1))
        if (size := self.size_of(num_tokens, num_rows, num_long)) is None:
            raise ValueError(f"no graph has {num_tokens} tokens of {num_rows} rows, {num_long} of them of several")
        self._host_tables[turn].fill(rows, earlier_ids, size)
        self._table.data.copy_(self._host_tables[turn].data, non_blocking=True)
        self._replays[size]()
        result = self._results[turn][:num_rows]
        result.copy_(self._sampled[:num_rows], non_blocking=True)
        launch = DecodeLaunch(result, self._graphs.mark())
        self._in_flight[turn] = launch
        self._num_launches += 1
        self._rows = rows
        return launch

    def _record(self, step: DecodeStep, size: Size) -> Callable[[], None]:
        """Record with nothing but padding in the table, so that no state is touched."""
        self._host_tables[0].fill(self._rows, (), size)
        self._table.data.copy_(self._host_tables[0].data)
        fields = self._table.first(size)

        return self._graphs.record(lambda: step(fields, self._sampled))


def _earlier_ids(rows: Sequence[DecodeRow]) -> list[int]:
    return list(chain.from_iterable(row.earlier_ids for row in rows if row.earlier_ids))


def buckets_for(max_rows: int) -> tuple[int, ...]:
    """Return the batch sizes to record so that `max_rows` fit, or as many as the ladder has."""
    if max_rows < 1:
        raise ValueError(f"max_rows must be at least 1, not {max_rows}")
    needed = sum(bucket < max_rows for bucket in BUCKETS) + 1
    return BUCKETS[:needed]


def mixed_sizes_for(max_rows: int, max_tokens: int) -> list[Size]:
    """Return the sizes to record so that steps of prompts fit, with a row to spare for padding; rising.

    None has as many tokens as rows: to the operators that is a step that only decodes.
    """
    most_rows = -(-(max_rows + 1) // 16) * 16
    rows = [*(bucket for bucket in MIXED_ROWS if bucket < most_rows), most_rows]
    wanted = max(max_tokens, most_rows + 1)
    tokens = MIXED_TOKENS[: sum(bucket < wanted for bucket in MIXED_TOKENS) + 1]
    return [Size(num_tokens, num_rows) for num_tokens in tokens for num_rows in rows if num_rows < num_tokens]


def can_record(config: ModelConfig) -> bool:
    """Say whether the Triton operators, who alone know padding rows, run all of such a model."""
    from kernels.triton import shift_mix, wkv7

    return config.head_size in wkv7.HEAD_SIZES and config.width <= shift_mix.MAX_WIDTH


def triton_step(model: RWKV7, pool: StatePool, forbidden_ids: torch.Tensor) -> DecodeStep:
    """Return the step on the Triton operators: the host reads nothing from the device and gives it no values."""
    from kernels.triton.sampling import SamplingRows, sample_rows
    from kernels.triton.sources import consumed

    def step(fields: dict[str, torch.Tensor], sampled: torch.Tensor) -> None:
        token_ids, slots, last_tokens = consumed(
            fields["sources"], fields["token_ids"], fields["starts"], fields["slots"], fields["stop_ids"], sampled
        )
        num_long = Size(len(token_ids), len(slots)).num_long
        logits = model.next_logits(InputBatch(token_ids, slots, fields["starts"], last_tokens, num_long), pool)
        if len(forbidden_ids):
            logits.index_fill_(1, forbidden_ids, -torch.inf)
        parameters = (fields[name] for name in ("temperature", "top_k", "top_p", "min_p", "uniform"))
        sample_rows(logits, SamplingRows(*parameters), slots, sampled[: len(slots)], launch_pdl=True)

    return step

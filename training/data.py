"""From documents to batches: token tables, rows packed with whole documents, a mixture that needs only a step number.

A row is `row_tokens + 1` ids: what goes in is all but the last, what should come out all but the first. Every document
begins with the end-of-text id, and the state is reset there, so no document sees another. Which row comes when is a
pure function of the seed and the step, so a resumed run sees what an unbroken one would have seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from torch import Tensor

from engine.tokenizer.tokenizer import Tokenizer
from training.config import DataSection
from training.documents import Document

END_OF_TEXT_ID = 0
_WEIGHT_SCALE = 100  # weights are stored in hundredths
_OPEN_ROWS = 128  # that a document may still go into while rows are packed


@dataclass(frozen=True, slots=True)
class TokenTable:
    """Documents as ids, one after another; `offsets[i]:offsets[i + 1]` is document i."""

    ids: NDArray[np.integer[Any]]  # uint16 for vocabularies of up to 65,536 ids, else int32
    weights: NDArray[np.uint8]  # of each id as a target, in hundredths
    offsets: NDArray[np.int64]

    @property
    def num_documents(self) -> int:
        """How many documents it holds."""
        return len(self.offsets) - 1

    def save(self, path: Path) -> None:
        """Write it as safetensors."""
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"ids": self.ids, "weights": self.weights, "offsets": self.offsets}, path)

    @staticmethod
    def load(path: Path) -> TokenTable:
        """Read what `save` wrote."""
        return TokenTable(**load_file(path))


def encode_documents(documents: Iterable[Document], tokenizer: Tokenizer) -> TokenTable:
    """Return the documents' tokens. A piece's weight is that of its tokens."""
    dtype: type[np.integer[Any]] = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32
    ids: list[list[int]] = []
    weights: list[NDArray[np.uint8]] = []
    sizes = [0]
    for document in documents:
        pieces = [tokenizer.encode(piece.text) for piece in document]
        ids += pieces
        weights += [
            np.full(len(piece_ids), round(piece.weight * _WEIGHT_SCALE), dtype=np.uint8)
            for piece, piece_ids in zip(document, pieces, strict=True)
        ]
        sizes.append(sum(map(len, pieces)))
    flat = np.fromiter(chain.from_iterable(ids), dtype=dtype)
    return TokenTable(flat, np.concatenate(weights), np.cumsum(sizes, dtype=np.int64))


def held_out(num_documents: int, fraction: float, seed: int) -> NDArray[np.bool_]:
    """Say for each document whether it is kept from training: at least one of two, unless the fraction is 0."""
    count = min(num_documents // 2, max(1, round(num_documents * fraction))) if fraction else 0
    chosen = np.zeros(num_documents, dtype=bool)
    chosen[np.random.default_rng([seed, num_documents]).permutation(num_documents)[:count]] = True
    return chosen


@dataclass(frozen=True, slots=True)
class Span:
    """Part of a document that stands in one row; only documents longer than a row have several."""

    document: int
    start: int
    size: int


def one_per_row(table: TokenTable, documents: Sequence[int], row_tokens: int) -> list[list[Span]]:
    """Give each document a row of its own, cut where the row ends: for training the state that documents begin with."""
    sizes = (table.offsets[1:] - table.offsets[:-1]).tolist()
    return [[Span(document, 0, min(row_tokens - 1, sizes[document]))] for document in documents]


def pack(table: TokenTable, documents: Sequence[int], row_tokens: int, seed: int) -> list[list[Span]]:
    """Put whole documents into rows of `row_tokens` inputs, each document with one end-of-text id before it.

    Long documents are cut. Into which row a document goes depends on its size and a shuffle, nothing else.
    """
    spans = []
    for document in np.random.default_rng([seed, len(documents)]).permutation(documents).tolist():
        size = int(table.offsets[document + 1] - table.offsets[document])
        spans += [Span(document, start, min(row_tokens - 1, size - start)) for start in range(0, size, row_tokens - 1)]
    full: list[list[Span]] = []
    rows: list[list[Span]] = []
    room = np.zeros(0, dtype=np.int64)
    for span in spans:
        fitting = np.flatnonzero(room >= span.size + 1)
        if fitting.size:
            best = int(fitting[room[fitting].argmin()])
            rows[best].append(span)
            room[best] -= span.size + 1
            continue
        rows.append([span])
        room = np.append(room, row_tokens - span.size - 1)
        if len(rows) > _OPEN_ROWS:
            fullest = int(room.argmin())
            full.append(rows.pop(fullest))
            room = np.delete(room, fullest)
    return full + rows


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of one step: inputs, targets and weights [B, T], and where documents begin."""

    inputs: Tensor
    targets: Tensor
    weights: Tensor
    resets: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        return Batch(self.inputs.to(device), self.targets.to(device), self.weights.to(device), self.resets.to(device))

    def slice(self, rows: slice) -> Batch:
        """Some of its rows."""
        return Batch(self.inputs[rows], self.targets[rows], self.weights[rows], self.resets[rows])


class Rows:
    """The packed rows of one source. Without `resets`, a row begins with whatever state the model begins with."""

    def __init__(self, table: TokenTable, rows: list[list[Span]], row_tokens: int, *, resets: bool = True) -> None:
        self._table, self._rows, self._row_tokens, self._resets = table, rows, row_tokens, resets

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def num_tokens(self) -> int:
        """Inputs of all rows that are not filling."""
        return sum(span.size + 1 for row in self._rows for span in row)

    def batch(self, indices: Sequence[int]) -> Batch:
        """Return these rows as a batch."""
        return stack([self.row(index) for index in indices])

    def row(self, index: int) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.bool_]]:
        """Return one row's ids, weights and resets, each `row_tokens + 1` long."""
        ids = np.full(self._row_tokens + 1, END_OF_TEXT_ID, dtype=np.int64)
        weights = np.zeros(self._row_tokens + 1, dtype=np.float32)
        resets = np.zeros(self._row_tokens + 1, dtype=bool)
        at = 0
        for span in self._rows[index]:
            start = int(self._table.offsets[span.document]) + span.start
            weights[at] = float(at > 0)  # the end of the document before
            # A server may begin a conversation with the end-of-text id or without: every second document sees it.
            resets[at + span.document % 2] = True
            at += 1
            ids[at : at + span.size] = self._table.ids[start : start + span.size]
            weights[at : at + span.size] = self._table.weights[start : start + span.size] / _WEIGHT_SCALE
            at += span.size
        if at < len(ids):
            weights[at], resets[at] = 1.0, True
        return ids, weights, resets & self._resets


def stack(rows: Sequence[tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.bool_]]]) -> Batch:
    """Return rows of `row_tokens + 1` ids as a batch; the shift by one between input and target is made here only."""
    ids, weights, resets = (torch.from_numpy(np.stack(arrays)) for arrays in zip(*rows, strict=True))
    return Batch(ids[:, :-1], ids[:, 1:], weights[:, 1:], resets[:, :-1])


class Mixture:
    """The rows of all sources in the order of training: a pure function of the seed and the step."""

    def __init__(self, sources: dict[str, Rows], data: DataSection, num_steps: int, seed: int) -> None:
        self._sources, self._seed, self._rows_per_step = list(sources.values()), seed, data.rows_per_step
        total = num_steps * data.rows_per_step
        progress = np.arange(total) // data.rows_per_step / max(1, data.curriculum_steps)
        shares = np.stack([_share(source.weight, progress) for source in data.sources])
        limits = (shares / shares.sum(axis=0)).cumsum(axis=0)
        draws = np.random.default_rng([seed, 1]).random(total)
        self._source_of_row = (draws >= limits[:-1]).sum(axis=0)
        self._rank_of_row = np.zeros(total, dtype=np.int64)  # among the rows of its source
        for source in range(len(self._sources)):
            mine = self._source_of_row == source
            self._rank_of_row[mine] = np.arange(mine.sum())
        self._orders: dict[tuple[int, int], NDArray[np.int64]] = {}

    def batch(self, step: int) -> Batch:
        """Return the rows of one step."""
        begin = step * self._rows_per_step
        rows = []
        for row in range(begin, begin + self._rows_per_step):
            source = int(self._source_of_row[row])
            epoch, position = divmod(int(self._rank_of_row[row]), len(self._sources[source]))
            rows.append(self._sources[source].row(int(self._order(source, epoch)[position])))
        return stack(rows)

    def _order(self, source: int, epoch: int) -> NDArray[np.int64]:
        """The order of a source's rows in one pass over it."""
        key = (source, epoch)
        if key not in self._orders:
            self._orders = {other: order for other, order in self._orders.items() if other[0] != source}
            self._orders[key] = np.random.default_rng([self._seed, 2, *key]).permutation(len(self._sources[source]))
        return self._orders[key]


class Lanes:
    """All documents as parallel streams: row b of a step goes on where row b of the step before ended.

    For truncated backpropagation through time. The streams are a pure function of the seed; after the last whole row
    they begin again. Sources' weights have no meaning here, since every document is read once a pass.
    """

    def __init__(self, tables: Sequence[tuple[TokenTable, Sequence[int]]], data: DataSection, seed: int) -> None:
        documents = [(table, document) for table, chosen in tables for document in chosen]
        order = np.random.default_rng([seed, 3]).permutation(len(documents)).tolist()
        ids, weights, begins, size = [], [], [], 0
        for table, document in (documents[index] for index in order):
            span = slice(int(table.offsets[document]), int(table.offsets[document + 1]))
            begins.append(size)
            ids += [np.array([END_OF_TEXT_ID]), table.ids[span]]
            weights += [np.array([1.0]), table.weights[span] / _WEIGHT_SCALE]
            size += 1 + span.stop - span.start
        self._ids = np.concatenate(ids).astype(np.int64)
        self._weights = np.concatenate(weights).astype(np.float32)
        self._resets = np.zeros(size, dtype=bool)
        self._resets[begins] = True
        self._row_tokens, self._num_lanes = data.row_tokens, data.rows_per_step
        self.num_steps = (size // data.rows_per_step - 1) // data.row_tokens  # of one pass
        if self.num_steps < 1:
            raise ValueError(f"{size} tokens are too few for {data.rows_per_step} lanes of {data.row_tokens}")

    def batch(self, step: int) -> Batch:
        """Return the next row of every lane."""
        position = step % self.num_steps * self._row_tokens
        rows = []
        for lane in range(self._num_lanes):
            begin = lane * (len(self._ids) // self._num_lanes) + position
            span = slice(begin, begin + self._row_tokens + 1)
            resets = self._resets[span].copy()
            resets[0] |= position == 0
            rows.append((self._ids[span], self._weights[span], resets))
        return stack(rows)


def _share(weight: float | list[float], progress: NDArray[np.float64]) -> NDArray[np.float64]:
    """A source's weight over the rows: constant, or interpolated through equally spaced values."""
    values = weight if isinstance(weight, list) else [weight]
    return np.interp(progress, np.linspace(0, 1, len(values)), values)

"""The raw ids of the rows of torchrec's managed-collision tables, put into the order of the rows.

See :mod:`dist_export.checkpoint.managed_collisions` for what the tensors mean.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from dist_export.errors import CheckpointError
from dist_export.humanize import few
from dist_export.storage.range_reader import RangeReader

_SCAN_ROWS = 1 << 20
_SPAN_BYTES = 1 << 20
_ID_BYTES = 8
_MAX_SHARDS = 1024
"""Of one table, as torchrec has it."""

_NO_SEGMENT = -1
"""Fills what a table with fewer shards does not need of its segments."""

OpenFile = Callable[[int], RangeReader]
"""Number of a file -> a reader of it, which whoever gave it closes."""


class Piece(NamedTuple):
    """A rectangle of a tensor, and where it lies."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: int
    """Number of the file."""
    offset: int
    """Absolute position of its first element, in bytes."""
    strides: tuple[int, ...]
    """In bytes."""


class StoredTensor(NamedTuple):
    """One tensor; its pieces cover it once."""

    name: str
    dtype: str
    """Torch's name."""
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


class CollisionState(NamedTuple):
    """Which raw id has which row of a table, by torchrec's managed-collision modules."""

    ids: StoredTensor
    """int64: the raw id of each row, or with ``mapping`` of each of its entries."""
    mapping: StoredTensor | None
    """int64, (rows,): the row that each entry names."""
    empty: int
    """What stands in ``ids`` where a row has no id."""
    segments: StoredTensor | None = None
    """int64: where the trainer's shards begin, and after them where the last one ends; None where the source does not say."""


@dataclass(frozen=True, eq=False)
class RawIds:
    """The raw ids of rows ``begin`` to ``end`` of a table, a column that no file holds in this order.

    See :class:`~dist_export.checkpoint.metadata.MadeColumn`.
    """

    state: CollisionState
    begin: int
    end: int
    where: str

    @property
    def name(self) -> str:
        """What it is made of, for messages."""
        return f"{self.where}: {self.state.ids.name!r}"

    def moved(self, num_files: int) -> RawIds:
        """Return the same of a checkpoint in which so many files go before those that it counts in."""
        tensors = [
            None if its is None else its._replace(pieces=tuple(p._replace(file=p.file + num_files) for p in its.pieces))
            for its in (self.state.ids, self.state.mapping, self.state.segments)
        ]
        assert tensors[0] is not None
        state = self.state._replace(ids=tensors[0], mapping=tensors[1], segments=tensors[2])
        return replace(self, state=state)

    def load(self, open_file: OpenFile) -> np.ndarray:
        """Return the raw id of each row, int64 (end - begin,). CheckpointError where a row does not have one entry."""
        state, rows = self.state, self.end - self.begin
        if state.mapping is None:
            return read_numbers(open_file, state.ids, self.begin, self.end)
        row = read_numbers(open_file, state.mapping, self.begin, self.end)
        if len(row) and self.begin <= int(row.min()) and int(row.max()) < self.end:  # a shard names its own rows
            ids = read_numbers(open_file, state.ids, self.begin, self.end)
        else:
            row, ids = self._search(open_file, state.mapping)
        times = np.bincount(row - self.begin, minlength=rows)
        if (times != 1).any():
            wrong = int(np.flatnonzero(times != 1)[0])
            raise CheckpointError(
                f"{self.where}: {state.mapping.name!r} names row {self.begin + wrong:,} {int(times[wrong]):,} times; each row of "
                "the table must be there once. Save the checkpoint anew"
            )
        found = np.empty(rows, np.int64)
        found[row - self.begin] = ids
        return found

    def _search(self, open_file: OpenFile, mapping: StoredTensor) -> tuple[np.ndarray, np.ndarray]:
        """Return row and raw id of all entries that name these rows, wherever they stand."""
        rows, ids = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for first in range(0, mapping.shape[0], _SCAN_ROWS):
            last = min(first + _SCAN_ROWS, mapping.shape[0])
            row = read_numbers(open_file, mapping, first, last)
            chosen = np.flatnonzero((row >= self.begin) & (row < self.end))
            if len(chosen):
                rows.append(row[chosen])
                ids.append(read_numbers(open_file, self.state.ids, first, last)[chosen])
        return np.concatenate(rows), np.concatenate(ids)


def find_shard_ends(open_file: OpenFile, state: CollisionState) -> list[int]:
    """Return where the trainer's shards of a sorted column may end: where its segments or a piece do, or the order begins anew.

    Neither pieces nor order tell where a shard without ids begins, if it lies behind another one in the same piece.

    Raises:
        CheckpointError: there are more of these than torchrec can have, or the segments are not those of the column.
    """
    ids = state.ids
    ends = {piece.offsets[0] + piece.sizes[0] for piece in ids.pieces if piece.sizes[0]}
    if state.segments is not None:
        ends |= _read_segments(open_file, state.segments, ids.shape[0])
    most = len(ends) + _MAX_SHARDS
    last = np.zeros(0, np.int64)
    for first in range(0, ids.shape[0], _SCAN_ROWS):
        numbers = read_numbers(open_file, ids, first, min(first + _SCAN_ROWS, ids.shape[0]))
        joined = np.concatenate([last, numbers])
        ends.update((first - len(last) + 1 + np.flatnonzero(joined[1:] < joined[:-1])).tolist())
        if len(ends) > most:
            raise CheckpointError(
                f"{ids.name!r} is not sorted by raw id, as torchrec leaves it; save the checkpoint anew"
            )
        last = numbers[-1:]
    return sorted(ends)


def _read_segments(open_file: OpenFile, segments: StoredTensor, rows: int) -> set[int]:
    """Return where shards with a row end. CheckpointError where the tensor does not cut ``rows`` rows."""
    said = f"{segments.dtype} {list(segments.shape)}"
    if segments.dtype == "int64" and len(segments.shape) == 1 and 2 <= segments.shape[0] <= _MAX_SHARDS + 1:
        numbers = read_numbers(open_file, segments, 0, segments.shape[0])
        edges = numbers[: int(np.argmax(numbers == _NO_SEGMENT))] if _NO_SEGMENT in numbers else numbers
        is_padded = bool((numbers[len(edges) :] == _NO_SEGMENT).all())
        if is_padded and len(edges) > 1 and (edges[1:] >= edges[:-1]).all() and (edges[0], edges[-1]) == (0, rows):
            return set(edges[1:][edges[1:] > edges[:-1]].tolist())
        said = few([str(number) for number in numbers.tolist()])
    raise CheckpointError(
        f"{segments.name!r} does not say how {rows:,} rows are cut into shards, but is {said}; expected int64 from 0 to "
        f"{rows}, ascending, then {_NO_SEGMENT}. Save the checkpoint anew, or set default_row for the table"
    )


def read_numbers(open_file: OpenFile, tensor: StoredTensor, begin: int, end: int) -> np.ndarray:
    """Return elements ``begin`` to ``end`` of an int64 tensor of shape (n,) or (n, 1), as int64 (end - begin,)."""
    found = np.zeros(max(end - begin, 0), np.int64)
    for piece in tensor.pieces:
        first, last = max(begin, piece.offsets[0]), min(end, piece.offsets[0] + piece.sizes[0])
        if first >= last or not all(piece.sizes):
            continue
        stride = piece.strides[0]
        at = piece.offset + (first - piece.offsets[0]) * stride
        reader, out = open_file(piece.file), found[first - begin : last - begin]
        if stride == _ID_BYTES or len(out) == 1:
            reader.read_into(out.view(np.uint8).data, at)
            continue
        step = max(1, (_SPAN_BYTES - _ID_BYTES) // max(stride, 1) + 1)
        for place in range(0, len(out), step):
            count = min(step, len(out) - place)
            span = np.empty((count - 1) * stride + _ID_BYTES, np.uint8)
            reader.read_into(span.data, at + place * stride)
            rows = np.lib.stride_tricks.as_strided(span, (count, _ID_BYTES), (stride, 1), writeable=False)
            out[place : place + count] = np.ascontiguousarray(rows).view(np.int64)[:, 0]
    return found

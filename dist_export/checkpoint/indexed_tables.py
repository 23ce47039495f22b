"""Tables whose rows go by number, laid out: from located tensors to parts, blocks and strips. Pure.

The parts of a table are the ranges of rows that lie in the same pieces of its weight and of its slots; where a piece holds whole
rows, one behind the other, the part is a range of bytes of its file, else its rows are put together from strips.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dist_export.checkpoint.metadata import (
    ABSENT,
    FIRST_MADE,
    IN_STRIPS,
    Blocks,
    Parts,
    SlotMeta,
    Strips,
    TableMeta,
)
from dist_export.checkpoint.raw_ids import CollisionState, Piece, RawIds, StoredTensor
from dist_export.errors import CheckpointError
from dist_export.formats.dtypes import CODE_BY_TORCH, DTYPES, I64
from dist_export.formats.recis import EMBEDDING_SLOT, ID_SLOT

_ID = SlotMeta(name=ID_SLOT, dtype=I64, inner_shape=(), row_bytes=8, column=0)
HASH_SIZE = 65536
"""Of the slices of hash tables. Each part of one claims all of them."""
_MAX_STRIPS = 1 << 22
"""Of a checkpoint, at 56 bytes each: the columns of transposed pieces, or somebody's joke."""


class TensorTable(NamedTuple):
    """A table, whose rows go by number, and its optimizer slots by name."""

    name: str
    weight: StoredTensor
    slots: tuple[tuple[str, StoredTensor], ...]
    collision: CollisionState | None = None
    """What makes it a hash table keyed by raw id."""


def fits_table(shape: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    """Whether optimizer state of this shape has a value for each row of its table, or one for each element."""
    return shape in (weight, weight[:1], (weight[0], 1))


class BuiltTables(NamedTuple):
    """Tables as a :class:`~dist_export.checkpoint.metadata.Checkpoint` has them, in its fields of the same names."""

    tables: tuple[TableMeta, ...]
    parts: Parts
    blocks: Blocks
    strips: Strips
    made: tuple[RawIds, ...]


def build_row_indexed(tables: Sequence[TensorTable], *, where: str) -> BuiltTables:
    """Make tables of tensors. CheckpointError where rows would be put together from more strips than can be held."""
    layout = _Layout(where)
    metas = tuple(layout.add(table) for table in tables)
    return BuiltTables(metas, *layout.finish(), tuple(layout.made))


class _Layout:
    """Parts, blocks and strips of table after table."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._parts = [np.zeros((5, 0), np.int64)]
        self._blocks: list[list[tuple[int, int, str]]] = []
        """By part: (file, offset, key) of each slot."""
        self._strips = [np.zeros((7, 0), np.int64)]
        self._num_strips = 0
        self._num_tables = 0
        self._first_rows = [np.zeros(0, np.int64)]
        self.made: list[RawIds] = []
        """Columns of ids that are in no file."""

    def add(self, table: TensorTable) -> TableMeta:
        """Cut a table into parts at every row where a piece begins; return what it is."""
        rows = table.weight.shape[0]
        tensors = [table.weight, *(tensor for _, tensor in table.slots)]
        slots = [_describe_slot(EMBEDDING_SLOT, table.weight, 1, fits=True)]
        slots += [
            _describe_slot(name, tensor, column, fits=fits_table(tensor.shape, table.weight.shape))
            for column, (name, tensor) in enumerate(table.slots, 2)
        ]
        of_slot = [
            [piece for piece in tensor.pieces if all(piece.sizes)] if slot.stored_shape is None else []
            for slot, tensor in zip(slots, tensors, strict=True)
        ]
        edges = np.unique([0, rows, *(edge for p in itertools.chain(*of_slot) for edge in _row_edges(p))])
        begins, ends = (edges[:-1], edges[1:]) if rows else (np.zeros(1, np.int64), np.ones(1, np.int64))
        first_part = len(self._blocks)
        held = ends - begins if rows else np.zeros(1, np.int64)
        size = np.full_like(begins, max(rows, 1))
        self._parts.append(np.stack([np.full_like(begins, self._num_tables), begins, ends, size, held]))
        self._first_rows.append(begins)
        self._num_tables += 1
        state = table.collision
        if state is None:
            self._blocks += [[(ABSENT, 0, table.weight.name)] for _ in begins]
        else:
            self._blocks += [
                [self._make_ids(state, first, last)] for first, last in zip(begins, begins + held, strict=True)
            ]
        for slot, tensor, found in zip(slots, tensors, of_slot, strict=True):
            by_part: list[list[Piece]] = [[] for _ in begins]
            for piece in found:
                first, last = np.searchsorted(begins, _row_edges(piece))
                for part in range(int(first), int(last)):
                    by_part[part].append(piece)
            for part, begin in enumerate(begins.tolist()):
                block = self._place(first_part + part, slot, begin, int(held[part]), by_part[part], tensor)
                self._blocks[first_part + part].append(block)
        is_hashed = state is not None
        if is_hashed:  # a raw id may have any row
            self._parts[-1][1:4] = np.array([[0], [HASH_SIZE], [HASH_SIZE]])
        return TableMeta(
            name=table.name,
            slots=(_ID, *slots),
            is_hashed=is_hashed,
            has_ids=is_hashed,
            empty_id=None if state is None else state.empty,
        )

    def _make_ids(self, state: CollisionState, begin: int, end: int) -> tuple[int, int, str]:
        """Say where the raw ids of rows ``begin`` to ``end`` are: in one piece of a file, or made of what files hold."""
        begin, end = int(begin), int(end)
        for piece in state.ids.pieces if state.mapping is None else ():
            first, last = _row_edges(piece)
            if first <= begin < end <= last and (piece.strides[0] == _ID.row_bytes or end - begin == 1):
                return piece.file, piece.offset + (begin - first) * piece.strides[0], state.ids.name
        self.made.append(RawIds(state, begin, end, self._where))
        return FIRST_MADE + 1 - len(self.made), 0, state.ids.name

    def _place(
        self, part: int, slot: SlotMeta, begin: int, rows: int, pieces: list[Piece], tensor: StoredTensor
    ) -> tuple[int, int, str]:
        """Say where the rows of one part and slot lie, as a block or as strips."""
        itemsize = DTYPES[slot.dtype].itemsize
        if not pieces:  # there are no rows, none with a byte, or none that fit
            return ABSENT, 0, tensor.name
        key = tensor.name if len(tensor.pieces) == 1 else f"{tensor.name} at {list(pieces[0].offsets)}"
        only = pieces[0]
        at = only.offset + (begin - only.offsets[0]) * only.strides[0]
        if len(pieces) == 1 and _is_packed(only, itemsize) and (only.strides[0] == slot.row_bytes or rows == 1):
            return only.file, at, key
        for piece in pieces:
            offset = piece.offset + (begin - piece.offsets[0]) * piece.strides[0]
            first_column, num_columns = (*piece.offsets, 0)[1], (*piece.sizes, 1)[1]
            width = num_columns if _is_packed(piece, itemsize) else 1
            self._num_strips += num_columns // width
            if self._num_strips > _MAX_STRIPS:
                raise CheckpointError(
                    f"{self._where}: {tensor.name!r}: its columns do not lie side by side, and would be read in more than "
                    f"{_MAX_STRIPS:,} strips; save it again, contiguous"
                )
            column = np.arange(0, num_columns, width)
            strips = np.empty((7, len(column)), np.int64)
            strips[0], strips[1], strips[3] = part, slot.column, width * itemsize
            strips[2] = (first_column + column) * itemsize
            strips[4], strips[5] = piece.strides[0], piece.file
            strips[6] = offset + column * (*piece.strides, 0)[1]
            self._strips.append(strips)
        return IN_STRIPS, 0, key

    def finish(self) -> tuple[Parts, Blocks, Strips]:
        """Return the columns of all tables."""
        table, begin, end, size, rows = np.concatenate(self._parts, axis=1)
        num_slots = max((len(row) for row in self._blocks), default=2)
        shape = (len(self._blocks), num_slots)
        blocks = Blocks(
            file=np.full(shape, ABSENT, np.int32), offset=np.zeros(shape, np.int64), key=np.full(shape, "", object)
        )
        for part, row in enumerate(self._blocks):
            for column, (file, offset, key) in enumerate(row):
                blocks.file[part, column], blocks.offset[part, column], blocks.key[part, column] = file, offset, key
        strips = np.concatenate(self._strips, axis=1)
        strips = strips[:, np.lexsort((strips[2], strips[1], strips[0]))]
        names = ("part", "column", "first_byte", "width", "row_stride", "file", "offset")
        return (
            Parts(table=table, begin=begin, end=end, size=size, rows=rows, first_row=np.concatenate(self._first_rows)),
            blocks,
            Strips(**dict(zip(names, strips, strict=True))),
        )


def _describe_slot(name: str, tensor: StoredTensor, column: int, *, fits: bool) -> SlotMeta:
    code = CODE_BY_TORCH[tensor.dtype]
    inner = tensor.shape[1:] if fits else ()
    return SlotMeta(
        name=name,
        dtype=code,
        inner_shape=inner,
        row_bytes=math.prod(inner) * DTYPES[code].itemsize,
        column=column,
        is_optimizer=column > 1,
        stored_shape=None if fits else tensor.shape,
    )


def _row_edges(piece: Piece) -> tuple[int, int]:
    return piece.offsets[0], piece.offsets[0] + piece.sizes[0]


def _is_packed(piece: Piece, itemsize: int) -> bool:
    """Whether the elements of a row lie side by side."""
    return (*piece.sizes, 1)[1] == 1 or (*piece.strides, 0)[1] == itemsize

"""Blocks to parts: which blocks of a RecIS checkpoint belong together, and whether they make whole tables. Pure."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np

from dist_export.checkpoint.metadata import Blocks, Parts, SlotMeta, TableMeta
from dist_export.errors import CheckpointError
from dist_export.formats.dtypes import DTYPES, I64
from dist_export.formats.recis import EMBEDDING_SLOT, ID_SLOT, Slice, key_stem

_MAX_ROW_BYTES = 1 << 40
_LAST_NUMBERS = re.compile(r"\d+")


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class SparseBlocks:
    """The sparse blocks of a checkpoint, as parallel columns in the order of files and headers."""

    where: tuple[str, ...]
    """The paths of the files, for messages."""
    keys: np.ndarray
    """object: the names in the headers."""
    file: np.ndarray
    """int32: number of the file."""
    offset: np.ndarray
    """int64: absolute position in the file, in bytes."""
    dtype: np.ndarray
    """int8: index into ``DTYPES``."""
    rows: np.ndarray
    """int64: the first dimension, -1 for a scalar."""
    inner: np.ndarray
    """int32: the other dimensions, a place in ``inner_shapes``."""
    inner_shapes: tuple[tuple[int, ...], ...]
    kind: np.ndarray
    """int32: table and slot, a place in ``kinds``."""
    kinds: tuple[tuple[str, str], ...]
    slice: np.ndarray
    """int32: a place in ``slices``, which may hold equal ones."""
    slices: tuple[Slice, ...]

    def error(self, row: int, text: str) -> CheckpointError:
        """Return the error that names a block and its file."""
        return CheckpointError(
            f"{self.where[self.file[row]]}: block {self.keys[row]!r} {text}"
            ". Copy the checkpoint again, or take an earlier one"
        )


def build_parts(blocks: SparseBlocks) -> tuple[tuple[TableMeta, ...], Parts, Blocks]:
    """Return tables in order of appearance, their parts by slice, and the matrix of blocks.

    Raises:
        CheckpointError: a table or a part is not whole, or its blocks contradict each other.
    """
    return _Builder(blocks).build()


class _Builder:
    """Sorts blocks into parts. All steps are over whole columns; single rows are looked at where one is wrong."""

    def __init__(self, blocks: SparseBlocks) -> None:
        self._blocks = blocks
        # kinds in the order in which the files bring them up, each with the row that does
        number, first = np.unique(blocks.kind, return_index=True)
        self._first_row = dict(zip(number.tolist(), first.tolist(), strict=True))
        self._kinds_by_table: dict[str, list[int]] = {}
        for kind in sorted(self._first_row, key=self._first_row.__getitem__):
            self._kinds_by_table.setdefault(blocks.kinds[kind][0], []).append(kind)

    def build(self) -> tuple[tuple[TableMeta, ...], Parts, Blocks]:
        blocks = self._blocks
        self._check_blocks()
        tables = tuple(self._build_table(*item) for item in self._kinds_by_table.items())
        table_of_kind = np.zeros(len(blocks.kinds), np.int64)
        column_of_kind = np.zeros(len(blocks.kinds), np.int64)
        for number, (table, kinds) in enumerate(zip(tables, self._kinds_by_table.values(), strict=True)):
            column = {slot.name: slot.column for slot in table.slots}
            table_of_kind[kinds] = number
            column_of_kind[kinds] = [column[blocks.kinds[kind][1]] for kind in kinds]

        distinct = sorted(set(blocks.slices))
        place = {part: i for i, part in enumerate(distinct)}
        slice_rank = np.array([place[part] for part in blocks.slices], np.int64)[blocks.slice]
        group = table_of_kind[blocks.kind] * len(distinct) + slice_rank
        column = column_of_kind[blocks.kind]
        part_rows, part = self._number_parts(group, column)

        num_slots = max((len(table.slots) for table in tables), default=0)
        row_of = np.full((len(part_rows), num_slots), -1, np.int64)
        row_of[part, column] = np.arange(len(part))
        table = table_of_kind[blocks.kind[part_rows]]
        edges = np.array(distinct, np.int64).reshape(-1, 3)[slice_rank[part_rows]]
        self._check_parts(tables, table, edges, row_of, part)
        is_there = row_of >= 0
        parts = Parts(
            table=table,
            begin=edges[:, 0].copy(),
            end=edges[:, 1].copy(),
            size=edges[:, 2].copy(),
            rows=blocks.rows[row_of[:, 0]] if len(row_of) else np.zeros(0, np.int64),
        )
        names = np.full(row_of.shape, None, object)
        names[is_there] = blocks.keys[row_of[is_there]]
        file = np.full(row_of.shape, -1, np.int32)
        file[is_there] = blocks.file[row_of[is_there]]
        offset = np.zeros(row_of.shape, np.int64)
        offset[is_there] = blocks.offset[row_of[is_there]]
        return tables, parts, Blocks(file=file, offset=offset, key=names)

    def _check_blocks(self) -> None:
        """Refuse a block that cannot be its slot's, or is of another kind than the other blocks of the slot."""
        blocks = self._blocks
        if not len(blocks.kind):
            return
        width = [min(math.prod(shape), _MAX_ROW_BYTES) for shape in blocks.inner_shapes]
        is_id = np.array([slot == ID_SLOT for _, slot in blocks.kinds])[blocks.kind]
        is_embedding = np.array([slot == EMBEDDING_SLOT for _, slot in blocks.kinds])[blocks.kind]
        is_flat = np.array([not shape for shape in blocks.inner_shapes])[blocks.inner]
        first = np.zeros(len(blocks.kinds), np.int64)
        first[list(self._first_row)] = list(self._first_row.values())
        known = first[blocks.kind]
        is_wrong = (
            (blocks.rows < 0)
            | (is_id & ~((blocks.dtype == I64) & is_flat))
            | (is_embedding & is_flat)
            | (np.array(width, np.int64)[blocks.inner] * 8 > _MAX_ROW_BYTES)
            | (blocks.dtype != blocks.dtype[known])
            | (blocks.inner != blocks.inner[known])
        )
        if is_wrong.any():
            row = int(is_wrong.argmax())
            self._refuse(row, int(known[row]))

    def _refuse(self, row: int, known: int) -> None:
        """Say what is wrong with a block; ``known`` is the first one of its table and slot."""
        blocks = self._blocks
        slot = blocks.kinds[blocks.kind[row]][1]
        inner = blocks.inner_shapes[blocks.inner[row]]
        shape = [int(blocks.rows[row]), *inner]
        dtype = DTYPES[blocks.dtype[row]].name
        if shape[0] < 0:
            raise blocks.error(row, "is a scalar, but a block of a table has a row for each id")
        if slot == ID_SLOT and (blocks.dtype[row] != I64 or inner):
            raise blocks.error(row, f"is {dtype} {shape}; ids are I64 [rows]")
        if slot == EMBEDDING_SLOT and not inner:
            raise blocks.error(row, f"has shape {shape}; embeddings are [rows, dim]")
        if math.prod(inner) * 8 > _MAX_ROW_BYTES:
            raise blocks.error(row, f"has rows of {list(inner)}, which no table has")
        raise blocks.error(
            row,
            f"is {dtype} with rows of {list(inner)}; other parts of the table have "
            f"{DTYPES[blocks.dtype[known]].name} with rows of {list(blocks.inner_shapes[blocks.inner[known]])}",
        )

    def _build_table(self, name: str, kinds: list[int]) -> TableMeta:
        blocks = self._blocks
        kind_of = {blocks.kinds[kind][1]: kind for kind in kinds}
        missing = [slot for slot in (ID_SLOT, EMBEDDING_SLOT) if slot not in kind_of]
        if missing:
            row = self._first_row[kinds[0]]
            raise CheckpointError(
                f"{blocks.where[blocks.file[row]]}: holds {blocks.keys[row]!r}, but no file holds the "
                f"{' or '.join(missing)} block of table {name!r}"
                ". Copy the checkpoint again, or take an earlier one"
            )
        slots = []
        order = [ID_SLOT, EMBEDDING_SLOT, *(slot for slot in kind_of if slot not in (ID_SLOT, EMBEDDING_SLOT))]
        for column, slot in enumerate(order):
            row = self._first_row[kind_of[slot]]
            dtype, inner = int(blocks.dtype[row]), blocks.inner_shapes[blocks.inner[row]]
            row_bytes = math.prod(inner) * DTYPES[dtype].itemsize
            slots.append(SlotMeta(name=slot, dtype=dtype, inner_shape=inner, row_bytes=row_bytes, column=column))
        return TableMeta(name=name, slots=tuple(slots))

    def _number_parts(self, group: np.ndarray, column: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return a row of each part (int64, in the order of parts) and the part of each row (int64).

        A group is a table and a slice. The internal names tell all that RecIS goes by. Only where two parts carry one
        slice, and so their blocks one name, the end of the keys tells them apart.
        """
        _, first, number = np.unique(group, return_index=True, return_inverse=True)
        num_columns = int(column.max(initial=0)) + 1
        twice = np.flatnonzero(np.bincount(number * num_columns + column) > 1)
        if not len(twice):
            return first, number
        suffix_rank = np.zeros(len(group), np.int64)
        by_group = np.argsort(number, kind="stable")
        starts = np.append(np.searchsorted(number[by_group], np.arange(len(first))), len(number))
        for shared in np.unique(twice // num_columns).tolist():
            rows = by_group[starts[shared] : starts[shared + 1]]
            suffix_rank[rows] = self._rank_suffixes(rows.tolist())
        split = number * (int(suffix_rank.max()) + 1) + suffix_rank
        _, first, number = np.unique(split, return_index=True, return_inverse=True)
        return first, number

    def _rank_suffixes(self, rows: list[int]) -> list[int]:
        """Return a number for the end of each key of these blocks, which are of one table and slice."""
        blocks = self._blocks
        suffixes = []
        seen: dict[tuple[str, int], int] = {}
        for row in rows:
            stem, key = key_stem(*blocks.kinds[blocks.kind[row]]), blocks.keys[row]
            suffixes.append(key[len(stem) :] if key.startswith(stem) else "")
            other = seen.setdefault((suffixes[-1], int(blocks.kind[row])), row)
            if other != row:
                raise blocks.error(
                    row,
                    f"and {blocks.keys[other]!r} in {blocks.where[blocks.file[other]]} stand for the same slot and slice; "
                    "nothing says which one belongs to which ids",
                )
        rank = {suffix: i for i, suffix in enumerate(sorted(set(suffixes), key=_natural))}
        return [rank[suffix] for suffix in suffixes]

    def _check_parts(
        self,
        tables: tuple[TableMeta, ...],
        table: np.ndarray,
        edges: np.ndarray,
        row_of: np.ndarray,
        part: np.ndarray,
    ) -> None:
        """Refuse a part without ids, with slots of other lengths than the ids, or without a slot that others have.

        Args:
            edges: (P, 3), the slices.
            row_of: (P, S), the row of each block, -1 where there is none.
            part: the part of each row.
        """
        blocks = self._blocks
        if not len(row_of):
            return
        num_slots = np.array([len(meta.slots) for meta in tables], np.int64)[table]
        rows = np.where(row_of >= 0, blocks.rows[row_of], -1)
        ids = rows[:, :1]
        is_missing = (row_of < 0) & (np.arange(row_of.shape[1]) < num_slots[:, None])
        is_wrong = is_missing[:, :2].any(axis=1) | ((rows != ids) & (row_of >= 0)).any(axis=1)
        is_wrong |= is_missing.any(axis=1) & (ids[:, 0] > 0)
        if is_wrong.any():
            bad = int(is_wrong.argmax())
            self._refuse_part(tables[table[bad]], Slice(*edges[bad].tolist()), np.flatnonzero(part == bad).tolist())
        first = np.searchsorted(table, table)
        other = np.flatnonzero(edges[:, 2] != edges[first, 2])
        if len(other):
            bad = int(other[0])
            raise CheckpointError(
                f"{blocks.where[blocks.file[row_of[bad, 0]]]}: a part of table {tables[table[bad]].name!r} has slice size "
                f"{edges[bad, 2]}, another one {edges[first[bad], 2]}; RecIS's loader takes rows of one size only"
                ". Copy the checkpoint again, or take an earlier one"
            )

    def _refuse_part(self, table: TableMeta, part_slice: Slice, rows: list[int]) -> None:
        """Say what is wrong with a part, which consists of these rows."""
        blocks = self._blocks
        row_of = {blocks.kinds[blocks.kind[row]][1]: row for row in rows}
        file = blocks.where[blocks.file[rows[0]]]
        what = f"the part of table {table.name!r} with slice {part_slice.begin}:{part_slice.end}"
        for needed in (ID_SLOT, EMBEDDING_SLOT):
            if needed not in row_of:
                raise CheckpointError(
                    f"{file}: {what} has no {needed} block. Copy the checkpoint again, or take an earlier one"
                )
        num_ids = int(blocks.rows[row_of[ID_SLOT]])
        for slot, row in row_of.items():
            if blocks.rows[row] != num_ids:
                raise blocks.error(
                    row,
                    f"has {blocks.rows[row]:,} rows of {slot}, but {what} has {num_ids:,} ids; RecIS's reader would run "
                    "on into the next block",
                )
        absent = next(slot.name for slot in table.slots if slot.name not in row_of)
        raise CheckpointError(
            f"{file}: {what} has {num_ids:,} rows but no {absent}, which other parts have"
            ". Copy the checkpoint again, or take an earlier one"
        )


def _natural(suffix: str) -> tuple[list[int], str]:
    return [int(number) for number in _LAST_NUMBERS.findall(suffix[:200])], suffix

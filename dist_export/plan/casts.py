"""Choose the tables that are cast to another dtype, and the layout of their cast rows. Pure.

Only the embedding of a table is cast. ``Selection.kept`` describes slots as they are written, so it shows which slots are
cast. The layout, the segments and the buffers follow from it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

import numpy as np

from dist_export.checkpoint.metadata import Checkpoint, SlotMeta, TableMeta
from dist_export.errors import PlanError
from dist_export.formats.dtypes import CODE_BY_TORCH, DTYPES
from dist_export.formats.recis import EMBEDDING_SLOT
from dist_export.formats.row_encodings import (
    BF16,
    F64,
    FLOATS,
    INT8_ROWWISE,
    TAIL_BYTES,
    U8,
    RowCast,
    decode_values,
    encode_values,
)
from dist_export.plan.selection import Selection
from dist_export.plan.table_view import find_mistake, refuse_shadowed

SOURCE = "source"
"""Leaves a table in its stored dtype, even if a later pattern matches it."""

INT8 = "int8"
"""The name of ``int8_rowwise`` in the settings."""


class CastCount(NamedTuple):
    """The losses of a cast of some rows of one table."""

    values: int = 0
    """Values that were cast, without those of dropped and pruned rows."""
    nans: int = 0
    out_of_range: int = 0
    worst: float = 0.0
    total: float = 0.0
    """The sum of absolute errors over the values that fit; ``worst`` is the largest of them."""
    first_row: int = -1
    """The row, within its part, of the first value that does not fit; -1 if all values fit."""
    first_id: int = 0

    @property
    def overflow(self) -> int:
        """The number of values that do not fit."""
        return self.nans + self.out_of_range


def cast_slots(checkpoint: Checkpoint, selection: Selection, dtypes: Sequence[tuple[str, str]]) -> Selection:
    """Return the selection with the embeddings of some tables in other dtypes.

    Args:
        checkpoint: the source.
        selection: the slots that are kept, as stored.
        dtypes: (pattern of table names, dtype) in order; the first pattern that matches a table decides.

    Raises:
        PlanError: a pattern that matches no table, or rows that cannot be cast.
    """
    names = [table.name_in_source for table in checkpoint.tables]
    for pattern, _ in dtypes:
        if pattern not in names and not any(fnmatchcase(name, pattern) for name in names):
            raise PlanError(
                f"dtype: the pattern {pattern!r} matches no table of the checkpoint, which has {', '.join(names) or 'none'}"
            )
        if mistake := find_mistake("dtype", pattern, names):
            raise mistake
    refuse_shadowed("dtype", dtypes, names)
    kept = []
    for table, slots in zip(checkpoint.tables, selection.kept, strict=True):
        asked = next((dtype for pattern, dtype in dtypes if fnmatchcase(table.name_in_source, pattern)), None)
        kept.append(
            slots
            if asked in (None, SOURCE)
            else tuple(_cast(table, s, asked) if s.name == EMBEDDING_SLOT else s for s in slots)
        )
    return dataclasses.replace(selection, kept=tuple(kept))


def cast_of(stored: SlotMeta, written: SlotMeta) -> RowCast | None:
    """Return the cast from the stored slot to the written slot; None if both have one dtype and encoding."""
    if (stored.dtype, stored.encoding) == (written.dtype, written.encoding):
        return None
    return RowCast(stored.dtype, written.dtype, written.encoding, math.prod(stored.values_shape), stored.encoding)


def check_defaults(checkpoint: Checkpoint, selection: Selection) -> None:
    """Raise PlanError if the dtype in which a table is written cannot hold its default row."""
    for table, slots in zip(checkpoint.tables, selection.kept, strict=True):
        default = table.default_row
        if default is None or isinstance(default, str):
            continue
        slot = next(slot for slot in slots if slot.name == EMBEDDING_SLOT)
        if not slot.encoding and cast_of(table.slots[slot.column], slot) is None:
            continue  # already checked against the stored dtype
        cast = RowCast(F64, slot.dtype, slot.encoding, math.prod(slot.values_shape))
        rows = np.array([default], np.float64).view(np.uint8)
        outcome = cast.encode_into(np.empty((1, cast.target_bytes), np.uint8), rows)
        if outcome.out_of_range:
            raise PlanError(
                f"default_row: a value for table {table.name!r} does not fit {cast.name}, in which the table is written "
                f"({cast.range_text})"
            )


def round_defaults(checkpoint: Checkpoint, asked: Iterable[str], dtypes: Sequence[tuple[str, str]]) -> Checkpoint:
    """Return the checkpoint with the default rows of packages as their rows are, where both are cast anew.

    A package whose rows were cast serves its default row in that precision, and its manifest has the values as they were set. A
    further cast starts from what is served, as it does for rows.

    Args:
        checkpoint: the source.
        asked: patterns of tables to which the settings give a default row, which counts as it is.
        dtypes: as :func:`cast_slots` takes them.
    """
    patterns = list(asked)
    tables = []
    for table in checkpoint.tables:
        name, default = table.name_in_source, table.default_row
        slot = next(slot for slot in table.slots if slot.name == EMBEDDING_SLOT)
        is_own = not any(fnmatchcase(name, pattern) for pattern in patterns)
        was_cast = bool(slot.earlier_casts) or bool(slot.encoding)
        dtype = next((dtype for pattern, dtype in dtypes if fnmatchcase(name, pattern)), SOURCE)
        if is_own and was_cast and _changes(slot, dtype) and default is not None and not isinstance(default, str):
            stored = encode_values(default, slot.dtype, slot.encoding)
            tables.append(dataclasses.replace(table, default_row=decode_values(stored, slot.dtype, slot.encoding)))
        else:
            tables.append(table)
    return dataclasses.replace(checkpoint, tables=tuple(tables))


def _changes(slot: SlotMeta, dtype: str) -> bool:
    """Return whether this dtype of the settings is another one than the slot is stored in."""
    if dtype == SOURCE:
        return False
    if dtype == INT8:
        return slot.encoding != INT8_ROWWISE
    return bool(slot.encoding) or CODE_BY_TORCH.get(dtype) != slot.dtype


def casts_by_table(checkpoint: Checkpoint, selection: Selection) -> dict[str, RowCast]:
    """Return the cast of each table that is cast, by table name."""
    found = {}
    for table, slots in zip(checkpoint.tables, selection.kept, strict=True):
        for slot in slots:
            cast = cast_of(table.slots[slot.column], slot)
            if cast is not None:
                found[table.name] = cast
    return found


def note_unreadable(checkpoint: Checkpoint, selection: Selection) -> list[str]:
    """Return a note for each written dtype that RecIS's loader cannot read. It reads embeddings of F64, F32, F16 and I8.

    If the source is not a RecIS checkpoint, that loader can only read tables that ``to_hash_tables`` turns into hash tables.
    """
    names: dict[str, list[str]] = {}
    for table, slots in zip(checkpoint.tables, selection.kept, strict=True):
        for slot in slots:
            is_read = table.is_hashed and (checkpoint.is_of_recis or not table.has_ids)
            if is_read and slot.name == EMBEDDING_SLOT and slot.dtype in (BF16, U8):
                what = "int8" if slot.encoding else DTYPES[slot.dtype].torch
                names.setdefault(what, []).append(table.name)
    return [
        f"{_join(tables)}: written as {what}, of which RecIS's loader reads no embeddings; the package is for a server that does"
        for what, tables in sorted(names.items())
    ]


def _join(names: Sequence[str]) -> str:
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more tables"


def _cast(table: TableMeta, slot: SlotMeta, asked: str) -> SlotMeta:
    if asked == INT8 and slot.encoding == INT8_ROWWISE:
        return slot
    if slot.dtype not in FLOATS and not slot.encoding:
        known = ", ".join(DTYPES[code].torch for code in FLOATS)
        raise PlanError(
            f"dtype: table {table.name!r} has rows of {DTYPES[slot.dtype].torch}, which cannot be cast to {asked}; rows of "
            f"{known} can. Leave it as it is with {table.name}: source before this pattern"
        )
    if asked != INT8:
        code = CODE_BY_TORCH[asked]
        shape = slot.values_shape
        row_bytes = math.prod(shape) * DTYPES[code].itemsize
        return dataclasses.replace(slot, dtype=code, inner_shape=shape, row_bytes=row_bytes, encoding="")
    if len(slot.inner_shape) != 1 or not slot.inner_shape[0]:
        raise PlanError(
            f"dtype: table {table.name!r} has rows of shape {list(slot.inner_shape)}, and int8 is for rows of one dimension "
            "with at least one value; choose another dtype for it"
        )
    width = slot.inner_shape[0] + TAIL_BYTES
    return dataclasses.replace(slot, dtype=U8, inner_shape=(width,), row_bytes=width, encoding=INT8_ROWWISE)

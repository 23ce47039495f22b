"""Which tables get another dtype, and what their rows become. Pure.

A table's embedding alone is cast. That its rows are written otherwise than they lie is seen in ``Selection.kept``, whose slots
are as written; so the layout, the routes and the buffers follow from there.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

import numpy as np

from dist_export.checkpoint.metadata import Checkpoint, SlotMeta, TableMeta
from dist_export.errors import PlanError
from dist_export.formats.dtypes import CODE_BY_TORCH, DTYPES
from dist_export.formats.recis import EMBEDDING_SLOT
from dist_export.formats.row_encodings import BF16, F64, FLOATS, INT8_ROWWISE, TAIL_BYTES, U8, RowCast
from dist_export.plan.selection import Selection

SOURCE = "source"
"""Leaves a table as it is, where a later pattern would match it."""

INT8 = "int8"
"""The setting's name of ``int8_rowwise``."""


class CastCount(NamedTuple):
    """What the values of some rows of one table lost when they were cast."""

    values: int = 0
    """That were cast, rows that are left behind not counted."""
    nans: int = 0
    out_of_range: int = 0
    worst: float = 0.0
    total: float = 0.0
    """Largest absolute error, and the sum of all, over the values that fit."""
    first_row: int = -1
    """The row of the part that has the first value that does not fit; -1 where all do."""
    first_id: int = 0

    @property
    def unfit(self) -> int:
        """The values that do not fit."""
        return self.nans + self.out_of_range


def cast_slots(checkpoint: Checkpoint, selection: Selection, dtypes: Sequence[tuple[str, str]]) -> Selection:
    """Return the selection with the embeddings of some tables in other dtypes.

    Args:
        checkpoint: the source.
        selection: what is kept of it, as stored.
        dtypes: (pattern of table names, dtype) in order; the first that matches counts.

    Raises:
        PlanError: a pattern that matches no table, or rows that cannot be cast.
    """
    names = [table.name_in_source for table in checkpoint.tables]
    for pattern, _ in dtypes:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise PlanError(
                f"dtype: the pattern {pattern!r} matches no table of the checkpoint, which has {', '.join(names) or 'none'}"
            )
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
    """Return what makes rows of one slot of the other; None where they are the same."""
    if (stored.dtype, stored.encoding) == (written.dtype, written.encoding):
        return None
    return RowCast(stored.dtype, written.dtype, written.encoding, math.prod(stored.values_shape), stored.encoding)


def check_defaults(checkpoint: Checkpoint, selection: Selection) -> None:
    """Refuse default rows that the dtype in which their table is written cannot hold. PlanError."""
    for table, slots in zip(checkpoint.tables, selection.kept, strict=True):
        default = table.default_row
        if default is None or isinstance(default, str):
            continue
        slot = next(slot for slot in slots if slot.name == EMBEDDING_SLOT)
        if not slot.encoding and cast_of(table.slots[slot.column], slot) is None:
            continue  # it was held against the source's dtype
        cast = RowCast(F64, slot.dtype, slot.encoding, math.prod(slot.values_shape))
        rows = np.array([default], np.float64).view(np.uint8)
        outcome = cast.encode_into(np.empty((1, cast.target_bytes), np.uint8), rows)
        if outcome.out_of_range:
            raise PlanError(
                f"default_row: a value for table {table.name!r} does not fit {cast.name}, in which the table is written "
                f"({cast.range_text})"
            )


def casts_by_table(checkpoint: Checkpoint, selection: Selection) -> dict[str, RowCast]:
    """Return the casts of all tables that have one, by the table's name."""
    found = {}
    for table, slots in zip(checkpoint.tables, selection.kept, strict=True):
        for slot in slots:
            cast = cast_of(table.slots[slot.column], slot)
            if cast is not None:
                found[table.name] = cast
    return found


def note_unreadable(checkpoint: Checkpoint, selection: Selection) -> list[str]:
    """Return a note where rows have a dtype that RecIS's loader has no embeddings of: it reads F64, F32, F16 and I8.

    Of what does not come from RecIS, only tables that to_hash_tables makes RecIS's are for that loader.
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

"""The tables of a base as a delta carries them whose tables are not exported: all rows stay as they are. Pure."""

from __future__ import annotations

import glob
import math
from typing import Any

import msgspec
import numpy as np

from dist_export.checkpoint.metadata import ABSENT, Blocks, Checkpoint, LeftOutTable, Parts, SlotMeta, TableMeta
from dist_export.config.prune_rules import SAME
from dist_export.formats.dtypes import CODE_BY_TORCH, DTYPES, I64
from dist_export.formats.recis import EMBEDDING_SLOT, HASH_SIZE, ID_SLOT
from dist_export.formats.row_encodings import F32, U8, RowCast
from dist_export.humanize import few
from dist_export.manifest import DeltaEntry, Manifest, SlotEntry, TableEntry
from dist_export.storage.directory import Directory


def carry_tables(base: Manifest, directory: Directory, source: Checkpoint | None) -> Checkpoint:
    """Return the tables of a base as a source of which no row is exported. All are hash tables, as those of each delta.

    Args:
        base: the manifest.
        directory: of the base, for messages.
        source: the checkpoint, whose dense tensors among the sparse files are exported; None if it has no such files.
    """
    tables = tuple(_carry(table) for table in base.tables)
    numbers = np.arange(len(tables), dtype=np.int64)
    shape = (len(tables), max((len(table.slots) for table in tables), default=1))
    nothing, size = np.zeros_like(numbers), np.full_like(numbers, HASH_SIZE)
    left_out = () if base.left_out_tables is msgspec.UNSET else base.left_out_tables
    return Checkpoint(
        format="package",
        directory=directory if source is None else source.directory,
        files=() if source is None else source.files,
        tables=tables,
        parts=Parts(table=numbers, begin=nothing, end=size, size=size, rows=nothing),
        blocks=Blocks(
            file=np.full(shape, ABSENT, np.int32), offset=np.zeros(shape, np.int64), key=np.full(shape, None, object)
        ),
        dense=() if source is None else source.dense,
        fingerprint=base.digest if source is None else f"{base.digest} {source.fingerprint}",
        copy_hindrances=(),
        verbatim={},
        warnings=(),
        left_out=tuple(LeftOutTable(name=its.name, rows=its.rows, reason=its.reason) for its in left_out),
    )


def settings_of(base: Manifest) -> dict[str, Any]:
    """Return the settings of tables that a base was written with, as far as they name and keep what it has."""
    kept = [(name_in_source(table), slot.name) for table in base.tables for slot in table.kept]
    renamed = [table for table in base.tables if table.source_name is not msgspec.UNSET]
    return {
        "keep_slots": [
            f"{glob.escape(table)}.{glob.escape(slot)}" for table, slot in kept if slot not in (ID_SLOT, EMBEDDING_SLOT)
        ],
        "rename_tables": {glob.escape(name_in_source(table)): table.name for table in renamed},
        "default_row": {
            glob.escape(name_in_source(table)): table.default_row
            if isinstance(table.default_row, str)
            else list(table.default_row)
            for table in base.tables
            if table.default_row is not msgspec.UNSET
        },
    }


def encodings_of(base: Manifest) -> dict[str, RowCast]:
    """Return by table how the rows of a base are decoded, of those that are not plain values."""
    return {
        table.name: RowCast(F32, U8, str(slot.encoding), _width(slot))
        for table in base.tables
        for slot in table.kept
        if slot.name == EMBEDDING_SLOT and slot.encoding is not msgspec.UNSET
    }


def account_carried(entry: TableEntry, in_base: TableEntry) -> TableEntry:
    """Return the entry of a table with the account of rows that all stay the same."""
    rows = in_base.rows_out
    return msgspec.structs.replace(
        entry,
        rows_in=rows,
        rows_dropped={SAME: rows} if rows else {},
        delta=DeltaEntry(rows_base=rows, same=rows, changed=0, new=0, deleted=0),
    )


def find_other_table(checkpoint: Checkpoint, base: Manifest) -> str | None:
    """Return why the tables of a base cannot be those of a checkpoint, as the end of a sentence about the base; None if they can.

    Metadata alone is compared: names, the width of rows, and the number of rows where a row is found by its number.
    """
    theirs = {name_in_source(table): table for table in base.tables}
    left_out = [] if base.left_out_tables is msgspec.UNSET else [table.name for table in base.left_out_tables]
    known = {*theirs, *left_out}
    if lacking := [table.name_in_source for table in checkpoint.tables if table.name_in_source not in known]:
        return f"it lacks the tables {few(lacking)}, which the checkpoint has"
    ours = {table.name_in_source: number for number, table in enumerate(checkpoint.tables)}
    if surplus := [name for name in theirs if name not in ours]:
        return f"it has the tables {few(surplus)}, which the checkpoint lacks"
    for name, entry in theirs.items():
        rows = int(checkpoint.parts.rows[checkpoint.parts.of_table(ours[name])].sum())
        if reason := _compare(checkpoint.tables[ours[name]], entry, rows):
            return f"its table {entry.name!r} {reason}"
    return None


def _compare(table: TableMeta, entry: TableEntry, rows: int) -> str:
    if table.raw_ids is not None:
        return "has rows by the raw ids of a managed-collision module, which maps them to other rows by now"
    if entry.is_row_indexed and table.has_ids:
        return "is row-indexed, and that of the checkpoint has ids"
    if not table.has_ids and entry.is_row_indexed and entry.rows_out != rows:
        return f"has {entry.rows_out:,} rows by number, and that of the checkpoint {rows:,}"
    widths = [math.prod(slot.values_shape) for slot in table.slots if slot.name == EMBEDDING_SLOT]
    before = [_width(slot) for slot in entry.kept if slot.name == EMBEDDING_SLOT]
    if widths != before:
        return f"has rows of {before[0]:,} values, and that of the checkpoint of {widths[0]:,}"
    return ""


def _carry(entry: TableEntry) -> TableMeta:
    ids = SlotMeta(name=ID_SLOT, dtype=I64, inner_shape=(), row_bytes=8, column=0)
    slots = [slot for slot in entry.kept if slot.name != ID_SLOT]
    return TableMeta(
        name=entry.name,
        slots=(ids, *(_carry_slot(slot, column) for column, slot in enumerate(slots, 1))),
        source_name=None if entry.source_name is msgspec.UNSET else entry.source_name,
        default_row=None if entry.default_row is msgspec.UNSET else entry.default_row,
    )


def _carry_slot(slot: SlotEntry, column: int) -> SlotMeta:
    dtype = CODE_BY_TORCH[slot.dtype]
    return SlotMeta(
        name=slot.name,
        dtype=dtype,
        inner_shape=tuple(slot.shape),
        row_bytes=math.prod(slot.shape) * DTYPES[dtype].itemsize,
        column=column,
        encoding="" if slot.encoding is msgspec.UNSET else slot.encoding,
        earlier_casts=slot.casts,
        is_ignored=slot.is_ignored is True,
    )


def _width(slot: SlotEntry) -> int:
    return math.prod(slot.shape) if slot.dim is msgspec.UNSET else slot.dim


def name_in_source(table: TableEntry) -> str:
    """Return the name that the trainer has for a table."""
    return table.name if table.source_name is msgspec.UNSET else table.source_name

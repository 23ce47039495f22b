"""Whether a package can be the base of a delta: it must hold the same tables, as they would be written now. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from dist_export.checkpoint.metadata import Checkpoint, SlotMeta
from dist_export.errors import PlanError
from dist_export.formats.dtypes import DTYPES
from dist_export.formats.recis import EMBEDDING_SLOT, ID_SLOT
from dist_export.humanize import few
from dist_export.manifest import Manifest, SlotEntry, TableEntry, count_served, list_entries
from dist_export.plan.selection import Selection


def state_of(layers: Sequence[Manifest]) -> Manifest:
    """Return what a package serves as if it were a full one: its tables with the rows and the parts of all that is below it.

    ``layers``: its manifest, that of its base, and so on.
    """
    tables = []
    for table in layers[0].tables:
        entries = list_entries(layers, table.name)
        is_hashed = entries[-1].is_hashed if len(entries) == len(layers) else table.is_hashed
        parts = tuple(part for its in entries for part in its.parts)
        tables.append(msgspec.structs.replace(table, is_hashed=is_hashed, rows_out=count_served(table), parts=parts))
    return msgspec.structs.replace(layers[0], tables=tuple(tables))


def row_indexed_in(base: Manifest) -> frozenset[str]:
    """Return the names of the base's tables whose rows go by number. A delta holds their rows under these numbers as ids."""
    return frozenset(table.name for table in base.tables if table.is_row_indexed)


def find_mismatch(checkpoint: Checkpoint, selection: Selection, base: Manifest) -> str | None:
    """Return why no delta against ``base`` can be made, as the end of a sentence about it; None if one can.

    Args:
        checkpoint: the tables that are exported. Those that are row-indexed in the base are hash tables of row numbers.
        selection: the slots that are kept.
        base: the manifest of the base.
    """
    ours = {table.name: number for number, table in enumerate(checkpoint.tables)}
    theirs = {table.name: table for table in base.tables}
    if lacking := [name for name in ours if name not in theirs]:
        return f"it lacks the tables {few(lacking)}"
    if surplus := [name for name in theirs if name not in ours]:
        return f"it has the further tables {few(surplus)}"
    for name, number in ours.items():
        rows = int(checkpoint.parts.rows[checkpoint.parts.of_table(number)].sum())
        if reason := _compare(checkpoint, selection, number, theirs[name], rows):
            return f"its table {name!r} {reason}"
    return None


def find_ignored(selection: Selection, names: Sequence[str]) -> tuple[frozenset[str], ...]:
    """Return which of these slots each table keeps, by table. PlanError if no table keeps one of them."""
    kept = [[slot.name for slot in slots] for slots in selection.kept]
    if unknown := sorted({*names}.difference(*kept)):
        having = sorted({name for slots in kept for name in slots} - {ID_SLOT, EMBEDDING_SLOT})
        raise PlanError(
            f"delta_ignore_slots: no table keeps the slot {unknown[0]!r}; kept besides {ID_SLOT} and {EMBEDDING_SLOT}: "
            f"{few(having) if having else 'none'}"
        )
    return tuple(frozenset(names).intersection(slots) for slots in kept)


def _compare(checkpoint: Checkpoint, selection: Selection, number: int, theirs: TableEntry, rows: int) -> str | None:
    table = checkpoint.tables[number]
    is_whole = checkpoint.dump is None  # rows of dumps have ids, row numbers or not, and are few
    if theirs.is_row_indexed and table.has_ids and is_whole:
        return "is row-indexed, and that of the checkpoint has ids"
    if not theirs.is_row_indexed and not table.is_hashed:
        return "is a hash table, and that of the checkpoint is row-indexed (see to_hash_tables)"
    if theirs.is_row_indexed and theirs.rows_out > rows and is_whole:
        return f"has {theirs.rows_out:,} rows by number, and that of the checkpoint {rows:,}"
    if any(
        part.rows and part.row_index is msgspec.UNSET and not isinstance(part.first_row, int) for part in theirs.parts
    ):
        return "has no row index; export the base with row_index: true"
    now = [f"{slot.name} {describe_slot(slot)}" for slot in selection.kept[number] if slot.name != ID_SLOT]
    before = [f"{slot.name} {describe_slot_entry(slot)}" for slot in theirs.kept if slot.name != ID_SLOT]
    if now != before:
        return f"has the slots {', '.join(before)}, and would be written with {', '.join(now)}"
    return None


def describe_slot(slot: SlotMeta) -> str:
    """Return the dtype or encoding of a slot, and its shape; as :func:`describe_slot_entry`, so that both can be compared."""
    shape = slot.inner_shape if slot.stored_shape is None else slot.stored_shape
    return f"{slot.encoding or DTYPES[slot.dtype].torch} {list(shape)}"


def describe_slot_entry(slot: SlotEntry) -> str:
    """Return the same of a slot in a package."""
    encoding = "" if slot.encoding is msgspec.UNSET else slot.encoding
    return f"{encoding or slot.dtype} {list(slot.shape)}"

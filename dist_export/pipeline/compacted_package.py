"""What a compacted package takes from its delta: the files that are not of tables, and the account of the checkpoint."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from dist_export.config.prune_rules import REPLACED, SAME
from dist_export.errors import CommitError
from dist_export.formats.delta_entries import CompactedEntry, DeltaEntry
from dist_export.formats.dtypes import CODE_BY_TORCH, DTYPES
from dist_export.formats.recis import INDEX, MERGED, TENSORKEY
from dist_export.formats.row_encodings import INT8_ROWWISE, TAIL_BYTES
from dist_export.manifest import (
    SCHEMA_VERSION,
    AccountEntry,
    CastEntry,
    Manifest,
    SlotEntry,
    TableEntry,
)
from dist_export.package.reader import Package
from dist_export.package.stored_rows import row_bytes_of
from dist_export.pipeline.account import BY_CAST
from dist_export.pipeline.base_package import describe_base, refuse_replaced_base
from dist_export.pipeline.reused_program import TakenOver, read_checked


class TakenFromDelta(TakenOver):
    """The small files of a delta package, byte by byte, and its account of the checkpoint. Rank 0 alone."""

    def __init__(self, package: Package) -> None:
        """``package`` is the delta, open with its base."""
        super().__init__()
        assert package.base is not None
        self._delta = package
        self._source, self._manifest = package.directory, package.manifest

    def read(self) -> dict[str, bytes]:
        """Return the files by path, each compared with its digest. CheckpointError."""
        manifest = self._delta.manifest
        of_tables = list_table_files(manifest) | {INDEX, TENSORKEY, MERGED}
        files = [file for file in manifest.files if file.path not in of_tables]
        return {file.path: read_checked(self._delta.directory, file) for file in files}

    def describe(self, manifest: Manifest) -> Manifest:
        """Return the manifest that an export of the delta's checkpoint would have. CommitError if a package was replaced."""
        delta, own = self._delta, self._delta.manifest
        *between, base = delta.layers[1:]
        refuse_replaced_base(delta)
        carried = tuple(note for note in dict.fromkeys(own.notes) if note not in manifest.notes)
        return msgspec.structs.replace(
            manifest,
            schema_version=SCHEMA_VERSION,
            source=own.source,
            compacted=CompactedEntry(
                delta=describe_base(delta),
                between=tuple(map(describe_base, between)) or msgspec.UNSET,
                base=describe_base(base),
            ),
            left_out_tables=own.left_out_tables,
            account=account_for_bytes(own, base.manifest),
            prune=own.prune,
            dense_tensors=own.dense_tensors,
            dropped_dense_tensors=own.dropped_dense_tensors,
            dense=own.dense,
            parity=own.parity,
            drift=own.drift,
            score=own.score,
            serving=own.serving,
            notes=(*carried, *manifest.notes),
            run={**manifest.run, "carried_notes": len(carried)},
        )


def account_for_bytes(delta: Manifest, base: Manifest) -> AccountEntry | msgspec.UnsetType:
    """Return the account of the checkpoint's payload, with the rows that the delta left to its base among those exported.

    None if the source does not tell what it holds, or if tables that were cast are one tensor of it: such bytes count once.
    """
    account = delta.account
    if isinstance(account, msgspec.UnsetType) or isinstance(base.account, msgspec.UnsetType):
        return msgspec.UNSET
    dropped = dict(account.dropped)
    same = dropped.pop(SAME, 0)
    if not same:
        return account
    if base.account.dropped.get(BY_CAST, 0) != sum(_saved_by_cast(table, table.rows_out) for table in base.tables):
        return msgspec.UNSET
    rows = ((table, table.delta.same) for table in delta.tables if isinstance(table.delta, DeltaEntry))
    by_cast = sum(_saved_by_cast(table, num_rows) for table, num_rows in rows)
    if by_cast:
        dropped[BY_CAST] = dropped.get(BY_CAST, 0) + by_cast
    return msgspec.structs.replace(account, exported=account.exported + same - by_cast, dropped=dropped)


def _saved_by_cast(table: TableEntry, num_rows: int) -> int:
    """Return the bytes that casts to a narrower dtype save in so many rows of a table."""
    saved = 0
    for slot in table.kept:
        if isinstance(slot.cast, CastEntry):
            dim = slot.dim if isinstance(slot.dim, int) else math.prod(slot.shape)
            is_packed = slot.cast.source_dtype == INT8_ROWWISE
            before = dim + TAIL_BYTES if is_packed else dim * DTYPES[CODE_BY_TORCH[slot.cast.source_dtype]].itemsize
            saved += num_rows * max(before - row_bytes_of(slot), 0)
    return saved


def list_table_files(manifest: Manifest) -> set[str]:
    """Return the files of a package that hold its tables: shards, row indexes, row fingerprints and deleted ids."""
    found: set[str] = set()
    for table in manifest.tables:
        for part in table.parts:
            found.add(part.file)
            found |= {its.file for its in (part.row_index, part.row_fingerprints) if its is not msgspec.UNSET}
        if isinstance(table.delta, DeltaEntry):
            found |= {its.file for its in table.delta.deleted_ids}
    return found


def account_for_table(entry: TableEntry, layers: Sequence[TableEntry]) -> TableEntry:
    """Return the entry of a table of the compacted package, with the account of the delta's checkpoint.

    Args:
        entry: as the check of the written files has it, of all packages as the source.
        layers: that of the delta, and those of the packages below it that have such a table.

    Raises:
        CommitError: the rows are not those that the account of the delta says.
    """
    own = layers[0]
    delta = own.delta
    assert isinstance(delta, DeltaEntry)
    dropped = entry.rows_dropped
    found = (entry.rows_out, dropped.get(REPLACED, 0))
    # the rows of a row-indexed table are replaced while they are read
    num_rows = delta.same + own.rows_out
    wanted = (num_rows, 0 if entry.is_row_indexed else sum(its.rows_out for its in layers) - num_rows)
    if found != wanted:
        raise CommitError(
            f"table {entry.name!r}: {found[0]:,} rows were written, and {found[1]:,} below replaced or deleted; by the "
            f"account of the delta it is {wanted[0]:,} and {wanted[1]:,}. No manifest was written; run verify on all packages"
        )
    rows_dropped = {reason: rows for reason, rows in own.rows_dropped.items() if reason != SAME}
    slots = {slot.name: slot for slot in own.kept}
    return msgspec.structs.replace(
        entry,
        rows_in=own.rows_in,
        rows_dropped=rows_dropped,
        misplaced=own.misplaced,
        repaired=own.repaired,
        duplicates=own.duplicates,
        kept=tuple(
            msgspec.structs.replace(
                _add_casts(slot, [its for layer in layers for its in layer.kept if its.name == slot.name]),
                is_ignored=_is_ignored(delta, slots.get(slot.name)) or msgspec.UNSET,
            )
            for slot in entry.kept
        ),
        dropped=own.dropped,
        source_name=own.source_name,
        default_row=own.default_row,
    )


def _is_ignored(delta: DeltaEntry, own: SlotEntry | None) -> bool:
    """Whether rows of the base have older values of a slot: the delta did not compare it, or has it so from its base."""
    if own is None or not delta.same:
        return False
    return own.is_ignored is True or (delta.ignored_slots is not msgspec.UNSET and own.name in delta.ignored_slots)


def note_ignored(tables: tuple[TableEntry, ...], delta: Manifest) -> list[str]:
    """Return a note for each slot of which some rows have older values."""
    same = {table.name: table.delta.same for table in delta.tables if isinstance(table.delta, DeltaEntry)}
    return [
        f"table {table.name!r}: slot {slot.name!r} was not compared (delta_ignore_slots), so its {same[table.name]:,} rows that "
        "stayed have the base's values of it, and not those of the checkpoint"
        for table in tables
        for slot in table.kept
        if slot.is_ignored is True
    ]


def _add_casts(slot: SlotEntry, layers: Sequence[SlotEntry]) -> SlotEntry:
    """Return a slot with the casts of the delta, its first layer, and those below it together with them."""
    if not layers:
        return msgspec.structs.replace(slot, cast=msgspec.UNSET, earlier_casts=msgspec.UNSET)
    cast = layers[0].cast
    for below in layers[1:]:
        if isinstance(cast, CastEntry) and isinstance(below.cast, CastEntry):
            cast = _join_casts(cast, below.cast)
    return msgspec.structs.replace(slot, cast=cast, earlier_casts=layers[0].earlier_casts)


def _join_casts(one: CastEntry, other: CastEntry) -> CastEntry:
    fit = [its.values - its.out_of_range for its in (one, other)]
    total = one.mean_abs_error * fit[0] + other.mean_abs_error * fit[1]
    return msgspec.structs.replace(
        one,
        values=one.values + other.values,
        max_abs_error=max(one.max_abs_error, other.max_abs_error),
        mean_abs_error=total / max(sum(fit), 1),
        nans=one.nans + other.nans,
        out_of_range=one.out_of_range + other.out_of_range,
    )

"""The steps of a delta: account for its tables against the base, and write which ids are gone. Nothing in a full export."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
import numpy as np

from dist_export.config.prune_rules import SAME
from dist_export.delta.deleted_ids import WrittenIds, share_seen, write_deleted
from dist_export.delta.same_rows import Compared
from dist_export.dense.source_rows import SourceRows
from dist_export.errors import CommitError
from dist_export.formats.deleted_ids import ID
from dist_export.manifest import DeletedIdsEntry, DeltaEntry, TableEntry, count_served
from dist_export.package.reader import Package
from dist_export.pipeline.planning import PlannedSparse, open_written
from dist_export.pipeline.refresh import account_for_carried
from dist_export.pipeline.state import ExportState
from dist_export.storage.directory import Directory
from dist_export.workdir.presence import Written, note_written


def account_for_base(export: ExportState) -> ExportState:
    """Write the deleted ids, and add to each table its account against the base. All ranks.

    Raises:
        CommitError: the rows of a table do not add up.
    """
    task, planned, base = export.task, export.planned, export.base
    if task.config.is_refresh:
        return account_for_carried(export)
    if base is None or planned is None or planned.same is None:
        return export
    ranks, same = task.ranks, planned.same
    counts = _add_up(ranks.all_gather("count what the base has", lambda: same.counts))
    in_base = {table.name: table for table in base.manifest.tables}
    is_whole = planned.plan.checkpoint.dump is None
    entries = [
        (number, *_add_untouched(entry, in_base[entry.name], counts.get(number, Compared()), is_whole=is_whole))
        for number, entry in enumerate(export.tables)
    ]
    tables = tuple(entry for _, entry, _ in entries)

    def account() -> list[DeltaEntry]:
        return [_account(entry, in_base[entry.name], its, same.ignored[number]) for number, entry, its in entries]

    deltas = ranks.check("account for the base", account)
    losing = {number: same.served[number] for number, _, _ in entries if deltas[number].deleted}
    seen = share_seen(ranks, base, losing, same.seen) if losing else {}
    written: Written = {}

    def write() -> list[WrittenIds]:
        return write_deleted(export.target, losing, seen, digest=task.config.digest, tuning=task.tuning)

    with task.reporter.stage("write deleted ids"):
        shares = ranks.all_gather("write the deleted ids", write)
        files = sorted((its for share in shares for its in share), key=lambda its: its.file.path)
        ranks.broadcast(
            "look at the deleted ids",
            lambda: written.update(note_written(export.target, {its.file.path: its.file.num_bytes for its in files})),
        )
    accounted = ranks.check("add the deleted ids", lambda: _add_entries(tables, deltas, files))
    return export.grown(
        tables=accounted, deleted_files=tuple(its.file for its in files), written={**export.written, **written}
    )


def _add_up(shares: list[dict[int, Compared]]) -> dict[int, Compared]:
    total: dict[int, Compared] = {}
    for share in shares:
        for table, counts in share.items():
            total[table] = total.get(table, Compared()).plus(counts)
    return total


def _add_untouched(
    entry: TableEntry, in_base: TableEntry, counts: Compared, *, is_whole: bool
) -> tuple[TableEntry, Compared]:
    """Return the entry and the counts of a table with the rows that a partial source leaves to the base unseen.

    They are counted as rows that came in and are the same. Of a whole source there are none: what it lacks is deleted.
    """
    untouched = 0 if is_whole else count_served(in_base) - counts.same - counts.changed
    if untouched <= 0:
        return entry, counts
    dropped = {**entry.rows_dropped, SAME: entry.rows_dropped.get(SAME, 0) + untouched}
    grown = msgspec.structs.replace(entry, rows_in=entry.rows_in + untouched, rows_dropped=dropped)
    return grown, counts.plus(Compared(same=untouched))


def _account(entry: TableEntry, in_base: TableEntry, counts: Compared, ignored: frozenset[str]) -> DeltaEntry:
    same = entry.rows_dropped.get(SAME, 0)
    deleted = count_served(in_base) - counts.same - counts.changed
    if counts.same != same or counts.changed + counts.new != entry.rows_out or deleted < 0:
        raise CommitError(
            f"table {entry.name!r}: the account against the base does not add up: {counts.same:,} rows are the same and "
            f"{same:,} were left out, {counts.changed:,} changed and {counts.new:,} are new of {entry.rows_out:,} that were "
            f"written, and the base has {count_served(in_base):,}. No manifest was written; run the export again"
        )
    return DeltaEntry(
        rows_base=count_served(in_base),
        same=same,
        changed=counts.changed,
        new=counts.new,
        deleted=deleted,
        ignored_slots=tuple(sorted(ignored)) or msgspec.UNSET,
    )


def _add_entries(
    tables: tuple[TableEntry, ...], deltas: list[DeltaEntry], files: list[WrittenIds]
) -> tuple[TableEntry, ...]:
    """Return the tables' entries with their accounts. CommitError if fewer or more ids were written than are gone."""
    added = []
    for number, (entry, delta) in enumerate(zip(tables, deltas, strict=True)):
        lists: list[DeletedIdsEntry] = [its for file in files for its in file.entries.get(number, ())]
        found = sum(its.ids for its in lists)
        if found != delta.deleted:
            raise CommitError(
                f"table {entry.name!r}: {delta.deleted:,} ids of the base are gone, and {found:,} were written. No manifest "
                "was written; run the export again"
            )
        added.append(msgspec.structs.replace(entry, delta=msgspec.structs.replace(delta, deleted_ids=tuple(lists))))
    return tuple(added)


def describe_written_rows(export: ExportState, planned: PlannedSparse) -> SourceRows:
    """Return the rows of the written shards, with those that a delta leaves to its base. All ranks."""
    written = open_written(export.task.ranks, export.target, planned.plan)
    base = export.base
    return SourceRows(
        checkpoint=written,
        misplaced=np.zeros(len(written.parts), np.int64),  # the check has proven that each id lies in its part's slice
        is_written=True,
        in_base=None if base is None else InBase(base, export.target, export.tables).find,
    )


class InBase:
    """Rows that the written shards of a delta leave to the base. Any rank."""

    def __init__(self, base: Package, target: Directory, tables: tuple[TableEntry, ...]) -> None:
        """``tables`` are those of the delta, with their accounts."""
        self._base = base
        self._target = target
        self._tables: Mapping[str, TableEntry] = {table.name: table for table in tables}

    def find(self, table: str, slot: str, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return rows of ids (int64, (n,)) as they are stored, uint8 (n, row_bytes), and which ids have one, bool (n,)."""
        rows, has_row = self._base.lookup(table, ids, slot=slot, raw=True)
        delta = self._tables[table].delta
        lists = () if delta is msgspec.UNSET else delta.deleted_ids
        for its in lists:
            deleted = np.frombuffer(self._target.read(its.file), ID, its.ids, its.offset)
            has_row &= ~np.isin(ids, deleted)
        return rows, has_row

"""Look rows up in a delta package: the rows of its base, without those of deleted ids, and on top of them its own."""

from __future__ import annotations

import numpy as np

from dist_export.errors import PackageError
from dist_export.formats.deleted_ids import ID, find_fault
from dist_export.formats.delta_entries import DeltaEntry
from dist_export.formats.id_list import IdList, IdSieve
from dist_export.manifest import SlotEntry, TableEntry
from dist_export.package.opened_files import OpenedFiles
from dist_export.package.slot_reader import SlotReader

_RUN_ROWS = 1 << 20
_SPREAD = 4
"""2 to the power of this is how many bits the sieve has for each id, at least."""
_MOST_IN_SIEVE = 1 << 26
"""A delta of more rows gets no sieve: it would take too long to build, and no longer fit into a core's cache."""


class DeltaIds:
    """The ids of a delta package by table: deleted ids, and a sieve for all ids of which the delta says anything. Any thread.

    Those of a table are read once.
    """

    def __init__(self, files: OpenedFiles) -> None:
        self._files = files
        self._deleted: dict[str, IdList | None] = {}
        self._sieves: dict[str, IdSieve | None] = {}

    def deleted(self, table: TableEntry) -> IdList | None:
        """Return the deleted ids of a table; None if there are none. PackageError if their files are damaged."""
        if table.name not in self._deleted:
            assert isinstance(table.delta, DeltaEntry)
            ids = read_deleted(self._files, table.name, table.delta)
            self._deleted[table.name] = IdList(ids) if len(ids) else None
        return self._deleted[table.name]

    def sieve(self, table: TableEntry, reader: SlotReader) -> IdSieve | None:
        """Return what the rows of a table and its deleted ids pass; None if the delta has too many. ``reader`` reads the ids."""
        if table.name not in self._sieves:
            self._sieves[table.name] = self._build_sieve(table, reader)
        return self._sieves[table.name]

    def _build_sieve(self, table: TableEntry, reader: SlotReader) -> IdSieve | None:
        deleted = self.deleted(table)
        assert isinstance(table.delta, DeltaEntry)
        num_ids = table.rows_out + (0 if deleted is None else len(deleted))
        if num_ids > min(_MOST_IN_SIEVE, table.delta.rows_base // 2):
            return None
        sieve = IdSieve(num_ids, spread=_SPREAD)
        if deleted is not None:
            sieve.add(deleted.ids)
        for number, part in enumerate(table.parts):
            for first in range(0, part.rows, _RUN_ROWS):
                sieve.add(reader.read_ids(number, first, min(first + _RUN_ROWS, part.rows)))
        return sieve


def read_deleted(files: OpenedFiles, table: str, entry: DeltaEntry) -> np.ndarray:
    """Return the deleted ids of a table, int64 (n,), in ascending order. PackageError if their files are damaged."""
    contents = {name: files.read(name) for name in sorted({its.file for its in entry.deleted_ids})}
    lists = []
    for its in entry.deleted_ids:
        if fault := find_fault(contents[its.file], its.offset, its.ids):
            raise PackageError(
                f"{files.describe(its.file)}: the deleted ids of table {table!r} are damaged: {fault}. Run verify, and export "
                "again"
            )
        lists.append(np.frombuffer(contents[its.file], ID, its.ids, its.offset))
    ids = np.sort(np.concatenate([np.zeros(0, np.int64), *lists]))
    if len(ids) != entry.deleted:
        raise PackageError(
            f"{files.url}: the manifest says {entry.deleted:,} deleted ids of table {table!r}, and its files have "
            f"{len(ids):,}. Run verify, and export again"
        )
    return ids


class LayeredReader:
    """Reads rows of one slot of a table from a delta package and its base. Any thread."""

    def __init__(self, table: TableEntry, base: SlotReader | None, delta: SlotReader, ids: DeltaIds) -> None:
        """Prepare to read. ``base`` is None if the base has no such table."""
        self.slot: SlotEntry = delta.slot
        self._table = table
        self._base = base
        self._delta = delta
        self._ids = ids

    def read(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows of ids and which ids have one, as :meth:`SlotReader.read` does."""
        rows, has_row = self._delta.allocate(len(ids))
        if self._base is None:
            self._delta.fill(ids, rows, has_row)
        else:
            self._base.fill(ids, rows, has_row)
            sieve = self._ids.sieve(self._table, self._delta)
            if sieve is None:
                self._lay_over(ids, rows, has_row)
            else:
                self._lay_over_some(np.flatnonzero(sieve.passes(ids)), ids, rows, has_row)
        rows[~has_row] = 0
        return rows, has_row

    def _lay_over(self, ids: np.ndarray, rows: np.ndarray, has_row: np.ndarray) -> None:
        """Take the rows of deleted ids away, and put the rows of the delta over those of the base."""
        if (deleted := self._ids.deleted(self._table)) is not None:
            has_row[deleted.contains(ids)] = False
        self._delta.fill(ids, rows, has_row)

    def _lay_over_some(self, chosen: np.ndarray, ids: np.ndarray, rows: np.ndarray, has_row: np.ndarray) -> None:
        """Do the same for ``ids[chosen]`` alone: the delta says nothing of the others."""
        if not len(chosen):
            return
        sought = ids[chosen]
        if (deleted := self._ids.deleted(self._table)) is not None:
            has_row[chosen[deleted.contains(sought)]] = False
        own_rows, has_own = self._delta.allocate(len(sought))
        self._delta.fill(sought, own_rows, has_own)
        targets = chosen[has_own]
        rows[targets] = own_rows[has_own]
        has_row[targets] = True

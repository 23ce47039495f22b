"""Read the rows of given ids from a checkpoint without loading a table.

Columns of ids are scanned, and rows are read one by one. In a row-indexed table an id is a row's number, and only rows are read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dist_export.checkpoint.id_reader import read_ids
from dist_export.checkpoint.metadata import Checkpoint, SlotMeta
from dist_export.checkpoint.row_reader import RowReader
from dist_export.dense.found_rows import FoundRows, LocatedRows
from dist_export.formats.recis import is_in_slice


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceRows:
    """The rows of a checkpoint, and which of them are exported. Any rank reads for itself; no collective."""

    checkpoint: Checkpoint
    misplaced: np.ndarray | None = None
    """Rows by part (int64) that lie outside their part's slice; None where they were not counted."""
    dropped_in: Callable[[int, int, int], np.ndarray] | None = None
    """(part, first row, number of rows) -> which of these are not exported (int64, from the first row on). They are passed over
    here too, so that the sample sees what serving will."""
    is_pruned: Callable[[int, np.ndarray, np.ndarray], np.ndarray] | None = None
    """(part, rows within it, their ids) -> which of these are left out by rules (bool). They are passed over too."""
    is_written: bool = False
    """Whether these are the rows of the written shards, which were cast; the source's are yet to be."""
    in_base: Callable[[str, str, np.ndarray], tuple[np.ndarray, np.ndarray]] | None = None
    """(table, slot, ids) -> rows as they are stored, and which ids have one (bool): what a delta leaves to its base. None where
    the shards hold all rows."""

    def scan(self, table: int, slot: SlotMeta, ids: np.ndarray, located: LocatedRows) -> FoundRows:
        """Return what a table, given by its place in the checkpoint, has of ids (int64, sorted, without duplicates).

        ``located`` takes in where the rows of a hash table are.
        """
        found = FoundRows.nothing(ids, slot.row_bytes)
        if self.checkpoint.tables[table].is_hashed:
            self._fill_by_id(table, slot, found, located)
        else:
            self.fill_by_number(table, slot, found)
        left = np.flatnonzero(~found.has_row)
        if self.in_base is not None and len(left):
            rows, has_row = self.in_base(self.checkpoint.tables[table].name, slot.name, ids[left])
            its = left[has_row]
            found.has_row[its] = found.is_kept[its] = True
            found.rows[its] = found.kept[its] = rows[has_row]
        return found

    def fill_by_number(self, table: int, slot: SlotMeta, found: FoundRows) -> None:
        """Fill in rows by their numbers, which are the ids of ``found``. Neighbours are read in one call."""
        parts, ids = self.checkpoint.parts, found.ids
        with RowReader(self.checkpoint) as reader:
            for part in parts.of_table(table):
                if not reader.is_held(part, slot.column):
                    continue  # in the memory of another rank
                first_row, num_rows = parts.first_row_of(part), int(parts.rows[part])
                positions = np.arange(*np.searchsorted(ids, [first_row, first_row + num_rows]))
                found.has_row[positions] = found.is_kept[positions] = True
                if self.dropped_in is not None and len(positions):
                    dropped = self.dropped_in(part, 0, num_rows) + first_row
                    found.is_kept[positions[np.isin(ids[positions], dropped)]] = False
                if not len(positions) or not slot.row_bytes:
                    continue
                for run in np.split(positions, np.flatnonzero(np.diff(ids[positions]) != 1) + 1):
                    wanted = found.rows[run[0] : run[-1] + 1].reshape(-1)
                    reader.read_into(wanted, part, slot.column, int(ids[run[0]]) - first_row, len(run))
        found.kept[found.is_kept] = found.rows[found.is_kept]

    def _fill_by_id(self, table: int, slot: SlotMeta, found: FoundRows, located: LocatedRows) -> None:
        """Fill in the rows of a hash table: its columns of ids are scanned."""
        checkpoint, ids = self.checkpoint, found.ids
        for part in checkpoint.parts.of_table(table):
            may_hold = self.misplaced is None or self.misplaced[part] > 0
            if not len(ids) or not (may_hold or is_in_slice(ids, checkpoint.parts.slice_of(part)).any()):
                continue
            if not checkpoint.parts.rows[part]:
                continue
            first = 0
            with RowReader(checkpoint) as reader:
                if not (reader.is_held(part, 0) and reader.is_held(part, slot.column)):
                    continue  # in the memory of another rank, whose table this rank's model does not ask
                for held in read_ids(checkpoint, part):
                    positions = np.minimum(np.searchsorted(ids, held), len(ids) - 1)
                    wanted = np.flatnonzero(ids[positions] == held)
                    if len(wanted):
                        if not self.is_written:
                            located.add(table, part, first + wanted, held[wanted])
                        rows = np.zeros((len(wanted), slot.row_bytes), np.uint8)
                        if slot.row_bytes:
                            reader.read_each_into(rows, part, slot.column, first + wanted)
                        is_kept, is_pruned = self._judge(part, first, held, wanted)
                        # of an id that is there several times in one run, numpy takes the last, as the runs themselves do
                        its = positions[wanted]
                        found.is_pruned[its[is_pruned]] = True
                        found.has_row[its], found.rows[its] = True, rows
                        found.is_kept[its[is_kept]], found.kept[its[is_kept]] = True, rows[is_kept]
                    first += len(held)

    def _judge(self, part: int, first: int, held: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return which of the rows ``first + wanted`` of a part are exported, and which rules leave out (bool).

        ``held``: the ids of the rows from ``first`` on.
        """
        is_kept = np.ones(len(wanted), bool)
        is_pruned = np.zeros(len(wanted), bool)
        if self.dropped_in is not None:
            is_kept &= ~np.isin(wanted, self.dropped_in(part, first, len(held)))
        if self.is_pruned is not None and is_kept.any():
            is_pruned[is_kept] = self.is_pruned(part, first + wanted[is_kept], held[wanted[is_kept]])
            is_kept &= ~is_pruned
        return is_kept, is_pruned

"""Find the rows of given ids in the checkpoint without loading a table: id columns are scanned, rows read one by one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from dist_export.checkpoint.ids import read_ids
from dist_export.checkpoint.reader import Checkpoint, SlotMeta
from dist_export.checkpoint.rows import RowReader
from dist_export.layout.recis import EMBEDDING_SLOT, is_in_slice


class RowFinder:
    """Looks rows of a checkpoint up by id. Any rank, for itself; no collective."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        misplaced: np.ndarray | None,
        dropped_in: Callable[[int, int, int], np.ndarray] | None = None,
    ) -> None:
        """Look at ids only when asked.

        Args:
            checkpoint: where the rows are.
            misplaced: rows by part (int64) that lie outside their part's slice; None where they were not counted.
            dropped_in: (part, first row, number of rows) -> which of these are not exported (int64, from the first row
                on): they are passed over here too, so that the sample sees what serving will.
        """
        self._checkpoint = checkpoint
        self._misplaced = misplaced
        self._dropped_in = dropped_in

    def has_table(self, table: str) -> bool:
        """Whether the checkpoint has this table."""
        return self._checkpoint.table_index(table) is not None

    def table_names(self) -> list[str]:
        """Return the names of all tables."""
        return [table.name for table in self._checkpoint.tables]

    def embedding_of(self, table: str) -> SlotMeta:
        """Return dtype and shape of a table's embedding rows."""
        number = self._checkpoint.table_index(table)
        assert number is not None
        return next(slot for slot in self._checkpoint.tables[number].slots if slot.name == EMBEDDING_SLOT)

    def find(self, table: str, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return which of the ids the table holds (bool, (n,)) and their rows (uint8, (n, row_bytes); zeros if absent).

        Args:
            ids: int64, sorted, without duplicates.
        """
        checkpoint = self._checkpoint
        number = checkpoint.table_index(table)
        assert number is not None
        slot = self.embedding_of(table)
        has_row = np.zeros(len(ids), bool)
        rows = np.zeros((len(ids), slot.row_bytes), np.uint8)
        for part in checkpoint.parts.of_table(number):
            may_hold = self._misplaced is None or self._misplaced[part] > 0
            if not len(ids) or not (may_hold or is_in_slice(ids, checkpoint.parts.slice_of(part)).any()):
                continue
            if not checkpoint.parts.rows[part]:
                continue
            first = 0
            with RowReader(checkpoint) as reader:
                for held in read_ids(checkpoint, part):
                    places = np.minimum(np.searchsorted(ids, held), len(ids) - 1)
                    is_wanted = ids[places] == held
                    if self._dropped_in is not None:
                        is_wanted[self._dropped_in(part, first, len(held))] = False
                    wanted = np.flatnonzero(is_wanted)
                    has_row[places[wanted]] = True
                    if slot.row_bytes and len(wanted):
                        found = np.empty((len(wanted), slot.row_bytes), np.uint8)
                        reader.read_each_into(found, part, slot.column, first + wanted)
                        rows[places[wanted]] = found
                    first += len(held)
        return has_row, rows

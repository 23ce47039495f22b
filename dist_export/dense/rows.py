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
        *,
        only: Callable[[str, np.ndarray], np.ndarray] | None = None,
    ) -> None:
        """Look at ids only when asked.

        Args:
            checkpoint: where the rows are.
            misplaced: rows by part (int64) that lie outside their part's slice; None where they were not counted.
            dropped_in: (part, first row, number of rows) -> which of these are not exported (int64, from the first row
                on): they are passed over here too, so that the sample sees what serving will.
            only: (table, ids) -> which of the ids (bool) may be found: for a model that is exported from memory those that
                this rank's table holds itself, for another could not be taken out of it again.
        """
        self._only = only
        self._checkpoint = checkpoint
        self._misplaced = misplaced
        self._dropped_in = dropped_in

    @property
    def is_live(self) -> bool:
        """Whether the model's own tables are what is exported."""
        return self._checkpoint.memory is not None or self._only is not None

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

    def _find_allowed(
        self, table: str, ids: np.ndarray, only: Callable[[str, np.ndarray], np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray]:
        allowed = only(table, ids)
        self._only = None
        try:
            found, its = self.find(table, ids[allowed])
        finally:
            self._only = only
        has_row = np.zeros(len(ids), bool)
        rows = np.zeros((len(ids), its.shape[1]), np.uint8)
        has_row[allowed], rows[allowed] = found, its
        return has_row, rows

    def find(self, table: str, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return which of the ids the table holds (bool, (n,)) and their rows (uint8, (n, row_bytes); zeros if absent).

        Args:
            ids: int64, sorted, without duplicates.
        """
        if self._only is not None and len(ids):
            return self._find_allowed(table, ids, self._only)
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
                if not (reader.is_held(part, 0) and reader.is_held(part, slot.column)):
                    continue  # in the memory of another rank, whose table this rank's model does not ask
                for held in read_ids(checkpoint, part):
                    places = np.minimum(np.searchsorted(ids, held), len(ids) - 1)
                    is_wanted = ids[places] == held
                    if self._dropped_in is not None:
                        is_wanted[self._dropped_in(part, first, len(held))] = False
                    for row in np.flatnonzero(is_wanted).tolist():
                        place = int(places[row])
                        has_row[place] = True
                        if slot.row_bytes:
                            reader.read_into(rows[place], part, slot.column, first + row, 1)
                    first += len(held)
        return has_row, rows

"""What a lookup of ids in a checkpoint has found: the rows, and where they are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from dist_export.checkpoint.metadata import Checkpoint, SlotMeta
from dist_export.checkpoint.row_reader import RowReader

LOCATION_BYTES = 24
"""What a row takes in :class:`LocatedRows`."""

_PIECES = 16


class FoundRows(NamedTuple):
    """What one table holds of some ids. Rows are as the checkpoint has them (uint8, (n, bytes)), zeros where there are none."""

    ids: np.ndarray
    """int64, sorted, without duplicates."""
    has_row: np.ndarray
    rows: np.ndarray
    """The source's own: nothing is left out. Of an id with several rows, the last."""
    is_kept: np.ndarray
    kept: np.ndarray
    """The rows that are exported: no dropped duplicate, no pruned row."""
    is_pruned: np.ndarray
    """Whether rules leave a row of this id behind."""

    @classmethod
    def nothing(cls, ids: np.ndarray, row_bytes: int) -> FoundRows:
        """Return the answer of a table that has none of these ids; it is filled in."""
        rows = np.zeros((2, len(ids), row_bytes), np.uint8)
        flags = np.zeros((3, len(ids)), bool)
        return cls(ids, flags[0], rows[0], flags[1], rows[1], flags[2])

    def join(self, other: FoundRows) -> FoundRows:
        """Return both answers in one; they share no id."""
        order = np.argsort(np.concatenate([self.ids, other.ids]), kind="stable")
        return FoundRows(*(np.concatenate(pair)[order] for pair in zip(self, other, strict=True)))

    def of(self, ids: np.ndarray) -> FoundRows:
        """Return the answer for some of the ids (sorted, without duplicates)."""
        return FoundRows(*(column[np.searchsorted(self.ids, ids)] for column in self))


class LocatedRows:
    """Where the rows of looked-up ids are in a checkpoint: all rows of an id, whatever the settings leave of them."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._found: dict[int, list[np.ndarray]] = {}

    def add(self, table: int, part: int, rows: np.ndarray, ids: np.ndarray) -> None:
        """Take in rows (int64, (n,): their numbers within a part) and their ids (int64, (n,))."""
        found = np.stack([np.full(len(rows), part, np.int64), rows.astype(np.int64), ids])
        self._found.setdefault(table, []).append(found)

    def of(self, table: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return ids, parts and rows within these (int64, (n,)) of a table, in the order of the source."""
        parts, rows, ids = np.concatenate([np.zeros((3, 0), np.int64), *self._found.get(table, ())], axis=1)
        order = np.lexsort((rows, parts))
        return ids[order], parts[order], rows[order]

    def read(self, slot: SlotMeta, parts: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Return rows of one slot as the source stores them (uint8, (n, row_bytes)), one for each location."""
        found = np.zeros((len(rows), slot.row_bytes), np.uint8)
        if not slot.row_bytes:
            return found
        with RowReader(self._checkpoint) as reader:
            for part in np.unique(parts).tolist():
                its = np.flatnonzero(parts == part)
                values = np.empty((len(its), slot.row_bytes), np.uint8)
                reader.read_each_into(values, part, slot.column, rows[its])
                found[its] = values
        return found


def number_pieces(num_rows: int, row_bytes: int, max_bytes: int) -> Iterator[np.ndarray]:
    """Yield the numbers of rows (int64) in order, a piece at a time: a small part of ``max_bytes``."""
    step = max(1, max_bytes // _PIECES // max(1, row_bytes))
    for first in range(0, num_rows, step):
        yield np.arange(first, min(first + step, num_rows), dtype=np.int64)

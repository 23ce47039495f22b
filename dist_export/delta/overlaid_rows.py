"""The rows of a row-indexed table as its base has them, with those of deltas on top: read like a file, and in no file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dist_export.errors import TransferError
from dist_export.formats.delta_entries import DeltaEntry
from dist_export.manifest import TableEntry
from dist_export.package.reader import Package
from dist_export.package.slot_reader import SlotReader
from dist_export.storage.range_reader import RangeReader

_PIECE_BYTES = 1 << 20
_PIECE_IDS = 1 << 20


class BaseRun(NamedTuple):
    """Neighbouring rows of the table that one part of the base holds."""

    part: int
    begin: int
    end: int


class OverlaidRows(RangeReader):
    """Row 0 begins at byte 0, and rows follow each other. Any thread."""

    def __init__(
        self,
        where: str,
        base: SlotReader,
        runs: list[BaseRun],
        deltas: Sequence[SlotReader],
        *,
        row_bytes: int,
        piece_bytes: int = _PIECE_BYTES,
    ) -> None:
        """Read nothing yet.

        Args:
            where: for messages.
            base: of the full package.
            runs: all its rows, in their order.
            deltas: the last one first.
            row_bytes: of a row.
            piece_bytes: of rows that are read at once.
        """
        self.where = where
        self._base = base
        self._runs = runs
        self._deltas = deltas
        self._row_bytes = row_bytes
        self._step = max(1, piece_bytes // max(row_bytes, 1))

    def _fill(self, view: memoryview, offset: int) -> None:
        if not len(view):
            return
        target = np.frombuffer(view, np.uint8)
        end = offset + len(target)
        first, last = offset // self._row_bytes, -(-end // self._row_bytes)
        for begin in range(first, last, self._step):
            rows = self._read(begin, min(begin + self._step, last)).reshape(-1)
            at = begin * self._row_bytes
            low, high = max(offset, at), min(end, at + len(rows))
            target[low - offset : high - offset] = rows[low - at : high - at]

    def _read(self, begin: int, end: int) -> np.ndarray:
        """Return rows ``begin`` to ``end`` - 1: uint8, (n, row_bytes). TransferError if one is in no package."""
        rows, has_row = self._base.allocate(end - begin)
        for run in self._runs:
            low, high = max(begin, run.begin), min(end, run.end)
            if low < high:
                rows[low - begin : high - begin] = self._base.read_run(run.part, low - run.begin, high - run.begin).rows
                has_row[low - begin : high - begin] = True
        for delta in reversed(self._deltas):
            delta.fill(np.arange(begin, end), rows, has_row)
        if not has_row.all():
            missing = begin + int(np.flatnonzero(~has_row)[0])
            raise TransferError(
                f"{self.where}: row {missing:,} is in no package. No manifest was written; run verify on all"
            )
        return rows


def list_runs(entry: TableEntry) -> list[BaseRun]:
    """Return the rows of a row-indexed table of a base, by part."""
    found = []
    for number, part in enumerate(entry.parts):
        first_row = part.first_row if isinstance(part.first_row, int) else 0
        found.append(BaseRun(number, first_row, first_row + part.rows))
    return found


def find_wrong_numbers(package: Package, entry: TableEntry) -> str:
    """Return why the ids of a table of a delta are not the row numbers that its account says; empty if they are.

    All ids are read, a piece at a time.
    """
    assert isinstance(entry.delta, DeltaEntry)
    rows_base, total = entry.delta.rows_base, entry.delta.rows_base + entry.delta.new
    reader, num_new, num_rows = package.rows_of(entry.name), 0, 0
    for number, part in enumerate(entry.parts):
        for first in range(0, part.rows, _PIECE_IDS):
            ids = reader.read_ids(number, first, min(first + _PIECE_IDS, part.rows))
            if len(wrong := ids[(ids < 0) | (ids >= total)]):
                return f"the row number {int(wrong[0])} is outside its {total:,} rows"
            num_new += int(np.count_nonzero(ids >= rows_base))
            num_rows += len(ids)
    if num_rows == entry.rows_out and num_new == entry.delta.new and not entry.delta.deleted:
        return ""
    return f"{num_new:,} of {num_rows:,} row numbers are new, and its account says {entry.delta.new:,} of {entry.rows_out:,}"

"""Find rows of ids that mostly come in the order of the package's own rows: a later checkpoint of the same training run."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from dist_export.kernels.selection import select_kernels
from dist_export.package.slot_reader import SlotReader

_PROBED = 64
"""If none of so many ids comes in order, the row index is asked for the rest."""
_MISSED_SHARE = 16
"""One id in so many may be out of order, before the row index is asked for what comes behind it."""


class RowFollower:
    """Finds the rows of one table. Any thread; it expects the ids behind those that were found last."""

    def __init__(self, reader: SlotReader) -> None:
        """``reader`` reads any slot of the table."""
        self._reader = reader
        self._next: dict[int, int] = {}
        """By part, the row after the last one that was found. Threads may overwrite it: each number is as good."""
        self._only: int | None = None
        """The part that had all ids the last time."""

    def find(self, ids: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Yield each part that may hold some ids: its number, the positions of these ids (int64), and their rows there (int64).

        An id without a row has -1, or no part. ``ids`` is int64, (n,).

        Raises:
            PackageError: a part of a hash table has no row index, or a damaged one.
        """
        table = self._reader.table
        if table.is_row_indexed:
            for number in range(len(table.parts)):
                mine, rows = self._reader.find_numbers(number, ids)
                if len(mine):
                    yield number, mine, rows
            return
        guessed, expected = self._only, self._next.get(-1 if self._only is None else self._only, 0)
        if guessed is not None and len(ids):  # most parts of a source have their ids in the order of one part
            rows = self._follow(guessed, ids)
            if rows.min() >= 0:
                yield guessed, np.arange(len(ids)), rows
                return
            self._next[guessed] = expected
        self._only = None
        for number, wanted in self._reader.deal(ids):
            is_all = len(wanted) == len(ids)
            self._only = number if is_all else self._only
            if table.parts[number].rows:
                yield number, wanted, self._find_in(number, ids if is_all else ids[wanted])

    def _find_in(self, number: int, sought: np.ndarray) -> np.ndarray:
        found = self._follow(number, sought)
        left = np.flatnonzero(found < 0)
        if len(left):
            found[left] = self._reader.find_in(number, sought[left] if len(left) < len(sought) else sought)
            self._next[number] = int(found[-1]) + 1 if found[-1] >= 0 else self._next.get(number, 0)
        return found

    def _follow(self, number: int, sought: np.ndarray) -> np.ndarray:
        """Return the rows of the ids that come in order, -1 for the others."""
        kernels, num_rows = select_kernels(), self._reader.table.parts[number].rows
        first_row = self._next.get(number, 0)
        with self._reader.open_ids(number) as ids:
            if not isinstance(ids, np.ndarray) and not hasattr(ids, "raw_bytes"):  # single values of a store are slow
                return np.full(len(sought), -1, np.int64)
            _, after = kernels.follow_ids(
                ids, sought[:_PROBED], num_rows=num_rows, first_row=first_row, most_missed=_PROBED
            )
            if after == first_row:
                return np.full(len(sought), -1, np.int64)
            found, self._next[number] = kernels.follow_ids(
                ids,
                sought,
                num_rows=num_rows,
                first_row=first_row,
                most_missed=_PROBED + len(sought) // _MISSED_SHARE,
            )
            return found

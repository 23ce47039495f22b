"""Rows of a base for ids that mostly come in its order, in numpy."""

from __future__ import annotations

import numpy as np

from dist_export.kernels.protocol import Column

_MOST_SKIPPED = 8
_FIRST_BLOCK = 64
"""Ids that are compared at once after one that is not in order. The next block is twice as long."""


class NumpyFollowedRows:
    """The twin of ``CompiledFollowedRows``."""

    def follow_ids(
        self, ids: Column, sought: np.ndarray, *, num_rows: int, first_row: int, most_missed: int
    ) -> tuple[np.ndarray, int]:
        """See the protocol."""
        found = np.full(len(sought), -1, np.int64)
        at, row, missed, block = 0, first_row, 0, _FIRST_BLOCK
        while at < len(sought) and row < num_rows and missed <= most_missed:
            size = min(block, len(sought) - at, num_rows - row)
            is_equal = _read(ids, row, row + size) == sought[at : at + size]
            run = size if is_equal.all() else int(is_equal.argmin())
            found[at : at + run] = np.arange(row, row + run)
            at, row, block = at + run, row + run, 2 * block
            if run == size:
                continue
            block = _FIRST_BLOCK
            ahead = np.flatnonzero(_read(ids, row, min(row + _MOST_SKIPPED + 1, num_rows)) == sought[at])
            if len(ahead):
                found[at] = row + ahead[0]
                row += int(ahead[0]) + 1
            else:
                missed += 1
            at += 1
        return found, row

    def mark_rows(self, bits: np.ndarray, rows: np.ndarray) -> None:
        """See the protocol."""
        np.bitwise_or.at(bits, rows >> 3, (128 >> (rows & 7)).astype(np.uint8))


def _read(ids: Column, first: int, last: int) -> np.ndarray:
    return ids[first:last] if isinstance(ids, np.ndarray) else ids.take(np.arange(first, last))

"""Rows of a base for ids that mostly come in its order, compiled: see ``src/followed_rows.c``."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from dist_export.kernels.compiled_base import INT64, POINTER, CompiledBase, at, bytes_of, checked
from dist_export.kernels.numpy_followed_rows import NumpyFollowedRows
from dist_export.kernels.protocol import Column

_NUMPY = NumpyFollowedRows()


class CompiledFollowedRows(CompiledBase):
    """The twin of ``NumpyFollowedRows``. Columns that are not in memory are left to that one."""

    def __init__(self, library: ctypes.CDLL, *, level: int, **settings: Any) -> None:
        """See the base."""
        super().__init__(library, level=level, **settings)
        self._follow_ids = self._declare("follow_ids", [POINTER, INT64, INT64, POINTER, INT64, INT64, POINTER], INT64)
        self._mark_rows = self._declare("mark_rows", [POINTER, POINTER, INT64])

    def follow_ids(
        self, ids: Column, sought: np.ndarray, *, num_rows: int, first_row: int, most_missed: int
    ) -> tuple[np.ndarray, int]:
        """See the protocol."""
        id_bytes = bytes_of(ids, 8, num_rows)
        if id_bytes is None or first_row < 0:
            return _NUMPY.follow_ids(ids, sought, num_rows=num_rows, first_row=first_row, most_missed=most_missed)
        sought = checked(sought, np.int64)
        found = np.empty(len(sought), np.int64)
        next_row: int = self._follow_ids(
            at(id_bytes), num_rows, first_row, at(sought), len(sought), most_missed, at(found)
        )
        return found, next_row

    def mark_rows(self, bits: np.ndarray, rows: np.ndarray) -> None:
        """See the protocol."""
        rows = checked(rows, np.int64)
        if bits.dtype != np.uint8 or not bits.flags.c_contiguous:
            raise TypeError("rows are marked in a contiguous array of bytes")
        if len(rows) and (rows.min() < 0 or int(rows.max()) >= 8 * len(bits)):
            raise IndexError(f"rows {rows.min():,} to {rows.max():,} are to be marked in {8 * len(bits):,} bits")
        self._mark_rows(at(bits), at(rows), len(rows))

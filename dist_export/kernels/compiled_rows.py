"""Rows by owner, compiled: see ``src/rows.c``."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from dist_export.kernels.compiled_base import INT, INT64, POINTER, CompiledBase, at, checked

_OWNERS = (np.dtype(np.uint8), np.dtype(np.uint16), np.dtype(np.int32))


class CompiledRows(CompiledBase):
    """The twin of ``NumpyRows``. Its order has, for each row, its place; -1 for a row that is dropped."""

    def __init__(self, library: ctypes.CDLL, *, level: int, **settings: Any) -> None:
        """See the base."""
        super().__init__(library, level=level, **settings)
        self._order_rows = self._declare(
            "order_rows", [POINTER, INT, POINTER, INT64, INT64, INT64, POINTER, POINTER, POINTER]
        )
        self._move_rows = self._declare("move_rows", [POINTER, INT64, INT64, POINTER, POINTER])

    def order_rows(
        self, owners: np.ndarray, kept: np.ndarray | None, num_targets: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """See the protocol."""
        num_rows = len(owners)
        counts, positions = np.zeros(num_targets, np.int64), np.empty(num_rows, np.int64)
        if not num_rows:
            return positions, counts
        owners = np.ascontiguousarray(owners)
        if owners.dtype not in _OWNERS or int(owners.max()) >= num_targets or int(owners.min()) < 0:
            raise ValueError(f"the owners are {owners.dtype}, and not all are below {num_targets:,}")
        where, num_kept = None, num_rows
        if kept is not None:
            kept = checked(kept, np.int64)
            where, num_kept = at(kept), len(kept)
            if num_kept and (kept.min() < 0 or kept.max() >= num_rows):
                raise ValueError(f"not all rows that are kept are below {num_rows:,}")
        following = np.empty(num_targets, np.int64)
        self._order_rows(
            at(owners),
            owners.itemsize,
            where,
            num_kept,
            num_rows,
            num_targets,
            at(counts),
            at(following),
            at(positions),
        )
        return positions, counts

    def move_rows(self, order: np.ndarray, rows: np.ndarray, row_bytes: int, out: np.ndarray) -> None:
        """See the protocol."""
        order, rows = checked(order, np.int64), checked(rows, np.uint8, count=len(order) * row_bytes)
        if out.dtype != np.uint8 or not out.flags.c_contiguous:
            raise TypeError("rows are moved into a contiguous array of bytes")
        if len(order) and (int(order.max()) + 1) * row_bytes > out.size:
            raise ValueError(f"{int(order.max()) + 1:,} rows of {row_bytes:,} bytes do not fit into {out.size:,} bytes")
        self._move_rows(at(rows), len(order), row_bytes, at(order), at(out))

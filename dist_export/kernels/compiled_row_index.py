"""The row index, compiled: see ``src/row_index.c``."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from dist_export.kernels.compiled_base import INT, INT64, POINTER, UINT64, CompiledBase, at, bytes_of, checked
from dist_export.kernels.numpy_row_index import NumpyRowIndex
from dist_export.kernels.protocol import Column

_GOLDEN = 0x9E3779B97F4A7C15
_EMPTY = 0xFFFFFFFF
_NUMPY = NumpyRowIndex()


class _Index(ctypes.Structure):
    _fields_ = (
        ("slots", POINTER),
        ("ids", POINTER),
        ("num_slots", INT64),
        ("num_rows", INT64),
        ("longest_probe", INT64),
        ("num_buckets", UINT64),
        ("seed", UINT64),
    )


class CompiledRowIndex(CompiledBase):
    """The twin of ``NumpyRowIndex``. Columns that are not in memory are left to that one."""

    def __init__(self, library: ctypes.CDLL, *, level: int, **settings: Any) -> None:
        """See the base."""
        super().__init__(library, level=level, **settings)
        self._encode_keys = self._declare("encode_keys", [POINTER, INT64, INT64, UINT64, POINTER])
        self._measure_slots = self._declare("measure_slots", [POINTER, INT64, UINT64, INT64, POINTER], INT64)
        self._fill_slots = self._declare("fill_slots", [POINTER, INT64, UINT64, INT64, POINTER])
        self._find_rows = self._declare("find_rows", [POINTER, POINTER, INT64, POINTER], INT)
        self._count_rows_at = self._declare("count_rows_at", [POINTER, POINTER, INT64, INT64, INT], INT64)
        self._take_rows = self._declare("take_rows", [POINTER, INT64, POINTER, POINTER, INT64, POINTER, POINTER])

    def encode_keys(self, ids: np.ndarray, first_row: int, seed: int) -> np.ndarray:
        """See the protocol."""
        ids, keys = checked(ids, np.int64), np.empty(len(ids), np.uint64)
        self._encode_keys(at(ids), len(ids), first_row, _spread(seed), at(keys))
        return keys

    def fill_slots(self, keys: np.ndarray, *, num_buckets: int, num_slots: int) -> tuple[np.ndarray, int]:
        """See the protocol."""
        keys, longest = checked(keys, np.uint64), np.zeros(1, np.int64)
        if not len(keys) or not 0 < num_buckets < 1 << 34:
            raise ValueError(f"{len(keys):,} keys are to go into {num_buckets:,} buckets")
        end = self._measure_slots(at(keys), len(keys), num_buckets, num_slots, at(longest))
        slots = np.full(end - num_slots, _EMPTY, np.dtype("<u4"))
        self._fill_slots(at(keys), len(keys), num_buckets, num_slots, at(slots))
        return slots, int(longest[0])

    def find_rows(
        self,
        slots: Column,
        ids: Column,
        sought: np.ndarray,
        *,
        num_slots: int,
        num_rows: int,
        num_buckets: int,
        seed: int,
        longest_probe: int,
    ) -> np.ndarray:
        """See the protocol."""
        slot_bytes, id_bytes = bytes_of(slots, 4, num_slots), bytes_of(ids, 8, num_rows)
        if slot_bytes is not None and id_bytes is not None:
            sought = checked(sought, np.int64)
            found = np.empty(len(sought), np.int64)
            index = _Index(at(slot_bytes), at(id_bytes), num_slots, num_rows, longest_probe, num_buckets, _spread(seed))
            if not self._find_rows(ctypes.addressof(index), at(sought), len(sought), at(found)):
                return found
        # numpy also says what is wrong with a damaged index
        return _NUMPY.find_rows(
            slots,
            ids,
            sought,
            num_slots=num_slots,
            num_rows=num_rows,
            num_buckets=num_buckets,
            seed=seed,
            longest_probe=longest_probe,
        )

    def count_rows_at(
        self,
        slots: Column,
        ids: np.ndarray,
        first_row: int,
        *,
        num_slots: int,
        num_buckets: int,
        seed: int,
        longest_probe: int,
    ) -> int:
        """See the protocol."""
        slot_bytes = bytes_of(slots, 4, num_slots)
        if slot_bytes is None:
            return _NUMPY.count_rows_at(
                slots,
                ids,
                first_row,
                num_slots=num_slots,
                num_buckets=num_buckets,
                seed=seed,
                longest_probe=longest_probe,
            )
        ids = checked(ids, np.int64)
        index = _Index(at(slot_bytes), None, num_slots, 0, longest_probe, num_buckets, _spread(seed))
        count: int = self._count_rows_at(ctypes.addressof(index), at(ids), len(ids), first_row, self._level)
        return count

    def take_rows(
        self, block: np.ndarray, found: np.ndarray, targets: np.ndarray, *, rows: np.ndarray, has_row: np.ndarray
    ) -> None:
        """See the protocol."""
        found = checked(found, np.int64)
        targets = checked(targets, np.int64, count=len(found))
        if not len(found):
            return
        row_bytes = rows.shape[1]
        is_flat = block.flags.c_contiguous and rows.flags.c_contiguous and has_row.flags.c_contiguous
        if not is_flat or {block.dtype, rows.dtype} != {np.dtype(np.uint8)} or has_row.dtype != np.bool_:
            raise TypeError("rows are taken from one contiguous array of bytes into another")
        if block.shape[1] != row_bytes or len(has_row) != len(rows) or found.max() >= len(block):
            raise ValueError(f"rows of {block.shape} cannot become rows of {rows.shape}")
        if targets.min() < 0 or targets.max() >= len(rows):
            raise ValueError(f"not all targets are below {len(rows):,}")
        self._take_rows(at(block), row_bytes, at(found), at(targets), len(found), at(rows), at(has_row))


def _spread(seed: int) -> int:
    return seed * _GOLDEN % (1 << 64)

"""Take single values of a column of a package's file: from a mapping of a file on a disk, or by ranges from a store."""

from __future__ import annotations

import itertools

import numpy as np

from dist_export.kernels.protocol import Column
from dist_export.storage.range_reader import RangeReader
from dist_export.storage.s3_reader import NEAR_BYTES

_MOST_KEPT_BYTES = 256 << 20


def map_column(data: np.ndarray, offset: int, num_rows: int, dtype: np.dtype) -> Column:
    """Return a column of a mapped file.

    Args:
        data: the file, uint8 of shape (num_bytes,).
        offset: the position of the first value, in bytes; any number.
        num_rows: the values of the column, which must lie in the file.
        dtype: the dtype of a value.
    """
    column = data[offset : offset + num_rows * dtype.itemsize]
    if offset % dtype.alignment:
        return _Unaligned(column.reshape(num_rows, dtype.itemsize), dtype)
    values: np.ndarray = column.view(dtype)
    return values


class _Unaligned:
    """Values at any position. numpy would copy the whole column to align it."""

    def __init__(self, column: np.ndarray, dtype: np.dtype) -> None:
        self._column = column
        self._dtype = dtype
        self.raw_bytes = column.reshape(-1)
        """All values, for kernels that need no alignment."""

    def take(self, rows: np.ndarray) -> np.ndarray:
        values: np.ndarray = self._column.take(rows, axis=0).view(self._dtype)[:, 0]
        return values


class StoredColumn:
    """A column of a file in a store, of which ranges are read. Ranges close together share a request.

    If the requested values lie so close that nearly all of the column would be read, it is read once and kept. One lookup asks
    several times.
    """

    def __init__(self, reader: RangeReader, offset: int, num_values: int, dtype: np.dtype) -> None:
        self._reader = reader
        self._offset = offset
        self._num_values = num_values
        self._dtype = dtype
        self._whole: np.ndarray | None = None

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Return the values of these rows."""
        size = self._dtype.itemsize
        unique, inverse = np.unique(rows, return_inverse=True)
        num_bytes = self._num_values * size
        if self._whole is None and num_bytes <= min(len(unique) * NEAR_BYTES, _MOST_KEPT_BYTES):
            self._whole = np.frombuffer(self._reader.fetch(self._offset, self._offset + num_bytes), self._dtype)
        if self._whole is not None:
            return self._whole.take(rows)
        values = np.empty(len(unique), self._dtype)
        view = values.data.cast("B")
        begins = (self._offset + unique * size).tolist()
        self._reader.read_many([(view[n * size : (n + 1) * size], begin) for n, begin in enumerate(begins)])
        taken: np.ndarray = values[inverse]
        return taken


def read_rows(reader: RangeReader, offset: int, row_bytes: int, found: np.ndarray) -> np.ndarray:
    """Return rows ``found`` (int64, (n,)) of a block at ``offset``, uint8 (n, row_bytes).

    Each row is read once, and neighbours are read as one range.
    """
    unique, inverse = np.unique(found, return_inverse=True)
    held = np.empty((len(unique), row_bytes), np.uint8)
    edges = [0, *(1 + np.flatnonzero(np.diff(unique) != 1)).tolist(), len(unique)]
    reader.read_many(
        [
            (held[first:last].reshape(-1).data, offset + int(unique[first]) * row_bytes)
            for first, last in itertools.pairwise(edges)
        ]
    )
    rows: np.ndarray = held[inverse]
    return rows

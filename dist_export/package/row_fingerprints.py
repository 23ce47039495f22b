"""Read the row fingerprints of an open package."""

from __future__ import annotations

import itertools

import msgspec
import numpy as np

from dist_export.errors import PackageError
from dist_export.formats.row_fingerprints import FINGERPRINT, MAGIC, find_fault
from dist_export.manifest import PartEntry, RowFingerprintsEntry
from dist_export.package.local_cache import LocalCache
from dist_export.package.opened_files import OpenedFiles
from dist_export.package.reader import Package
from dist_export.storage.range_reader import RangeReader

_RUN_ROWS = 1 << 17
"""Rows that are read from a store at once. Of rows close together, those between are read too, at most 64 kB each."""


class PartFingerprints:
    """The row fingerprints of one part. Any thread may read them. Mapped on a disk, else read by ranges unless cached."""

    def __init__(
        self,
        files: OpenedFiles,
        table: str,
        part: PartEntry,
        entry: RowFingerprintsEntry,
        *,
        cache: LocalCache | None = None,
    ) -> None:
        """Compare the entry with its file. PackageError: see :func:`open_fingerprints`."""
        self._files = files
        self._cache = cache
        self._table = table
        self._file = entry.file
        self._offset = entry.offset
        self.num_rows = part.rows
        """The rows of the part."""
        size = files.stat(entry.file).size
        fault = find_fault(offset=entry.offset, num_rows=part.rows, file_size=size)
        if fault is not None:
            raise self._refuse(fault)
        with files.open_reader(entry.file) as reader:
            magic = reader.fetch(0, len(MAGIC))
        if magic != MAGIC:
            raise self._refuse(f"it begins with {magic[:8]!r}, which no file of row fingerprints does")

    def fingerprints(self, rows: np.ndarray) -> np.ndarray:
        """Return the fingerprints of rows.

        Args:
            rows: int64 of shape (n,): rows of the part, from 0, in any order. Rows may repeat.

        Returns:
            uint64 of shape (n,).

        Raises:
            IndexError: the part has no such row.
            PackageError: the file was damaged or changed since the package was opened.
        """
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < self.num_rows:
            raise IndexError(f"rows {rows.min()} to {rows.max()} were wanted of a part with {self.num_rows:,} rows")
        num_bytes = self.num_rows * FINGERPRINT.itemsize
        if self._cache is not None:
            cached: np.ndarray = self._cache.map(self._file, self._offset, num_bytes).view(FINGERPRINT).take(rows)
            return cached.astype(np.uint64, copy=False)
        with self._files.open_mapped(self._file) as file:
            if isinstance(file, np.ndarray):
                found: np.ndarray = file[self._offset : self._offset + num_bytes].view(FINGERPRINT).take(rows)
            else:
                found = self._read(file, rows)
        return found.astype(np.uint64, copy=False)

    def _read(self, reader: RangeReader, rows: np.ndarray) -> np.ndarray:
        """Read rows by ranges. Each is read once, and neighbours as one range."""
        unique, inverse = np.unique(rows, return_inverse=True)
        found = np.empty(len(unique), FINGERPRINT)
        for first in range(0, len(unique), _RUN_ROWS):
            run, view = unique[first : first + _RUN_ROWS], found[first : first + _RUN_ROWS]
            edges = [0, *(1 + np.flatnonzero(np.diff(run) != 1)).tolist(), len(run)]
            reader.read_many(
                [
                    (view[begin:end].data.cast("B"), self._offset + int(run[begin]) * FINGERPRINT.itemsize)
                    for begin, end in itertools.pairwise(edges)
                ]
            )
        values: np.ndarray = found[inverse]
        return values

    def _refuse(self, reason: str) -> PackageError:
        return PackageError(
            f"{self._files.describe(self._file)}: the row fingerprints of table {self._table!r} are damaged: {reason}. "
            "Run verify, and export again"
        )


def open_fingerprints(package: Package, table: str, part: int) -> PartFingerprints | None:
    """Return the row fingerprints of a part; None if the package has none of it.

    Args:
        package: the open package.
        table: the name of the table.
        part: the number of the part in the table's entry in the manifest.

    Raises:
        PackageError: there is no such table or part, or the file cannot be that of the manifest.
    """
    parts = package.table(table).parts
    if not 0 <= part < len(parts):
        raise PackageError(f"{package.directory.url}: table {table!r} has {len(parts):,} parts, and no part {part}")
    entry = parts[part].row_fingerprints
    if entry is msgspec.UNSET:
        return None
    return PartFingerprints(package.files, table, parts[part], entry, cache=package.cache)

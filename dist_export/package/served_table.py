"""The rows that a package serves of one table, part by part: its own, and those below it that nothing above replaces."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from dist_export.formats.delta_entries import DeltaEntry
from dist_export.formats.recis import EMBEDDING_SLOT
from dist_export.manifest import PartEntry
from dist_export.package.chain import BYTES_OF_ID, MergedIds, count_ids, list_links
from dist_export.package.reader import Package
from dist_export.package.row_fingerprints import PartFingerprints, open_fingerprints
from dist_export.package.row_follower import RowFollower


def estimate_bytes(package: Package | None) -> int:
    """Return what the merged ids of all tables take in memory, once they are read; 0 for a full package, and for None."""
    layers = () if package is None else package.layers[:-1]
    return BYTES_OF_ID * sum(count_ids(layer.manifest.tables) for layer in layers)


class ServedPart(NamedTuple):
    """A part of a table in one of the packages."""

    package: Package
    number: int
    """In the entry of the table in that package."""
    entry: PartEntry


class ServedTable:
    """The rows of one table. Parts have numbers: those of the package itself first, and those of the full package last.

    Any thread may read.
    """

    def __init__(self, package: Package, table: str, *, slot: str = EMBEDDING_SLOT) -> None:
        """Prepare to read; of a delta, the ids are read and merged with those below. PackageError as :meth:`Package.rows_of`.

        ``slot`` is any slot of the table.
        """
        self.name = table
        having = [its for its in package.layers if any(entry.name == table for entry in its.manifest.tables)]
        self.parts = [
            ServedPart(its, number, entry) for its in having for number, entry in enumerate(its.table(table).parts)
        ]
        sizes = [len(its.table(table).parts) for its in having]
        self._firsts = np.cumsum([0, *sizes]).tolist()
        """The number of the first part of each package."""
        self._having = having
        links, base = list_links(package.layers, table, slot)
        self._merged = MergedIds(links) if links else None
        self._base = None if base is None else RowFollower(base)
        self.is_row_indexed = package.layers[-1] in having and package.layers[-1].table(table).is_row_indexed
        """Whether rows of the full package are found by their number, which the deltas have as ids."""

    def find(self, ids: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Yield each part that may hold some ids: its number, the positions of these ids (int64), and their rows there (int64).

        An id without a row has -1, or no part. ``ids`` is int64, (n,).

        Raises:
            PackageError: a part of the full package has no row index, or a damaged one.
        """
        if self._merged is None:
            assert self._base is not None
            yield from self._base.find(ids)
            return
        positions, spots = self._merged.find(ids)
        if self._base is not None:
            is_left = np.ones(len(ids), bool)
            is_left[positions] = False
            # it expects ids in the order of its rows, so it is asked for all
            for number, wanted, rows in self._base.find(ids):
                mine = is_left[wanted]
                if mine.all():
                    yield self._firsts[-2] + number, wanted, rows
                elif mine.any():
                    yield self._firsts[-2] + number, wanted[mine], rows[mine]
        for found in self._merged.deal(positions, spots):
            yield self._firsts[found.link] + found.part, found.positions, found.rows

    def take(self, number: int, rows: np.ndarray, *, slot: str) -> np.ndarray:
        """Return rows of a part as they are stored: uint8, (n, row_bytes). ``rows`` (int64, (n,)) are rows within it."""
        part = self.parts[number]
        return part.package.rows_of(self.name, slot=slot).take(part.number, rows)

    def open_fingerprints(self, number: int) -> PartFingerprints | None:
        """Return the row fingerprints of a part; None if it has none. PackageError if they are damaged."""
        return open_fingerprints(self.parts[number].package, self.name, self.parts[number].number)

    def read_ids(self, number: int, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids (int64) of rows ``first`` to ``last`` - 1 of a part, and which of the rows are served (bool)."""
        package, its, entry = self.parts[number]
        if package.table(self.name).is_row_indexed:
            begin = entry.first_row if isinstance(entry.first_row, int) else 0
            ids = np.arange(begin + first, begin + last)
        else:
            ids = package.rows_of(self.name).read_ids(its, first, last)
        if self._merged is None:
            return ids, np.ones(len(ids), bool)
        if not isinstance(package.table(self.name).delta, DeltaEntry):
            is_served = np.ones(len(ids), bool)
            is_served[self._merged.find(ids)[0]] = False
            return ids, is_served
        return ids, self._merged.are_last(ids, self._having.index(package), its, first)

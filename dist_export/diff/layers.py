"""The rows of a package that may be a delta: how many there are, and of which ids a delta itself says anything."""

from __future__ import annotations

import msgspec
import numpy as np

from dist_export.errors import PackageError
from dist_export.manifest import BaseEntry, TableEntry
from dist_export.package.reader import Package


def count_rows(table: TableEntry) -> int:
    """Return the rows of a table, of a delta with those that its base has."""
    return table.rows_out if table.delta is msgspec.UNSET else table.rows_out + table.delta.same


def has_shared_base(a: Package, b: Package) -> bool:
    """Whether both are on top of one base, or one of them is the base of the other."""
    digests = [_digest_of_base(package) for package in (a, b)]
    return (a.is_delta or b.is_delta) and digests[0] == digests[1]


def list_below(package: Package, table: str) -> list[tuple[int, TableEntry]]:
    """Return the packages below one that have a table: their numbers in ``package.layers``, and their entries of it."""
    return [
        (number, entry)
        for number, layer in enumerate(package.layers)
        for entry in layer.manifest.tables
        if number and entry.name == table
    ]


def is_row_indexed(package: Package, table: TableEntry) -> bool:
    """Whether rows are found by their numbers: deltas have these as ids."""
    return any(entry.is_row_indexed for entry in (table, *(below for _, below in list_below(package, table.name))))


def says_nothing(table: TableEntry) -> bool:
    """Whether a delta leaves all rows of a table to its base."""
    return table.delta is not msgspec.UNSET and not table.rows_out and not table.delta.deleted


def is_said(package: Package, table: str, ids: np.ndarray) -> np.ndarray:
    """Return of which ids (int64, (n,)) a delta itself says anything: it has their rows, or they are deleted. bool, (n,).

    Of a table that the delta does not have it says nothing.
    """
    if not any(entry.name == table for entry in package.manifest.tables):
        return np.zeros(len(ids), bool)
    said = has_own(package, table, ids)
    deleted = package.deleted_ids(table)
    if len(deleted):
        said |= deleted[np.minimum(np.searchsorted(deleted, ids), len(deleted) - 1)] == ids
    return said


def has_own(package: Package, table: str, ids: np.ndarray) -> np.ndarray:
    """Return of which ids (int64, (n,)) a delta has rows itself, bool (n,). Of a full package none."""
    return package.rows_of(table).contains(ids) if package.is_delta else np.zeros(len(ids), bool)


def _digest_of_base(package: Package) -> str:
    base = package.manifest.base
    return base.digest if isinstance(base, BaseEntry) else package.manifest.digest


def check_sum(package: Package, table: TableEntry, num_found: int, *, is_whole: bool) -> int:
    """Return the rows of a table that nobody had to read. PackageError if there are too many or too few.

    ``is_whole``: whether all of them were to be read.
    """
    left = count_rows(table) - num_found
    if left < 0 or (is_whole and left):
        raise PackageError(
            f"{package.directory.url}: table {table.name!r} has {num_found:,} rows, and its manifest says {count_rows(table):,}; "
            "`verify` tells more"
        )
    return left

"""The rows of a package that may be a delta: how many there are, and of which ids the delta itself says anything."""

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


def find_in_base(package: Package, table: str) -> TableEntry | None:
    """Return the entry of a table in the base of a package; None if there is no base, or it has no such table."""
    if package.base is None:
        return None
    return next((entry for entry in package.base.manifest.tables if entry.name == table), None)


def is_row_indexed(package: Package, table: TableEntry) -> bool:
    """Whether rows are found by their numbers: a delta has these as ids."""
    below = find_in_base(package, table.name)
    return table.is_row_indexed if below is None else below.is_row_indexed


def says_nothing(table: TableEntry) -> bool:
    """Whether a delta leaves all rows of a table to its base."""
    return table.delta is not msgspec.UNSET and not table.rows_out and not table.delta.deleted


def is_said(package: Package, table: str, ids: np.ndarray) -> np.ndarray:
    """Return of which ids (int64, (n,)) a delta itself says anything: it has their rows, or they are deleted. bool, (n,)."""
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

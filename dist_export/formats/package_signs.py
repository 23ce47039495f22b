"""Files that only a package has: by them one is known that has lost its manifest. Pure: names in, names out."""

from __future__ import annotations

from collections.abc import Iterable

from dist_export.formats.deleted_ids import SUFFIX as DELETED_SUFFIX
from dist_export.formats.row_fingerprints import SUFFIX as FINGERPRINTS_SUFFIX
from dist_export.formats.row_index import SUFFIX as INDEX_SUFFIX

SIDE_SUFFIXES = (INDEX_SUFFIX, FINGERPRINTS_SUFFIX, DELETED_SUFFIX)
"""Ends of the names of files beside the shards."""


def list_side_files(names: Iterable[str]) -> list[str]:
    """Return the files beside shards that no trainer writes, in order."""
    return sorted(name for name in names if name.endswith(SIDE_SUFFIXES))


def list_deleted_ids(names: Iterable[str]) -> list[str]:
    """Return the files of deleted ids, which only a delta package has, in order."""
    return [name for name in list_side_files(names) if name.endswith(DELETED_SUFFIX)]

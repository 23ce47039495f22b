"""The entries of ``manifest.json`` that deltas need: row fingerprints, the base, and the account of each table against it."""

from __future__ import annotations

from typing import Annotated

import msgspec

Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]
"""A number of rows, bytes or elements, within the limits of a file."""


MOST_LINKS = 8
"""Deltas on top of each other and of a full package."""


class RowFingerprintsEntry(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Where the row fingerprints of a part are. :mod:`dist_export.formats.row_fingerprints` describes their file."""

    file: str
    """Relative to the package, with forward slashes."""
    offset: Count
    """Bytes of the file before the first fingerprint; a multiple of 64."""


class BaseEntry(msgspec.Struct, frozen=True, kw_only=True):
    """Another package: what a delta package goes on top of, full or a delta itself, or what a compacted one was made of."""

    path: str
    """Where it was at the export: a directory or an fsspec URL. A base that was moved together with its deltas is found beside
    the delta, under the last part of this path."""
    digest: str
    """The digest of its manifest."""
    has_dense: bool | msgspec.UnsetType = msgspec.UNSET
    """True if all that is no table is the base's, byte for byte: the dense arch, the score program and their stored samples,
    which are of the base's rows. Else absent."""
    dense_only: bool | msgspec.UnsetType = msgspec.UNSET
    """True if the source gave the dense part alone, and no row of its tables was compared with the base. Else absent."""


class CompactedEntry(msgspec.Struct, frozen=True, kw_only=True):
    """The packages that a compacted package was made of. Nothing of them is needed to read it."""

    delta: BaseEntry
    between: tuple[BaseEntry, ...] | msgspec.UnsetType = msgspec.UNSET
    """The deltas between the two, the last one first, if there are any."""
    base: BaseEntry
    """The full package."""


class DeletedIdsEntry(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Ids of one part of the base that the delta takes away, in a file of the delta."""

    file: str
    """Relative to the package, with forward slashes."""
    offset: Count
    """Bytes of the file before the first id; a multiple of 64."""
    ids: Count
    """How many: little-endian int64, in ascending order."""


class DeltaEntry(msgspec.Struct, frozen=True, kw_only=True):
    """The account of a table against the base: rows of the base = same + changed + deleted, rows of the delta = changed + new."""

    rows_base: Count
    same: Count
    """Rows that are in the base with the same bytes. The delta does not hold them."""
    changed: Count
    new: Count
    """Rows whose ids the base lacks."""
    deleted: Count
    """Ids of the base that have no row any more."""
    deleted_ids: tuple[DeletedIdsEntry, ...] = ()
    ignored_slots: tuple[str, ...] | msgspec.UnsetType = msgspec.UNSET
    """Slots that were not compared, if any: of a row that is the same they may differ, and serving gets the base's."""

    @property
    def rows_served(self) -> int:
        """Rows of the table in delta and base together."""
        return self.same + self.changed + self.new

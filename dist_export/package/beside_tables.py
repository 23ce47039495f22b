"""The files of a package that are no table: dense arch, score program, fg.json and the layouts of other servers."""

from __future__ import annotations

import msgspec

from dist_export.formats.recis import INDEX, MERGED, TENSORKEY
from dist_export.manifest import FileEntry, Manifest

_INDEXES = (INDEX, MERGED, TENSORKEY)


def list_beside_tables(manifest: Manifest) -> tuple[FileEntry, ...]:
    """Return them in the order of the manifest."""
    parts = [part for table in manifest.tables for part in table.parts]
    of_tables = {part.file for part in parts}
    of_tables |= {part.row_index.file for part in parts if part.row_index is not msgspec.UNSET}
    of_tables |= {part.row_fingerprints.file for part in parts if part.row_fingerprints is not msgspec.UNSET}
    deltas = [table.delta for table in manifest.tables if table.delta is not msgspec.UNSET]
    of_tables |= {ids.file for delta in deltas for ids in delta.deleted_ids}
    return tuple(file for file in manifest.files if file.path not in of_tables and file.path not in _INDEXES)

"""Open the files of a package: all of one package, even if it is being replaced."""

from __future__ import annotations

import msgspec

from dist_export.errors import DistExportError, PackageError, UserError
from dist_export.formats.recis import INDEX, TENSORKEY
from dist_export.manifest import MANIFEST, Manifest, decode_manifest
from dist_export.package.opened_files import OpenedFiles
from dist_export.registry.versions import CURRENT
from dist_export.storage.directory import Directory

_TRIES = 10
"""Attempts to open a package that is being replaced."""


def open_committed(directory: Directory) -> tuple[OpenedFiles, Manifest]:
    """Return the files and the manifest of a package. Both are of one package, even if it is being replaced."""
    for is_last in (*[False] * (_TRIES - 1), True):
        files: OpenedFiles | None = None
        try:
            files = OpenedFiles(directory)
            manifest = decode_manifest(files.anchor(MANIFEST), where=directory.describe(MANIFEST))
            paths = [entry.path for entry in manifest.files]
            paths += [part.file for table in manifest.tables for part in table.parts]
            files.vouch({entry.path: entry.digest for entry in manifest.files if entry.path != MANIFEST})
            if files.note(paths):
                return files, manifest
        except (OSError, PackageError) as error:
            # the package may just have been replaced, so that the opened directory is being removed
            if files is None or is_last or files.is_current():
                raise _refusal(directory, error) from error
        files.close()
    raise PackageError(f"{directory.url}: was replaced {_TRIES} times while it was being opened; open it again")


def open_written(directory: Directory, manifest: Manifest) -> tuple[OpenedFiles, Manifest]:
    """Return the files of a package that is written except for its manifest, and what the manifest will say."""
    files = OpenedFiles(directory)
    files.anchor_unread(manifest.files[0].path)
    return files, manifest


def _refusal(directory: Directory, error: OSError | PackageError) -> DistExportError:
    """Return the error for a directory that cannot be opened as a package."""
    if isinstance(error, PackageError):
        return error
    try:
        if isinstance(error, (FileNotFoundError, NotADirectoryError)) and not directory.exists():
            return UserError(f"{directory.url}: {directory.say_missing()}")
        if isinstance(error, FileNotFoundError) and directory.exists(CURRENT):
            return UserError(f"{directory.url} is a directory of versions; give versions:{directory.url}")
        if isinstance(error, FileNotFoundError) and not directory.exists(MANIFEST):
            return PackageError(
                f"{directory.url}: no {MANIFEST}, so this is no package, or its export did not finish; run the export again"
            )
    except OSError as second:
        error = second
    where = directory.describe(MANIFEST)
    return PackageError(f"{error.filename or where} cannot be read: {error.strerror or error}")


def list_files_to_hold(manifest: Manifest) -> list[str]:
    """Return the files that lookups and programs read, the most important ones first."""
    dense = manifest.dense
    parts = [part for table in manifest.tables for part in table.parts]
    indexes = (part.row_index.file for part in parts if part.row_index is not msgspec.UNSET)
    shards = (part.file for part in parts)
    score = manifest.score
    programs = [entry.program for entry in (dense, score) if entry not in (None, msgspec.UNSET)]
    if dense is not None and dense.formats is not msgspec.UNSET:
        programs += [entry.file for entry in dense.formats]
    deltas = (table.delta for table in manifest.tables if table.delta is not msgspec.UNSET)
    deleted = (entry.file for delta in deltas for entry in delta.deleted_ids)
    return [*programs, INDEX, TENSORKEY, *indexes, *deleted, *shards]

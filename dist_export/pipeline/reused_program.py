"""The program and fg.json of a package that is the source, taken over byte by byte where no row of its tables changes."""

from __future__ import annotations

import json
from collections.abc import Mapping

import msgspec

from dist_export.checkpoint.metadata import TableMeta
from dist_export.checkpoint.package_source import find_package
from dist_export.commit.publish import DenseMeta
from dist_export.errors import CheckpointError, PackageError
from dist_export.formats.digests import algorithm_of, digest_bytes
from dist_export.formats.recis import DENSE_SUFFIX, MERGED, MergedEntry
from dist_export.manifest import (
    DEFAULT_ROWS,
    SAMPLE_ROWS,
    FeatureEntry,
    FileEntry,
    Manifest,
    ScoreEntry,
    TableEntry,
)
from dist_export.package.beside_tables import list_beside_tables
from dist_export.package.reader import Package
from dist_export.pipeline.inputs import FG, note_renamed
from dist_export.plan.casts import casts_by_table
from dist_export.plan.plan import SparsePlan
from dist_export.storage.directory import Directory

_MERGED_DECODER = msgspec.json.Decoder(dict[str, MergedEntry])


class TakenOver:
    """What one export takes over from its source: nothing until :meth:`look` has found something. Rank 0 alone."""

    def __init__(self) -> None:
        self._source: Directory | None = None
        self._manifest: Manifest | None = None
        self._files: tuple[FileEntry, ...] = ()
        self._names: dict[str, str] = {}
        """Of renamed tables, the name in the source -> the one in the package."""

    def look(self, source: Directory, plan: SparsePlan, *, has_own: bool, with_scores: bool) -> list[str]:
        """Decide what is taken over, and return what is to be told of it; nothing of a source that has none of it.

        ``has_own``: whether the export was given a model, fg or mc, so that it has its own.
        ``with_scores``: whether a score program may be taken over.

        Raises:
            CheckpointError: a file is not what the source's manifest says.
        """
        manifest = find_package(source)
        folder = None if manifest is None or manifest.dense is None else manifest.dense.folder
        program = _find_scores(manifest) if with_scores else ()
        files = tuple(
            file
            for file in (manifest.files if manifest is not None else ())
            if file.path == FG or (folder is not None and file.path.startswith(f"{folder}/")) or file.path in program
        )
        if manifest is None or not files:
            return []
        parts = [] if folder is None else [folder]
        parts += [program[0].rpartition("/")[0]] if program else []
        parts += [FG for file in files if file.path == FG]
        told = " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else parts[0]
        is_plain = folder is None or not ("/" in folder or folder.startswith("."))
        if has_own or not is_plain or plan.is_copy or not keeps_rows(plan, manifest):
            note = (
                f"{source.url} is a package. Its tables are exported; {told} are not carried over. That needs new shards with "
                "the same rows, default rows and tables, and settings without model, fg and mc. Export from the checkpoint for a "
                "package with a program"
            )
            return [note]
        self._source, self._manifest, self._files = source, manifest, files
        self._names = {table.name_in_source: table.name for table in plan.checkpoint.tables}
        self.read()  # so that what is damaged is told before anything is written
        scores = "" if folder is None else "; no score was compared anew, parity and drift are those of that package"
        renamed = note_renamed({}, plan.checkpoint) if any(file.path == FG for file in files) else []
        if program and self._is_renamed:
            renamed.append("the lookups of the score program have the new names of tables; nothing else of it changed")
        were = "were" if len(parts) > 1 else "was"
        return [f"{told} {were} taken over from {source.url} byte by byte, as no row changed{scores}", *renamed]

    def take_base(self, base: Package) -> None:
        """Take over all that is no table of the base of a delta whose source has nothing else. CheckpointError."""
        self._source, self._manifest = base.directory, base.manifest
        self._files = list_beside_tables(base.manifest)
        self.read()  # so that what is damaged is told before anything is written

    @property
    def _is_renamed(self) -> bool:
        return any(name != its for name, its in self._names.items())

    def read(self) -> dict[str, bytes]:
        """Return the files by path, each held against its digest in the source's manifest. CheckpointError."""
        if self._source is None:
            return {}
        found = {file.path: _rename(file.path, read_checked(self._source, file), self._names) for file in self._files}
        program = next(iter(_find_scores(self._manifest)), "")
        if program in found and self._is_renamed:
            found[program] = self._rename_lookups(found[program], self._source.describe(program))
        return found

    def _rename_lookups(self, program: bytes, where: str) -> bytes:
        from dist_export.archive.renamed_program import rename_tables  # it imports torch

        dense = None if self._manifest is None else self._manifest.dense
        is_legacy = dense is not None and dense.archive_format == "legacy"
        try:
            return rename_tables(program, self._names, archive_format="legacy" if is_legacy else "pt2")
        except PackageError as error:
            raise CheckpointError(
                f"{where}: its lookups cannot get the new names of tables: {error}. Export without rename_tables, or set "
                "score_program: off"
            ) from error

    def dense_state(self) -> DenseMeta:
        """Return the dense parameters that the source's merged manifest lists for its program."""
        files = () if self._manifest is None else self._manifest.files
        entry = next((file for file in files if file.path == MERGED), None)
        if self._source is None or entry is None:
            return []
        merged = _MERGED_DECODER.decode(read_checked(self._source, entry))
        return [
            (key, its.dtype, tuple(its.shape))
            for key, its in merged.items()
            if its.dense and not key.endswith(DENSE_SUFFIX)
        ]

    def describe(self, manifest: Manifest) -> Manifest:
        """Return the manifest with what the source's says of the program."""
        own = self._manifest
        if own is None:
            return manifest
        has_scores = own.score is not msgspec.UNSET and own.score.program in {file.path for file in self._files}
        score: ScoreEntry | msgspec.UnsetType = msgspec.UNSET
        if has_scores and own.score is not msgspec.UNSET:
            tables = sorted(self._names.get(name, name) for name in own.score.tables)
            score = msgspec.structs.replace(own.score, tables=tuple(tables))
        serving = own.serving
        if serving is not msgspec.UNSET:
            serving = msgspec.structs.replace(serving, features=tuple(map(self._rename_feature, serving.features)))
        return msgspec.structs.replace(
            manifest, dense=own.dense, parity=own.parity, drift=own.drift, score=score, serving=serving
        )

    def _rename_feature(self, feature: FeatureEntry) -> FeatureEntry:
        return msgspec.structs.replace(feature, table=self._names.get(feature.table, feature.table))


def _find_scores(manifest: Manifest | None) -> tuple[str, ...]:
    """Return the files of the source's score program: the program and its sample; none if it has none."""
    if manifest is None or manifest.score is msgspec.UNSET:
        return ()
    return manifest.score.program, manifest.score.sample


def keeps_rows(plan: SparsePlan, manifest: Manifest) -> bool:
    """Whether a package that is written by a plan has each table of its source as it is, except for shards and names.

    No name of a table is in the dense program: its inputs are called as the blocks of the model. The lists of the sample's rows
    and the lookups of the score program have names of tables, which follow.
    """
    checkpoint = plan.checkpoint
    entries = {table.name: table for table in manifest.tables}
    return (
        not plan.pruning
        and not len(plan.dropped)
        and not checkpoint.left_out
        and not casts_by_table(checkpoint, plan.selection)
        and {table.name_in_source for table in checkpoint.tables} == set(entries)
        and all(_is_same(table, entries[table.name_in_source]) for table in checkpoint.tables)
    )


def _is_same(table: TableMeta, entry: TableEntry) -> bool:
    default = None if entry.default_row is msgspec.UNSET else entry.default_row
    was_hashed = entry.is_hashed is msgspec.UNSET or entry.is_hashed
    return table.is_hashed == was_hashed and table.default_row == default


def _rename(path: str, data: bytes, names: Mapping[str, str]) -> bytes:
    """Return a file of the program's folder with the new names of tables; as it is where it has none of them."""
    if path.rpartition("/")[2] not in (SAMPLE_ROWS, DEFAULT_ROWS) or all(name == its for name, its in names.items()):
        return data
    renamed = {names.get(name, name): value for name, value in json.loads(data).items()}
    return (json.dumps(dict(sorted(renamed.items())), indent=1, ensure_ascii=False) + "\n").encode()


def read_checked(source: Directory, file: FileEntry) -> bytes:
    """Return a small file of a package. CheckpointError if it is not what the manifest says of it."""
    where = source.describe(file.path)
    try:
        size = source.stat(file.path).size
        data = source.read(file.path) if size == file.num_bytes else b""
    except OSError as error:
        raise CheckpointError(f"{where} cannot be read: {error.strerror or error}") from error
    if size != file.num_bytes or (file.digest and digest_bytes(data, algorithm_of(file.digest)) != file.digest):
        raise CheckpointError(f"{where} is not what the package's manifest.json says; `verify` tells more")
    return data

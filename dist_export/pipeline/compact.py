"""Make a full package of a delta package and its base: the steps of an export, with both packages as its source."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from dist_export.checkpoint.metadata import Checkpoint, SourceFile
from dist_export.delta.layered_source import LayeredReader
from dist_export.delta.overlaid_rows import find_wrong_numbers
from dist_export.delta.replaced_rows import has_table, plan_replacing
from dist_export.dense.fg import Features
from dist_export.errors import CheckpointError, ConfigError, PackageError
from dist_export.formats.digests import NONE
from dist_export.formats.recis import INDEX, MERGED, TENSORKEY
from dist_export.manifest import MANIFEST, list_entries
from dist_export.package.reader import Package, open_package
from dist_export.pipeline.compacted_package import TakenFromDelta, account_for_table, list_table_files, note_ignored
from dist_export.pipeline.identity import Told, identify_export
from dist_export.pipeline.planning import (
    PlannedSparse,
    count_threads,
    describe_row_indexed_tables,
    plan_sparse,
    read_metadata,
)
from dist_export.pipeline.source_changes import look_at_small_files
from dist_export.pipeline.source_package import compare_files, list_work, note_without_digest
from dist_export.pipeline.state import ExportState, Source
from dist_export.pipeline.steps import (
    Step,
    check_shards,
    commit,
    count_requests,
    find_same_package,
    lock_target,
    transfer_and_trace,
    write_rest,
)

T = TypeVar("T")
_LISTS_SHARE = 2
"""The deleted ids may take this part of ``max_memory``."""
_WORD = "compact"
"""In the identity of an export: no export of a package as a checkpoint is the same."""


def open_delta(path: str, base: str | None, options: dict[str, Any] | None) -> Package:
    """Open a delta package with its base.

    Args:
        path: the delta.
        base: its base; None looks where it was, and beside the delta.
        options: for the file system of both.

    Raises:
        ConfigError: it is a full package.
        CheckpointError: one of the two is missing, damaged or another package.
    """
    try:
        package = open_package(path, base=base, storage_options=options)
    except PackageError as error:
        raise CheckpointError(str(error)) from error
    if package.base is None:
        package.close()
        raise ConfigError(f"{path} is a full package, not a delta, so there is nothing to compact")
    return package


class Compaction:
    """The steps that are not those of every export. All ranks do each of them in turn."""

    def __init__(self, base: str | None) -> None:
        """Begin with nothing open. ``base`` is the directory of the base; None looks where it was, and beside the delta."""
        self._given = base
        self._package: Package | None = None

    @property
    def steps(self) -> tuple[Step, ...]:
        """All steps, in their order."""
        return (
            self.read,
            find_same_package,
            self.compare_with_digests,
            self.plan,
            self.compare_ids,
            lock_target,
            transfer_and_trace,
            check_shards,
            self.account,
            write_rest,
            count_requests,
            commit,
        )

    @property
    def package(self) -> Package:
        """The delta, open with its base; only after :meth:`read`."""
        assert self._package is not None
        return self._package

    def read(self, export: ExportState) -> ExportState:
        """Open all packages, and read the headers of their shards."""
        task, source = export.task, export.paths.source
        ranks, config = task.ranks, task.config
        assert source is not None
        path = config.ckpt_dir or ""

        def open_it() -> Package:
            package = open_delta(path, self._given, config.storage_options)
            if any(layer.directory.is_same(export.paths.final) for layer in package.layers):
                raise ConfigError(
                    f"{config.export_dir} is the base of {path}, whose place the new package would take; give another OUT"
                )
            return package

        self._package = package = ranks.run("open the delta and its base", open_it)
        task.held.callback(package.close)
        digests = [its.manifest.digest for its in self.package.layers]
        with task.reporter.stage("read"):
            checkpoint = read_metadata(ranks, lambda: LayeredReader(package))
            manifest = SourceFile.of(MANIFEST, source.stat(MANIFEST))
            small_files = ranks.broadcast(
                "look at the delta", lambda: {**look_at_small_files(source), MANIFEST: manifest}
            )
            told = Told(small_files, [_WORD, *digests], ranks.world_size)
            identity = ranks.broadcast(
                "identify the export", lambda: identify_export(config, task.objects, checkpoint, source, told)
            )
        read = Source(
            checkpoint=checkpoint,
            fg_conf=None,
            mc_conf=None,
            features=Features(features=(), blocks=(), has_mc=False, notes=()),
            parameters=None,
            held_state=[],
            trainer_state=[],
            small_files=small_files,
            identity=identity,
            has_manifest=True,
        )
        return export.grown(read=read, taken_over=TakenFromDelta(package))

    def compare_with_digests(self, export: ExportState) -> ExportState:
        """Compare the files of all packages with their digests, except the row indexes of the full one, which are not read."""
        task = export.task
        if task.config.digest == NONE:
            return export.grown(
                notes=["with digest: none the files of delta and base were not compared with their manifests"]
            )
        notes: list[str] = []
        with task.reporter.stage("compare"):
            for package in self.package.layers:
                manifest = package.manifest
                shards = {part.file for table in manifest.tables for part in table.parts}
                needed = shards | {INDEX, TENSORKEY, MERGED}
                if package.is_delta:
                    needed |= list_table_files(manifest)
                files = tuple(file for file in manifest.files if file.path in needed)
                look = functools.partial(list_work, package.directory, manifest, files)
                work = task.ranks.broadcast("look at the files of a package", look)
                compare_files(task.ranks, package.directory, work, threads=count_threads(task.config.threads))
                notes += note_without_digest(package.directory, work)
        return export.grown(notes=notes)

    def plan(self, export: ExportState) -> ExportState:
        """Plan the shards, without rows that the delta replaces or deletes."""
        task, package, checkpoint = export.task, self.package, export.source.checkpoint
        assert checkpoint is not None
        with task.reporter.stage("plan"):
            room = task.config.max_memory_bytes // _LISTS_SHARE
            threads = task.ranks.broadcast("count the threads", lambda: count_threads(task.config.threads))
            look = functools.partial(plan_replacing, checkpoint, package, threads=threads, most_bytes=room)
            rules = task.ranks.run("look at the deleted ids", lambda: _blame(look))
            task.ranks.broadcast("look at row numbers", lambda: _refuse_wrong_numbers(checkpoint, package))
            planned = plan_sparse(
                task.ranks, checkpoint, task.config, world_size=task.ranks.world_size, leaving=rules, tuning=task.tuning
            )
        return export.grown(notes=describe_row_indexed_tables(planned.plan), planned=planned)

    def compare_ids(self, export: ExportState) -> ExportState:
        """Compare the rows and ids of each layer with the account in its manifest. CheckpointError; reads nothing."""
        planned = export.planned
        assert planned is not None

        def look() -> None:
            for layer, package in enumerate(self.package.layers):
                _refuse_other_ids(planned, layer, package)

        export.task.ranks.broadcast("compare the ids with the manifests", look)
        return export

    def account(self, export: ExportState) -> ExportState:
        """Give each table the account of the delta's checkpoint. CommitError if the rows are not those that it says."""
        manifests = [layer.manifest for layer in self.package.layers]
        layers = {entry.name: list_entries(manifests, entry.name) for entry in export.tables}

        def account() -> tuple[Any, ...]:
            return tuple(account_for_table(entry, layers[entry.name]) for entry in export.tables)

        tables = export.task.ranks.run("account for delta and base", account)
        return export.grown(tables=tables, notes=note_ignored(tables, self.package.manifest))


def _blame(read: Callable[[], T]) -> T:
    try:
        return read()
    except PackageError as error:  # the source is unsound
        raise CheckpointError(str(error)) from error


def _refuse_wrong_numbers(checkpoint: Checkpoint, package: Package) -> None:
    """Refuse ids of the delta that are no row numbers of a row-indexed table. Rank 0. CheckpointError."""
    for table in checkpoint.tables:
        for layer in (its for its in package.layers[:-1] if has_table(its, table.name)):
            entry = layer.table(table.name)
            if not table.is_hashed and entry.rows_out:
                fault = _blame(functools.partial(find_wrong_numbers, layer, entry))
                if fault:
                    raise CheckpointError(f"{layer.directory.url}: table {table.name!r}: {fault}; run verify")


def _refuse_other_ids(planned: PlannedSparse, layer: int, package: Package) -> None:
    checkpoint, census = planned.plan.checkpoint, planned.census
    assert checkpoint.parts.layer is not None
    entries = {entry.name: entry for entry in package.manifest.tables}
    for number, table in enumerate(checkpoint.tables):
        entry = entries.get(table.name)
        if entry is None or not table.is_hashed:
            continue
        parts = np.array(checkpoint.parts.of_table(number), np.int64)
        mine = parts[checkpoint.parts.layer[parts] == layer]
        rows, id_sum = int(checkpoint.parts.rows[mine].sum()), int(census.id_sum[mine].sum(dtype=np.uint64))
        if (rows, f"{id_sum:016x}") != (entry.rows_out, entry.id_sum):
            raise CheckpointError(
                f"{package.directory.url}: table {table.name!r} has {rows:,} rows with the id sum {id_sum:016x}, and its "
                f"manifest.json says {entry.rows_out:,} and {entry.id_sum}; run verify"
            )

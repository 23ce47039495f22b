"""The manifest of an export before its commit: source, mode and tables."""

from __future__ import annotations

import time
from typing import Any

import msgspec

from dist_export.checkpoint.detect import PACKAGE, RECIS
from dist_export.checkpoint.metadata import Checkpoint
from dist_export.checkpoint.package_source import list_earlier
from dist_export.commit.publish import (
    DenseMeta,
    describe_dense_tensors,
    describe_left_out,
    describe_rules,
    list_versions,
)
from dist_export.config.schema import ExportConfig
from dist_export.delta.layered_directory import LayeredDirectory
from dist_export.manifest import (
    DELTA_SCHEMA_VERSION,
    SCHEMA_VERSION,
    FileEntry,
    Manifest,
    SourceEntry,
    TableEntry,
)
from dist_export.pipeline.account import account_export, fates_by_entry
from dist_export.pipeline.base_package import describe_base
from dist_export.pipeline.locate import Locations
from dist_export.pipeline.planning import PlannedSparse
from dist_export.pipeline.refresh import describe_refresh
from dist_export.pipeline.state import ExportState
from dist_export.pipeline.trainer_delta import describe_dumps
from dist_export.redact import redact_text
from dist_export.workdir.state import list_foreign_files


def describe_package(
    config: ExportConfig,
    checkpoint: Checkpoint | None,
    planned: PlannedSparse | None,
    tables: tuple[TableEntry, ...],
    located: Locations,
    trainer_state: DenseMeta,
    *,
    in_place: bool,
) -> Manifest:
    """Return the manifest without files, dense arch and run. Rank 0."""
    kept, dropped = ((), ()) if planned is None else describe_dense_tensors(planned.plan, trainer_state)
    copy = "in_place" if in_place else "copy"
    mode = "dense_only" if planned is None else "filter" if config.filter_sparse_opt else copy
    return Manifest(
        mode=mode,
        num_shards=0 if planned is None else planned.plan.num_shards,
        source=describe_dumps(
            SourceEntry(
                path=redact_text(config.ckpt_dir or ""),
                format=config.format if config.is_live else "none" if checkpoint is None else checkpoint.format,
                fingerprint="" if checkpoint is None else checkpoint.fingerprint,
                num_files=0 if checkpoint is None else len(checkpoint.files),
                num_bytes=0 if checkpoint is None else checkpoint.num_bytes,
                uri=located.source_uri or msgspec.UNSET,
                step=msgspec.UNSET if located.step is None else located.step,
                rows_step=located.rows_step,
                earlier=_list_earlier(checkpoint),
            ),
            checkpoint,
        ),
        tables=tables,
        left_out_tables=describe_left_out(checkpoint),
        prune=msgspec.UNSET if planned is None else describe_rules(planned.plan, planned.census),
        dense_tensors=kept,
        dropped_dense_tensors=dropped,
        files=(),
        dense=None,
        parity=None,
        notes=(),
        versions=list_versions(),
    )


def _list_earlier(checkpoint: Checkpoint | None) -> tuple[str, ...] | msgspec.UnsetType:
    if checkpoint is None or checkpoint.format not in (
        RECIS,
        PACKAGE,
    ):  # what lies in the directory is of another trainer
        return msgspec.UNSET
    if isinstance(checkpoint.directory, LayeredDirectory):  # compaction takes over the whole entry of the delta
        return msgspec.UNSET
    return list_earlier(checkpoint.directory) or msgspec.UNSET


def describe_export(export: ExportState) -> Manifest:
    """Return the manifest, still without its digest. Rank 0."""
    task, read, dense, planned = export.task, export.source, export.dense, export.planned
    account = account_export(
        read.checkpoint,
        planned,
        fates_by_entry(export.tables),
        dense_state=read.held_state or export.dense_state,
        taken=None if dense is None else dense.taken,
        held=frozenset() if export.scores is None else export.scores.held,
        is_filtered=bool(task.config.filter_sparse_opt),
        has_carried=task.config.is_refresh,
    )
    shards = [
        FileEntry(path=r.name, num_bytes=r.num_bytes, digest=r.digest, parts=r.parts or msgspec.UNSET)
        for r in export.receipts
    ]
    has_dense = read.checkpoint is not None and read.checkpoint.dump is not None
    files = (*shards, *export.index_files, *export.deleted_files, *export.small_files)
    manifest = describe_package(
        task.config,
        read.checkpoint,
        planned,
        export.tables,
        task.located,
        read.trainer_state,
        in_place=export.in_place,
    )
    described = msgspec.structs.replace(
        manifest,
        schema_version=SCHEMA_VERSION if export.base is None else DELTA_SCHEMA_VERSION,
        base=msgspec.UNSET if export.base is None else describe_base(export.base, has_dense=has_dense),
        files=files,
        account=account,
        dense=None if dense is None else dense.entry,
        parity=None if dense is None else dense.parity,
        drift=None if dense is None else dense.drift,
        score=(export.scores and export.scores.entry) or msgspec.UNSET,
        serving=(export.contract and export.contract.entry) or msgspec.UNSET,
        notes=(*export.notes, *(() if dense is None else dense.notes)),
        run=_describe_run(export, files),
    )
    return describe_refresh(described, export.base) if task.config.is_refresh and export.base is not None else described


def _describe_run(export: ExportState, files: tuple[FileEntry, ...]) -> dict[str, Any]:
    """Return what the manifest says of this run alone. Rank 0."""
    task, dense = export.task, export.dense
    misfit = task.located.base.directory if export.base is None else None
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(task.started)),
        "export_dir": redact_text(task.export_dir),
        "world_size": task.ranks.world_size,
        "ranks": [share._asdict() for share in export.shares],
        "seconds": {name: round(seconds, 3) for name, seconds in task.reporter.seconds.items()},
        "sample": None if dense is None else dense.counts,
        **({"drift": dense.drift_counts} if dense is not None and dense.drift_counts else {}),
        "reused_shards": export.reused,
        "left_alone": [] if export.in_place else list_foreign_files(export.target, {file.path for file in files}),
        "identity": export.source.identity,
        # the base that did not fit, of a full package in place of a delta: by it the same export again finds its package
        **({"misfit": [redact_text(misfit), task.located.base.digest]} if misfit else {}),
        **({} if dense is None else dense.own_values),
        **({} if export.exchanged is None else {"store": export.exchanged}),
    }

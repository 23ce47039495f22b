"""The manifest of an export before its commit: source, mode and tables."""

from __future__ import annotations

import msgspec

from dist_export.checkpoint.metadata import Checkpoint
from dist_export.commit.publish import (
    DenseMeta,
    describe_dense_tensors,
    describe_left_out,
    describe_rules,
    list_versions,
)
from dist_export.config.schema import ExportConfig
from dist_export.manifest import Manifest, SourceEntry, TableEntry
from dist_export.pipeline.locate import Locations
from dist_export.pipeline.planning import PlannedSparse
from dist_export.redact import conceal


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
        source=SourceEntry(
            path=conceal(config.ckpt_dir or ""),
            format=config.format if config.is_live else "none" if checkpoint is None else checkpoint.format,
            fingerprint="" if checkpoint is None else checkpoint.fingerprint,
            num_files=0 if checkpoint is None else len(checkpoint.files),
            num_bytes=0 if checkpoint is None else checkpoint.num_bytes,
            uri=located.source_uri or msgspec.UNSET,
            step=msgspec.UNSET if located.step is None else located.step,
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

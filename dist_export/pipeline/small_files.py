"""The small files of a package: everything except shards, row indexes, row fingerprints and the manifest. Rank 0."""

from __future__ import annotations

import tempfile
from pathlib import Path

from dist_export.commit.publish import DenseMeta, Earlier, render_indexes, write_small_files
from dist_export.formats.recis import MERGED
from dist_export.manifest import FileEntry
from dist_export.pipeline.inputs import FG, encode_fg
from dist_export.pipeline.planning import PlannedSparse
from dist_export.pipeline.state import ExportState
from dist_export.storage.directory import WORK_DIRECTORY, Directory, local_tree
from dist_export.workdir.state import note_small_files, remove_strays


def write_rest_of_files(export: ExportState) -> list[FileEntry]:
    """Write all files but shards and manifest. Rank 0."""
    target, planned, in_place = export.target, export.planned, export.in_place
    fg_conf, scratch = export.source.fg_conf, Path(export.scratch)
    small = {name: (scratch / name).read_bytes() for name in local_tree(scratch)}
    if fg_conf is not None:
        there = in_place and target.exists(FG)  # then it says the same, and a source file is not rewritten
        small[FG] = target.read(FG) if there else encode_fg(fg_conf)
    small |= export.taken_over.read()
    keep = frozenset({FG} if in_place else ())
    if planned is not None:
        dense_state = export.dense_state or export.taken_over.dense_state()
        small |= _render(planned, target, dense_state, in_place=in_place)
        keep |= frozenset(planned.plan.checkpoint.verbatim) | {MERGED} if in_place else frozenset()
    if not in_place:
        note_small_files(target, list(small))
        shards = [] if planned is None else [file.name for file in planned.plan.files]
        beside = {file.path for file in (*export.index_files, *export.deleted_files)}
        remove_strays(target, {*shards, *beside})
    task, base = export.task, export.base
    return write_small_files(
        target,
        small,
        digest=task.config.digest,
        keep=keep,
        earlier=None if base is None else Earlier(base.directory, frozenset(base.manifest.files)),
        chunk_bytes=task.tuning.chunk_bytes,
    )


def open_scratch(target: Directory) -> tempfile.TemporaryDirectory[str]:
    """Return a directory for what is traced: where the target is local within it, so that a killed export leaves no litter."""
    return tempfile.TemporaryDirectory(
        prefix="scratch-" if target.is_local else "dist_export-",
        dir=target.join(WORK_DIRECTORY) if target.is_local else None,
        ignore_cleanup_errors=True,  # by then the export has failed for a better reason, or is committed
    )


def _render(planned: PlannedSparse, target: Directory, dense_state: DenseMeta, *, in_place: bool) -> dict[str, bytes]:
    """Return the json files of the sparse part, index last as RecIS writes it; in place, those of the source as they are."""
    verbatim = planned.plan.checkpoint.verbatim
    rendered = render_indexes(planned.plan, dense_state)
    if in_place:
        return {**rendered, **{name: target.read(name) for name in (MERGED, *verbatim) if target.exists(name)}}
    if planned.plan.is_copy:
        rendered |= {name: verbatim[name] for name in reversed(list(verbatim))}
    return rendered

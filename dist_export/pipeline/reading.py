"""Read what there is to export: the metadata of the source, fg and mc, and what the dense arch will need."""

from __future__ import annotations

from typing import NamedTuple

from dist_export.checkpoint.metadata import Checkpoint, SourceFile
from dist_export.commit.publish import DenseMeta
from dist_export.manifest import MANIFEST
from dist_export.package.reader import Package
from dist_export.pipeline.base_package import open_base
from dist_export.pipeline.identity import Told, find_incomparable, identify_export
from dist_export.pipeline.inputs import (
    find_dense,
    look_at_source,
    note_renamed,
    open_source,
    read_confs,
    refuse_unscored,
)
from dist_export.pipeline.source_changes import look_at_small_files
from dist_export.pipeline.state import ExportState, Source
from dist_export.pipeline.trainer_delta import is_trainer_delta, open_trainer_delta
from dist_export.plan.selection import is_trainer_state


class _Identified(NamedTuple):
    """What rank 0 finds out for all ranks."""

    held_state: DenseMeta
    notes: list[str]
    small_files: dict[str, SourceFile]
    identity: str
    has_manifest: bool


def _open_tables(export: ExportState, base: Package | None) -> Checkpoint | None:
    """Open the tables of the source, which may be a trainer's own deltas over ``base``. All ranks."""
    task, source = export.task, export.paths.source
    if base is not None and source is not None and is_trainer_delta(task.config.format):
        return open_trainer_delta(task.ranks, task.config, source, base)
    objects = task.objects
    return open_source(
        task.ranks,
        task.config,
        source,
        model=objects.model,
        weights=task.weights,
        exports_dense=objects.dataset is not None,
    )


def read_source(export: ExportState) -> ExportState:
    """Read the metadata of the checkpoint, fg and mc, and what the dense arch will need. All ranks."""
    task, paths = export.task, export.paths
    ranks, config, objects, source = task.ranks, task.config, task.objects, paths.source
    base = open_base(ranks, config, task.located.base.digest, paths.final, held=task.held)
    none: dict[str, SourceFile] = {}
    small_files = ranks.check_on_first("look at the checkpoint", lambda: look_at_small_files(source), none)
    with task.reporter.stage("read"):
        checkpoint = _open_tables(export, base)
        notes = list(checkpoint.warnings if checkpoint is not None else ())
        fg_conf, mc_conf, features = ranks.check("check fg and mc", lambda: read_confs(config, objects, checkpoint))
        notes += [*features.notes, *note_renamed(fg_conf, checkpoint)]
        if export.in_place:
            folder = None if config.model is None else config.export_folder_name
            notes += ranks.broadcast(
                "look at what is there",
                lambda: look_at_source(export.target, fg_conf, folder, has_tables=config.need_export_sparse),
            )
        # read also for the tables alone: one that is cut short tells of a save that did not finish
        parameters = ranks.check(
            "look for dense parameters", lambda: find_dense(config, source, checkpoint, task.weights)
        )

        ranks.check("look for what scores need", lambda: refuse_unscored(config, objects, checkpoint))

        def identify() -> _Identified:
            held = parameters.describe() if parameters is not None else ()
            files, notes_on_state = small_files, []
            if checkpoint is None and parameters is not None:  # else the tables' reader has told
                notes_on_state = list(parameters.notes)
                files = {**{file.name: file for file in parameters.list_files()}, **small_files}
            told = Told(files, [fg_conf, mc_conf, task.located.base.digest], ranks.world_size)
            identity = identify_export(config, objects, checkpoint, source, told)
            has_manifest = source is not None and source.exists(MANIFEST)
            return _Identified(held, notes_on_state, files, identity, has_manifest)

        found = ranks.broadcast("identify the export", identify)
    notes += found.notes
    trainer_state = [it for it in found.held_state if config.filter_sparse_opt and is_trainer_state(it[0])]
    if incomparable := find_incomparable(config):
        notes.append(incomparable)
    read = Source(
        checkpoint=checkpoint,
        fg_conf=fg_conf,
        mc_conf=mc_conf,
        features=features,
        parameters=parameters,
        held_state=found.held_state,
        trainer_state=trainer_state,
        small_files=found.small_files,
        identity=found.identity,
        has_manifest=found.has_manifest,
    )
    left = [it for it in found.held_state if it not in trainer_state]
    return export.grown(notes=notes, read=read, base=base, dense_state=left)

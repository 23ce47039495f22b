"""The whole story of an export on one page: read, plan, sample, transfer beside trace, check, write, score, commit."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from dist_export.checkpoint.model_weights import ModelWeights
from dist_export.commit.publish import add_casts, publish
from dist_export.commit.row_indexes import note_unindexed
from dist_export.config.schema import ExportConfig
from dist_export.delta.deleted_ids import list_files
from dist_export.formats.tuning import Tuning
from dist_export.manifest import FileEntry, Manifest, TableEntry, seal
from dist_export.model.user_objects import Objects
from dist_export.pipeline.account import list_dense_left, note_dense_left
from dist_export.pipeline.base_package import fit_base, refuse_replaced_base
from dist_export.pipeline.deltas import account_for_base
from dist_export.pipeline.locate import Locations, register_package
from dist_export.pipeline.package_manifest import describe_export
from dist_export.pipeline.planned_files import list_planned, may_copy_within, writes_fingerprints
from dist_export.pipeline.planning import describe_row_indexed_tables, plan_sparse
from dist_export.pipeline.reading import read_source
from dist_export.pipeline.refresh import (
    describe_sample_rows,
    plan_carried,
    refuse_other_program,
    refuse_other_signature,
    settings_for,
)
from dist_export.pipeline.scores import casts_of, score_sample, state_contract, trace_scores
from dist_export.pipeline.shards import check, compare_live, transfer
from dist_export.pipeline.small_files import open_scratch, write_rest_of_files
from dist_export.pipeline.source_changes import refuse_changed_files, refuse_changed_payload
from dist_export.pipeline.source_package import compare_source_ids, compare_source_package
from dist_export.pipeline.state import ExportState, Task
from dist_export.pipeline.taken_program import look_for_program
from dist_export.pipeline.target import (
    claim,
    clear_target,
    commit_paths,
    find_committed,
    find_same,
    open_paths,
)
from dist_export.pipeline.target_state import OnDisk
from dist_export.pipeline.trainer_delta import (
    as_base,
)
from dist_export.plan.casts import note_unreadable
from dist_export.plan.prune_report import note_rules
from dist_export.registry.versions import refuse_needed
from dist_export.reporting.progress import Reporter
from dist_export.reporting.summary import summarize, summarize_same
from dist_export.runtime.ranks import Ranks
from dist_export.storage.traffic import TRAFFIC
from dist_export.transfer.casting import refuse_overflow
from dist_export.workdir.presence import Written, note_written, refuse_vanished

logger = logging.getLogger(__name__)

Step = Callable[[ExportState], ExportState]


def export_located(
    ranks: Ranks,
    config: ExportConfig,
    objects: Objects,
    located: Locations,
    reporter: Reporter,
    weights: ModelWeights | None,
    export_dir: str,
    steps: Sequence[Step],
    tuning: Tuning,
) -> tuple[Manifest, list[str]]:
    """Export, and return the committed manifest and the closing summary. All ranks, each with its own objects.

    ``config`` has the paths that ``located`` found, ``weights`` is what the model says of a checkpoint's tensors, and
    ``export_dir`` is where the package goes, the day's subfolder included. ``steps`` are done until one of them sets a manifest.
    ``tuning``: the sizes of pieces.

    Raises:
        UserError: before anything is written, for what the user can mend.
        ExportError: later; then there is no manifest and so no package.
        StepFailedError: either, where another rank had it or several had.
    """
    with contextlib.ExitStack() as held:
        task = Task(
            ranks=ranks,
            config=config,
            objects=objects,
            located=located,
            reporter=reporter,
            weights=weights,
            export_dir=export_dir,
            held=held,
            started=time.time(),
            traffic=TRAFFIC.snapshot(),
            tuning=tuning,
        )
        export = ExportState(task=task, paths=open_paths(ranks, config, export_dir, objects.model), notes=located.notes)
        for step in steps:
            export = step(export)
            if export.manifest is not None:
                break
    manifest = export.manifest
    assert manifest is not None
    versions = [f"  version  {uri}" for uri in export.registered]
    if export.is_same:
        return manifest, summarize_same(manifest, export_dir) + versions
    reporter.note_result(manifest, list(export.shares))
    return manifest, summarize(manifest, export.shares, export_dir) + versions


def find_same_package(export: ExportState) -> ExportState:
    """End the export where the target holds its package already. All ranks."""
    task = export.task
    registered: list[str] = []

    def look() -> Manifest | None:
        same = find_same(export.paths, task.config, export.source.identity)
        return same and _register(task, same, registered)

    # a package that comes later is found when the target is locked
    same = task.ranks.broadcast("look for the same export", look) if export.paths.has_package else None
    return export.grown(manifest=same, is_same=same is not None, registered=tuple(registered))


def plan_tables(export: ExportState) -> ExportState:
    """Plan the shards, if tables are exported. All ranks; reads metadata and ids, writes nothing."""
    task, read = export.task, export.source
    config, objects, checkpoint = task.config, task.objects, read.checkpoint
    if not config.need_export_sparse:
        return plan_carried(export) if config.is_refresh else export
    assert checkpoint is not None
    config = as_base(config, checkpoint)
    notes: list[str] = []
    with task.reporter.stage("plan"):
        world_size = task.ranks.world_size
        fitting, base, notes_on_base = fit_base(task.ranks, checkpoint, config, export.base, world_size=world_size)
        notes += notes_on_base
        planned = plan_sparse(task.ranks, fitting, config, world_size=world_size, base=base, tuning=task.tuning)
        plan = planned.plan
        notes += describe_row_indexed_tables(plan)
        notes += note_unreadable(checkpoint, plan.selection)
        if not export.in_place and (objects.model is None or objects.dataset is None):
            notes += note_dense_left(list_dense_left(export.dense_state, plan), checkpoint)
        notes += look_for_program(export, plan, base)
        notes += note_rules(checkpoint, plan.pruning, planned.census.pruned)
    return export.grown(notes=notes, planned=planned, base=base)


def sample_model(export: ExportState) -> ExportState:
    """Run the model on its sample batch, if a dense arch is exported. All ranks; writes nothing."""
    task, read = export.task, export.source
    ranks, config, objects = task.ranks, task.config, task.objects
    if objects.model is None or objects.dataset is None:
        return export
    from dist_export.dense.stage import DenseStage  # torch.export costs a second that other exports need not pay

    with task.reporter.stage("sample"):
        dense = DenseStage(ranks, settings_for(config, export.base), objects, read.parameters)
        notes = dense.prepare(describe_sample_rows(export), read.features, casts=casts_of(export))
    return export.grown(notes=notes, dense=dense, dense_state=export.dense_state or dense.parameters)


def lock_target(export: ExportState) -> ExportState:
    """Take the target for this export alone, or end with the package that an earlier attempt committed. All ranks."""
    task, planned = export.task, export.planned
    ranks, config, identity = task.ranks, task.config, export.source.identity
    shards = [] if planned is None else list_planned(planned.plan, export.target, config)
    if export.base is not None:
        shards += list_files(export.base)
    paths, refuse_if_lost = claim(ranks, export.paths, config, identity, shards, task.held.callback)
    registered: list[str] = []

    def begin() -> tuple[Manifest | None, str]:
        """Return the package that an earlier attempt has committed, or else a temporary directory."""
        clear_target(paths, config, identity)
        committed = find_committed(
            paths, config, identity, and_then=lambda manifest: _register(task, manifest, registered)
        )
        return committed, "" if committed is not None else task.held.enter_context(open_scratch(paths.target))

    committed, scratch = ranks.broadcast("look at what is there", begin)
    if committed is not None:
        return export.grown(paths=paths, manifest=committed, is_same=True, registered=tuple(registered))
    ranks.note_on_disk(ranks.check("note what is in export_dir", lambda: OnDisk(paths.final, paths.target)))
    return export.grown(paths=paths, refuse_if_lost=refuse_if_lost, scratch=scratch)


def transfer_and_trace(export: ExportState) -> ExportState:
    """Write the shards, while rank 0 traces the dense arch. All ranks."""
    task, dense, planned = export.task, export.dense, export.planned
    ranks, config = task.ranks, task.config
    written: Written = {}

    def trace() -> None:
        if dense is not None and ranks.rank == 0:
            with task.reporter.stage("trace"):
                dense.trace(Path(export.scratch) / config.export_folder_name, export.source.mc_conf)
                if export.scores is not None:
                    export.scores.write(Path(export.scratch))

    with task.reporter.stage("transfer"):
        if planned is None or config.is_refresh:
            ranks.all_gather("trace the dense arch", trace)
        if planned is None:
            return export
        if config.is_refresh:
            refuse_other_program(export)
        sizes = {file.name: file.num_bytes for file in planned.plan.files}
        receipts, shares, reused, casts = transfer(
            ranks,
            planned,
            export.target,
            task.reporter,
            beside=(lambda: None) if config.is_refresh else trace,
            # what comes later was not checked
            and_then=lambda: written.update(note_written(export.target, sizes)),
            in_place=export.in_place,
            digest=config.digest,
            may_copy=may_copy_within(export.paths, server_side_copy=config.server_side_copy),
        )
    return export.grown(receipts=tuple(receipts), shares=tuple(shares), reused=reused, casts=casts, written=written)


def check_shards(export: ExportState) -> ExportState:
    """Read the ids of the shards back and account for every row, if tables are exported. All ranks."""
    task, planned, target, casts = export.task, export.planned, export.target, export.casts
    if planned is None:
        return export
    ranks, plan = task.ranks, planned.plan
    written = dict(export.written)
    with task.reporter.stage("check"):
        if task.config.on_overflow == "error":
            ranks.check("look for values that do not fit", lambda: refuse_overflow(plan, casts))
        checked = check(
            ranks,
            planned,
            target,
            row_index=task.config.row_index,
            row_fingerprints=writes_fingerprints(task.config, plan, target),
            digest=task.config.digest,
            in_place=export.in_place,
        )
        tables: tuple[TableEntry, ...] = add_casts(plan, checked.tables, casts)
        index_files = (*(index.file for index in checked.indexes), *checked.fingerprints)
        index_sizes = {file.path: file.num_bytes for file in index_files}
        noted: Written = {}
        written |= ranks.check_on_first("look at the row indexes", lambda: note_written(target, index_sizes), noted)
        if plan.checkpoint.memory is not None:
            compare_live(ranks, planned, target)
    notes = note_unindexed(checked.indexes)
    return export.grown(notes=notes, tables=tables, index_files=index_files, written=written)


def write_rest(export: ExportState) -> ExportState:
    """Write the dense folder, fg.json and the indexes. All ranks; rank 0 writes."""
    written = dict(export.written)

    def write() -> list[FileEntry]:
        files = write_rest_of_files(export)
        written.update(note_written(export.target, {file.path: file.num_bytes for file in files}))
        return files

    with export.task.reporter.stage("write"):
        files = export.task.ranks.broadcast("write the small files", write)
    return export.grown(small_files=tuple(files), written=written)


def count_requests(export: ExportState) -> ExportState:
    """Add up the requests to stores, if one is used. All ranks."""
    task, source = export.task, export.paths.source
    if (source is None or source.s3 is None) and export.target.s3 is None:
        return export
    counts = task.ranks.all_gather("count the requests", lambda: TRAFFIC.since(dict(task.traffic)))
    return export.grown(exchanged={name: sum(its[name] for its in counts) for name in TRAFFIC.NAMES})


def commit(export: ExportState) -> ExportState:
    """Look once more whether all is as it was checked, and publish the manifest. All ranks; rank 0 writes."""
    task, read = export.task, export.source
    registered: list[str] = []

    def publish_package() -> Manifest:
        manifest = seal(export.taken_over.describe(describe_export(export)))
        refuse_changed_files(export.paths.source, read.small_files)
        if read.checkpoint is not None:
            refuse_changed_payload(read.checkpoint)
        export.refuse_if_lost()
        task.ranks.refuse_orphans()
        refuse_vanished(export.target, export.written, in_place=export.in_place)
        if export.base is not None:
            refuse_replaced_base(export.base)
        if export.paths.is_replacing:
            refuse_needed(export.paths.final)
        publish(export.target, manifest)
        for name in commit_paths(export.paths, and_then=lambda: _register(task, manifest, registered)):
            logger.info("%s was not part of the old package, and was kept", name)
        return manifest

    with task.reporter.stage("commit"):
        manifest = task.ranks.broadcast("commit", publish_package)
    return export.grown(manifest=manifest, registered=tuple(registered))


STEPS: tuple[Step, ...] = (
    read_source,
    find_same_package,
    compare_source_package,
    plan_tables,
    compare_source_ids,
    sample_model,
    trace_scores,
    state_contract,
    refuse_other_signature,
    lock_target,
    transfer_and_trace,
    check_shards,
    account_for_base,
    write_rest,
    score_sample,
    count_requests,
    commit,
)
"""An export. The first that sets ``manifest`` ends it."""


def _register(task: Task, manifest: Manifest, registered: list[str]) -> Manifest:
    """Register the package as a new version where that was asked for, and note its URI. Rank 0."""
    if uri := register_package(task.config, task.located, manifest, task.export_dir):
        registered.append(uri)
        task.reporter.note_registered(uri)
    return manifest

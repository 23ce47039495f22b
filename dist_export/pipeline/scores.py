"""The steps that score: the score program is traced before anything is written, and the sample is scored from the files."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dist_export.delta.carried_tables import encodings_of
from dist_export.formats.row_encodings import RowCast
from dist_export.manifest import SCORE_FOLDER, seal
from dist_export.package.reader import Package
from dist_export.pipeline.deltas import describe_written_rows
from dist_export.pipeline.inputs import refuse_without_scores
from dist_export.pipeline.package_manifest import describe_export
from dist_export.pipeline.refresh import settings_for
from dist_export.pipeline.state import ExportState
from dist_export.plan.casts import casts_by_table

if TYPE_CHECKING:
    from dist_export.dense.blocks import Blocks
    from dist_export.dense.stage import DenseStage
    from dist_export.score.stage import ScoreStage


def trace_scores(export: ExportState) -> ExportState:
    """Trace the score program, if there are tables to look rows up in. All ranks; writes nothing."""
    task, dense, planned = export.task, export.dense, export.planned
    if dense is None or dense.finder is None or planned is None or task.config.score_program == "off":
        if task.config.score_program == "require":
            task.ranks.run("look for what a score program needs", refuse_without_scores)
        return export if dense is None else export.grown(notes=_note_sparse(export, dense, None))
    from dist_export.score.stage import ScoreStage

    scores = ScoreStage(task.ranks, settings_for(task.config, export.base), dense, casts_of(export))
    with task.reporter.stage("trace scores"):
        notes = scores.trace()
    notes = [*_note_sparse(export, dense, scores), *notes]
    return export.grown(notes=notes, scores=scores if scores.is_there else None)


def state_contract(export: ExportState) -> ExportState:
    """Put the serving contract together, if anything can tell of it. All ranks; writes nothing."""
    task, dense, read = export.task, export.dense, export.source
    asked = isinstance(task.config.serving, dict)
    has_source = export.scores is not None or asked or bool(read.features.has_mc)
    if task.config.serving == "off" or dense is None or dense.finder is None or not has_source:
        return export
    from dist_export.contract.stage import ContractStage

    contract = ContractStage(task.ranks, settings_for(task.config, export.base), dense, export.scores)
    with task.reporter.stage("state contract"):
        notes = contract.state(read.fg_conf, read.features)
    return export.grown(notes=notes, contract=contract)


def casts_of(export: ExportState) -> dict[str, RowCast]:
    """Return by table how rows are written otherwise than the source has them; of a carried base, how its rows are encoded."""
    planned, base = export.planned, export.base
    if planned is None:
        return {}
    if export.task.config.is_refresh and base is not None:
        return encodings_of(base.manifest)
    return casts_by_table(planned.plan.checkpoint, planned.plan.selection)


def _note_sparse(export: ExportState, dense: DenseStage, scores: ScoreStage | None) -> list[str]:
    """Return notes on what the sparse arch holds besides tables. All ranks."""
    from dist_export.dense.sample_notes import note_sparse_values

    held = frozenset() if scores is None else scores.held
    return export.task.ranks.broadcast("look at the sparse arch", lambda: note_sparse_values(dense.sparse_state, held))


def score_sample(export: ExportState) -> ExportState:
    """Score the sample with what was written, and compare with the model, if a dense arch is exported. All ranks."""
    task, planned, dense, scores = export.task, export.planned, export.dense, export.scores
    contract, notes = export.contract, []

    def open_written() -> Package:  # rank 0
        return Package(export.target, unpublished=seal(describe_export(export)), opened=export.base)

    if dense is None:
        return export

    def compare_beside(run_sparse: Callable[[Any], Blocks], blocks: Blocks) -> None:
        if scores is not None:
            scores.compare_written(open_written, run_sparse, blocks)
        if contract is not None:
            notes.extend(contract.compare_written(open_written, blocks))

    with task.reporter.stage("score"):
        as_served = None if planned is None else describe_written_rows(export, planned)
        lists = None if planned is None else planned.id_lists
        beside = None if scores is None and contract is None else compare_beside
        dense.score(as_served, export.target, entries=export.tables, lists=lists, beside=beside)
    export = export.grown(notes=notes)
    return export if scores is None or not scores.left_out else _without_scores(export, scores.left_out)


def _without_scores(export: ExportState, note: str) -> ExportState:
    """Remove the files of the score program, and go on without it. All ranks."""
    folder = f"{SCORE_FOLDER}/"
    files = {file.path for file in export.small_files if file.path.startswith(folder)}
    export.task.ranks.broadcast("remove the score program", lambda: export.target.remove_tree(SCORE_FOLDER))
    return export.grown(
        notes=[note],
        scores=None,
        small_files=tuple(file for file in export.small_files if file.path not in files),
        written={path: seen for path, seen in export.written.items() if path not in files},
    )

"""A delta without tables of its own: a new dense part over the tables of the base, of which all rows stay the same.

No row of the checkpoint is read. The sample is scored with rows of the base, by the model and by the package.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from dist_export.checkpoint.metadata import Checkpoint
from dist_export.checkpoint.model_weights import ModelWeights, is_below
from dist_export.config.schema import ExportConfig
from dist_export.delta.carried_tables import (
    account_carried,
    carry_tables,
    find_other_table,
    name_in_source,
    settings_of,
)
from dist_export.delta.signature import (
    find_other_contract,
    find_other_dense,
    find_other_names,
    find_other_score,
    find_other_tensors,
    list_unknown,
)
from dist_export.dense.source_rows import SourceRows
from dist_export.errors import ModelError, PlanError
from dist_export.formats.strict_json import decode_object
from dist_export.humanize import few
from dist_export.manifest import BaseEntry, DenseEntry, DriftEntry, Manifest, ServingEntry, SourceEntry, TableEntry
from dist_export.package.reader import Package
from dist_export.package.serving_fit import find_misfits
from dist_export.pipeline.planning import describe_source_rows, plan_sparse
from dist_export.pipeline.state import ExportState
from dist_export.runtime.ranks import Ranks

if TYPE_CHECKING:
    from dist_export.dense.eager import DenseSample

_COLUMNS = "input_columns.json"
_ADVICE = "Nothing was written; export the tables too, or give another base"
NOT_MEASURED = "the rows are those of the base, and no row of the checkpoint was read to compare with"


def settings_for(config: ExportConfig, base: Package | None) -> ExportConfig:
    """Return the settings as what exports tables takes them: with those of the tables of the base, if these are carried."""
    if not config.is_refresh or base is None:
        return config
    more = {"need_export_sparse": True, "filter_sparse_opt": True, "num_shards": 1}
    return config.with_changes(**more, **settings_of(base.manifest))


def plan_carried(export: ExportState) -> ExportState:
    """Plan shards without rows, one for all tables of the base. All ranks; reads nothing of the tables, and writes nothing.

    Raises:
        PlanError: the base has no dense arch, or other tables than the checkpoint.
        ModelError: the model maps raw ids to rows, or its dense arch has a table as its own weight.
    """
    task, base, checkpoint = export.task, export.base, export.source.checkpoint
    assert base is not None
    with task.reporter.stage("plan"):
        note = compare_tables(task.ranks, base, checkpoint)
        task.ranks.check("look for managed collisions", lambda: _refuse_collisions(task.objects.model))
        task.ranks.check("look for tied weights", lambda: _refuse_ties(task.weights, base.manifest))
        carried = carry_tables(base.manifest, base.directory, checkpoint)
        planned = plan_sparse(
            task.ranks, carried, settings_for(task.config, base), world_size=task.ranks.world_size, tuning=task.tuning
        )
    return export.grown(planned=planned, notes=[note])


def compare_tables(ranks: Ranks, base: Package, checkpoint: Checkpoint | None) -> str:
    """Compare the tables of a base with those of the checkpoint, by their metadata. All ranks.

    Returns a note on whose tables these are.

    Raises:
        PlanError: the base has no dense arch, or other tables than the checkpoint.
    """
    manifest = base.manifest

    def compare() -> None:
        if manifest.dense is None:
            raise _misfit(base, "it has no dense arch whose inputs and outputs the new one could have")
        if manifest.source.was_renamed:
            raise _misfit(
                base,
                f"it was exported from the package {manifest.source.path}, some of whose tables had been renamed, so nobody "
                "knows which tables of the checkpoint they are",
            )
        if checkpoint is not None and (reason := find_other_table(checkpoint, manifest)):
            raise _misfit(base, reason)

    ranks.check("compare the tables with the base", compare)
    return (
        f"the tables are those of the base {_path_of(base)}, {_say_rows(manifest.source)}, older than the dense part; "
        "scores were compared with the model on rows of the base, and not with scores on the rows of the checkpoint"
    )


def _say_rows(source: SourceEntry) -> str:
    """Return whose rows a base has; if it had a new dense part alone, not those of the checkpoint that it names."""
    if source.other_rows:
        return f"with {source.other_rows}"
    return f"exported from {source.path}" + ("" if source.dense_step is None else f" (step {source.dense_step:,})")


def _refuse_collisions(model: Any) -> None:
    """Refuse a model whose modules map raw ids to rows: the rows of the base go by the maps of its own checkpoint. ModelError."""
    from dist_export.model.managed_collisions import is_collision_module  # torch

    path = next((path for path, module in model.named_modules() if is_collision_module(module)), None)
    if path is not None:
        raise ModelError(
            f"{path} maps raw ids to rows of a table, by now to others than when the base was exported, and with "
            "need_export_sparse: false the rows stay those of the base. Nothing was written; export the tables too"
        )


def _refuse_ties(weights: ModelWeights | None, base: Manifest) -> None:
    """Refuse a dense arch that shares a table's weight: it would have the checkpoint's, and lookups the base's. ModelError."""
    tables = {name_in_source(table) for table in base.tables}
    for names in sorted(() if weights is None else weights.ties):
        assert weights is not None
        own = [name for name in names if is_below(name, weights.dense_name)]
        if own and (tied := [name for name in names if name in tables and name not in own]):
            raise ModelError(
                f"{own[0]} of the dense arch is the weight of table {tied[0]!r}, and with need_export_sparse: false the dense "
                "arch would have that of the checkpoint, and lookups that of the base. Nothing was written; export the tables too"
            )


def describe_sample_rows(export: ExportState) -> SourceRows | None:
    """Return the rows for the sample: those of the source; or those of the base, if its tables are carried. Any rank."""
    planned, base = export.planned, export.base
    if not export.task.config.is_refresh or planned is None or base is None:
        return describe_source_rows(export.source.checkpoint, planned)

    def find(table: str, slot: str, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return base.lookup(table, ids, slot=slot, raw=True)

    return SourceRows(checkpoint=planned.plan.checkpoint, is_written=True, in_base=find)


def account_for_carried(export: ExportState) -> ExportState:
    """Add to each table its account: all rows of the base are the same. All ranks."""
    assert export.base is not None
    in_base = {table.name: table for table in export.base.manifest.tables}
    return export.grown(tables=tuple(account_carried(entry, in_base[entry.name]) for entry in export.tables))


def describe_refresh(manifest: Manifest, base: Package) -> Manifest:
    """Return the manifest of an export with what is of the base, and without a drift that compares the base with itself."""
    drift = None if manifest.drift is None else DriftEntry(batches=0, rows=0, outputs={}, not_measured=NOT_MEASURED)
    assert isinstance(manifest.base, BaseEntry)
    entry = msgspec.structs.replace(manifest.base, dense_only=True)
    source, rows_step = manifest.source, base.manifest.source.step_of_rows
    if rows_step != source.dense_step:
        source = msgspec.structs.replace(source, rows_step=rows_step)
    return msgspec.structs.replace(
        manifest, source=source, base=entry, left_out_tables=base.manifest.left_out_tables, drift=drift
    )


# ---- what the dense part takes and gives ----


def refuse_other_signature(export: ExportState) -> ExportState:
    """Compare what the dense part takes and gives with the base, before anything is written. All ranks. PlanError."""
    if not export.task.config.is_refresh:
        return export

    def compare() -> list[str]:
        _refuse(export, lambda: _compare_sample(export))
        return _note_unknown(export)

    return export.grown(notes=export.task.ranks.broadcast("compare the inputs with the base", compare))


def refuse_other_program(export: ExportState) -> None:
    """Compare the traced dense arch with that of the base, before shards are written. All ranks. PlanError."""

    def compare() -> str:
        assert export.dense is not None
        assert export.dense.entry is not None
        return find_other_dense(export.dense.entry, _dense_of(export))

    export.task.ranks.broadcast("compare the dense arch with the base", lambda: _refuse(export, compare))


def _refuse(export: ExportState, compare: Callable[[], str]) -> None:
    assert export.base is not None
    if reason := compare():
        raise _misfit(export.base, reason)


def _compare_sample(export: ExportState) -> str:
    """Return the first difference that the sample, the score program and the contract show; empty if there is none. Rank 0."""
    dense, base, theirs = export.dense, export.base, _dense_of(export)
    assert dense is not None
    assert base is not None
    sample = dense.sample
    assert sample is not None
    return (
        _compare_dense_sample(sample, theirs, export.task.config.dynamic_dims)
        or _compare_columns(base, export.source.mc_conf)
        or _compare_score(export, base.manifest)
        or _compare_contract(export, base.manifest)
    )


def _compare_dense_sample(sample: DenseSample, theirs: DenseEntry, dynamic_dims: Any) -> str:
    from dist_export.dense.folder import describe_inputs  # torch

    names = [entry.name for entry in theirs.inputs]
    inputs = {name: tensor for name, tensor in sample.inputs.items() if name in names}
    return (
        find_other_names("blocks of the dense arch", list(sample.blocks.tensors), theirs.input_order)
        or find_other_tensors("input", describe_inputs(inputs, dynamic_dims), theirs.inputs)
        or find_other_names("outputs", sample.output_names, [entry.name for entry in theirs.outputs])
    )


def _compare_columns(base: Package, mc_conf: Any) -> str:
    """Compare which features mc puts into the columns of each input."""
    before, now = _read_columns(base), dict(mc_conf or {})
    if list(now) != list(before):
        return find_other_names("blocks of mc", list(now), list(before))
    other = next((block for block in now if now[block] != before[block]), None)
    return "" if other is None else f"mc has other features for block {other!r} than the base"


def _read_columns(base: Package) -> dict[str, Any]:
    """Return what mc said of the blocks of the base."""
    assert base.manifest.dense is not None
    name = f"{base.manifest.dense.folder}/{_COLUMNS}"
    return decode_object(base.files.read(name), what=base.directory.describe(name))


def _note_unknown(export: ExportState) -> list[str]:
    """Return a note on inputs of which nobody says which features are in their columns. Rank 0."""
    base = export.base
    assert base is not None
    names = [entry.name for entry in _dense_of(export).inputs]
    before = base.manifest.serving
    unknown = list_unknown(_preview_contract(export), None if before is msgspec.UNSET else before, names)
    columns = _read_columns(base)
    if not (unknown := [name for name in unknown if name not in columns]):
        return []
    told = f"which features are in the columns of {few(unknown)}, neither mc nor the serving contracts say"
    return [f"{told}, so their order within an input was not compared with the base"]


def _compare_score(export: ExportState, base: Manifest) -> str:
    ours = None if export.scores is None else export.scores.entry
    return "" if ours is None or base.score is msgspec.UNSET else find_other_score(ours, base.score)


def _compare_contract(export: ExportState, base: Manifest) -> str:
    """Compare the serving contract with the tables of the base, and with its contract."""
    serving = _preview_contract(export)
    if serving is None:
        return ""
    if misfits := find_misfits(base, serving):
        return f"the serving contract does not fit its tables: {misfits[0]}"
    return "" if base.serving is msgspec.UNSET else find_other_contract(serving, base.serving)


def _preview_contract(export: ExportState) -> ServingEntry | None:
    """Return the serving contract as it will be; None if there is none. Rank 0."""
    assert export.base is not None
    if export.contract is None:
        return None
    tables: dict[str, TableEntry] = {table.name: table for table in export.base.manifest.tables}
    return export.contract.preview(tables, [entry.name for entry in _dense_of(export).inputs])


def _dense_of(export: ExportState) -> DenseEntry:
    assert export.base is not None
    dense = export.base.manifest.dense
    assert dense is not None
    return dense


def _misfit(base: Package, reason: str) -> PlanError:
    return PlanError(f"base {_path_of(base)} does not fit a new dense part over its tables: {reason}. {_ADVICE}")


def _path_of(base: Package) -> str:
    return base.directory.path if base.directory.is_local else base.directory.url

"""``plan``: what an export would do, computed as the export computes it; nothing is written."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import msgspec
import numpy as np

from dist_export.checkpoint.detect import describe_format
from dist_export.checkpoint.dynamicemb_widths import render_width
from dist_export.checkpoint.metadata import SlotMeta
from dist_export.checkpoint.model_weights import ModelWeights, is_below, plain_name
from dist_export.commit.row_fingerprints import plan_fingerprints
from dist_export.config.schema import ExportConfig
from dist_export.errors import ConfigError
from dist_export.formats.dtypes import DTYPES
from dist_export.formats.recis import ID_SLOT
from dist_export.formats.row_index import estimate_bytes
from dist_export.humanize import amount, count
from dist_export.ids.columns import ID_BYTES
from dist_export.manifest import MANIFEST, AccountEntry
from dist_export.pipeline.account import (
    DenseMeta,
    account_export,
    fates_by_plan,
    list_dense_left,
    note_dense_left,
)
from dist_export.pipeline.base_package import fit_base, open_base
from dist_export.pipeline.inputs import note_renamed
from dist_export.pipeline.planned_files import list_planned, may_copy_within, writes_fingerprints
from dist_export.pipeline.planning import PlannedSparse, describe_row_indexed_tables, plan_sparse
from dist_export.pipeline.preflight import Found, look_at_all
from dist_export.pipeline.refresh import compare_tables
from dist_export.pipeline.reused_program import TakenOver
from dist_export.pipeline.target import ExportPaths, refuse_foreign_files
from dist_export.pipeline.trainer_delta import is_trainer_delta
from dist_export.plan.casts import cast_of, note_unreadable
from dist_export.plan.dropped_rows import DUPLICATE, account_for
from dist_export.plan.multipart import FileParts, count_client_bytes, plan_parts
from dist_export.plan.plan import SparsePlan
from dist_export.plan.prune_report import note_rules
from dist_export.plan.selection import is_trainer_state
from dist_export.plan.work_units import assign, plan_units
from dist_export.reporting.account_text import say_account
from dist_export.reporting.summary import say_figures
from dist_export.runtime.joining import join
from dist_export.runtime.ranks import Ranks


def make_report(config: ExportConfig, *, world_size: int) -> dict[str, Any]:
    """Plan for ``world_size`` ranks in this one process and return the plan as plain values. UserError as an export."""
    with join(timeout_secs=config.timeout) as ranks, ranks.meeting_in_checks():
        return _report(ranks, config, world_size)


def _report(ranks: Ranks, config: ExportConfig, world_size: int) -> dict[str, Any]:
    _refuse_unread(config.format, is_live=config.is_live)
    found = look_at_all(ranks, config, world_size)
    config, paths, source, checkpoint = found.config, found.paths, found.source, found.checkpoint
    report: dict[str, Any] = {
        "export_dir": paths.final.url,
        "source": source.url,
        "base": None,
        "format": None if checkpoint is None else checkpoint.format,
        "files": [],
        "tables": [],
        "left_out_tables": [],
        "ranks": [],
        "dense_tensors": {"kept": [], "dropped": [], "in_no_file": []},
        "dense": None if config.model is None else f"{config.dense_model_name} of {config.model}",
        "notes": [
            *found.located.notes,
            *found.notes,
            *(checkpoint.warnings if checkpoint is not None else ()),
            *found.features.notes,
            *note_renamed(found.fg_conf, checkpoint),
        ],
    }
    if not config.is_refresh and (not config.need_export_sparse or checkpoint is None):
        return report
    with contextlib.ExitStack() as held:
        base = open_base(ranks, config, found.located.base.digest, paths.final, held=held)
        if base is not None:
            report["base"] = base.directory.url
        if checkpoint is None or not config.need_export_sparse:
            report["notes"] += [] if base is None else [compare_tables(ranks, base, checkpoint)]
            return report
        fitting, base, notes = fit_base(ranks, checkpoint, config, base, world_size=world_size)
        planned = plan_sparse(ranks, fitting, config, world_size=world_size, base=base)
    plan = planned.plan
    report["base"] = None if base is None else base.directory.url
    report["notes"] += notes
    report["notes"] += _look_at_target(ranks, found, planned)
    report["files"] = [{"name": file.name, "bytes": file.num_bytes} for file in plan.files]
    report["tables"] = _tables(planned)
    report["left_out_tables"] = [
        {"name": table.name, "rows": table.rows, "reason": table.reason} for table in plan.checkpoint.left_out
    ]
    report["dense_tensors"] = _dense_tensors(found, plan)
    report["notes"] += note_dense_left(report["dense_tensors"]["in_no_file"], checkpoint)
    report["row_fingerprints"] = _count_fingerprint_bytes(found, plan)
    report |= _work(found, planned, world_size, report["row_fingerprints"])
    report["account"] = _account(
        planned,
        found.dense_state,
        None if config.dataset is None else found.weights,
        config.allow_unexpected_dense,
        is_filtered=bool(config.filter_sparse_opt),
    )
    report["copied_ranges"] = len(plan.copies)
    report["gathered_rows"] = int(plan.gathers.counts.sum())
    return report


def _refuse_unread(format_name: str, *, is_live: bool) -> None:
    """Refuse sources of which metadata tell too little."""
    if is_live:
        raise ConfigError(
            "format is live: the tables are only in the memory of the training job, so plan cannot read them. The export "
            "itself checks the settings before it writes anything"
        )
    if is_trainer_delta(format_name):
        raise ConfigError(
            "format is tzrec_delta: its rows must be read to know which ones count, so there is no plan without an export. The "
            "export itself checks the settings before it writes anything"
        )


def _look_at_target(ranks: Ranks, found: Found, planned: PlannedSparse) -> list[str]:
    """Return notes on the plan, and on what export_dir holds. All ranks; raises as the export does."""
    config, paths, plan = found.config, found.paths, planned.plan
    names = list_planned(plan, paths.target, config)
    ranks.broadcast("look for foreign files", lambda: refuse_foreign_files(paths, names))
    has_own = config.model is not None or found.fg_conf is not None
    notes = ranks.broadcast(
        "look for a program to take over",
        lambda: TakenOver().look(found.source, plan, has_own=has_own, with_scores=config.score_program != "off"),
    )
    notes += describe_row_indexed_tables(plan)
    notes += note_unreadable(plan.checkpoint, plan.selection)
    notes += note_rules(plan.checkpoint, plan.pruning, planned.census.pruned)
    if not paths.is_replacing and paths.final.exists(MANIFEST):
        notes.append(
            "export_dir holds a package of these settings; an export says so and writes nothing if it is of this very source"
        )
    if paths.is_replacing:
        notes.append("export_dir holds a package, which is replaced when the new one is whole")
    if paths.in_place:
        notes.append("export_dir is ckpt_dir: its files stay as they are, the package is completed around them")
    return notes


def _dense_tensors(found: Found, plan: SparsePlan) -> dict[str, list[str]]:
    """Return the names of dense tensors that are kept, dropped, and in no file of the package."""
    config = found.config
    trainer_state = [name for name, *_ in found.dense_state if config.filter_sparse_opt and is_trainer_state(name)]
    left: list[str] = []
    if not found.paths.in_place and (config.model is None or config.dataset is None):
        left = [name for name in list_dense_left(found.dense_state, plan) if name not in trainer_state]
    return {
        "kept": [tensor.name for tensor in plan.selection.kept_dense],
        "dropped": [*(tensor.name for tensor, _ in plan.selection.dropped_dense), *trainer_state],
        "in_no_file": left,
    }


def _count_fingerprint_bytes(found: Found, plan: SparsePlan) -> int:
    """Return the bytes of all files of row fingerprints; 0 if none are written."""
    if not writes_fingerprints(found.config, plan, found.paths.target):
        return 0
    return sum(file.num_bytes for file in plan_fingerprints(plan, range(len(plan.files))).values())


def _work(found: Found, planned: PlannedSparse, world_size: int, fingerprint_bytes: int) -> dict[str, Any]:
    """Return what each rank would move, and what a store would see of it."""
    paths, plan = found.paths, planned.plan
    work: dict[str, Any] = {}
    parts: dict[int, FileParts] = {}
    if paths.target.s3 is not None and not paths.in_place:
        parts = plan_parts(
            plan,
            part_bytes=planned.budget.part_bytes,
            may_copy=may_copy_within(paths, server_side_copy=found.config.server_side_copy),
        )
    if found.source.s3 is not None or paths.target.s3 is not None:
        work["store"] = _store(planned, paths, parts, row_index=found.config.row_index)
        if paths.target.s3 is not None and fingerprint_bytes:
            work["store"] |= {"row_fingerprints": fingerprint_bytes, "read_back": _count_row_bytes(plan)}
    writing, _ = plan_units(
        plan, by_parts={number: its for number, its in parts.items() if its.has_remote}, tuning=planned.budget.tuning
    )
    threads = planned.budget.threads
    queues = assign(writing, world_size * threads)
    by_rank = [list(itertools.chain(*queues[rank * threads : (rank + 1) * threads])) for rank in range(world_size)]
    work["threads"] = threads
    work["ranks"] = [
        {"rank": rank, "units": len(mine), "bytes": sum(writing[unit].num_bytes for unit in mine)}
        for rank, mine in enumerate(by_rank)
    ]
    return work


def render_report(report: dict[str, Any]) -> list[str]:
    """Return the plan line by line, for people."""
    total = sum(file["bytes"] for file in report["files"])
    lines = [
        f"would export {report['source']} to {report['export_dir']}: {count(len(report['files']), 'shard')}, {amount(total)}"
    ]
    if report["format"]:
        lines.append(f"  source: {report['format']} checkpoint{describe_format(report['format'])}")
    if report["base"]:
        lines.append(f"  delta against {report['base']}")
    lines += [f"  {file['name']}  {amount(file['bytes']):>10}" for file in report["files"]]
    for table in report["tables"]:
        repaired = f", {table['misplaced']:,} of them in another shard's slice" if table["misplaced"] else ""
        dropped = "".join(f", {rows:,} dropped ({reason})" for reason, rows in table["rows_dropped"].items())
        by = "" if table["is_hashed"] else " by number"
        was = f" ({table['source_name']} in the source)" if table["source_name"] != table["name"] else ""
        lines.append(f"  table {table['name']}{was}: {table['rows']:,} rows{by}{repaired}{dropped}")
        lines += render_width(table)
        if table["default_row"] is not None:
            lines.append(f"    for ids that it lacks: {_say_row(table['default_row'])}")
        for slot in table["slots"]:
            fate = "keep" if not slot["reason"] else f"drop ({slot['reason']})"
            if "written" in slot:
                less = slot["bytes"] - slot["written_bytes"]
                change = f"saves {amount(less)}" if less >= 0 else f"takes {amount(-less)} more"
                fate += f", {slot['dtype']} -> {slot['written']}, {amount(slot['written_bytes'])} ({change})"
            lines.append(f"    {slot['name']:<28} {slot['dtype']:<9} {amount(slot['bytes']):>10}  {fate}")
    lines += [
        f"  table {table['name']}: left out, {table['rows']:,} rows ({table['reason']})"
        for table in report["left_out_tables"]
    ]
    for what, names in report["dense_tensors"].items():
        if names:
            lines.append(f"  dense tensors {what.replace('_', ' ')}: {', '.join(names)}")
    if report.get("account"):
        lines.append(f"  account: {say_account(msgspec.convert(report['account'], AccountEntry))}")
    if "copied_ranges" in report:
        lines.append(f"  {report['copied_ranges']:,} byte ranges copied, {report['gathered_rows']:,} rows gathered")
    if report.get("row_fingerprints"):
        lines.append(f"  row fingerprints: {amount(report['row_fingerprints'])} beside the shards")
    threads = f" on {report['threads']} threads" if report.get("threads", 1) > 1 else ""
    if "store" in report:
        lines.append(f"  {_say_store(report['store'], sum(file['bytes'] for file in report['files']))}")
    lines += [
        f"  rank {share['rank']}: {count(share['units'], 'unit')}, {amount(share['bytes'])}{threads}"
        for share in report["ranks"]
    ]
    if report["dense"]:
        lines.append(f"  dense arch: {report['dense']}, traced by rank 0 (a plan does not trace it)")
    return lines + [f"  note: {note}" for note in report["notes"]]


def _account(
    planned: PlannedSparse,
    dense_state: DenseMeta,
    weights: ModelWeights | None,
    allow_unexpected_dense: Sequence[str],
    *,
    is_filtered: bool,
) -> dict[str, Any] | None:
    """Return the account of what an export would do with the source's payload; None where the source does not tell it.

    ``weights``: of a model whose dense arch is exported.
    """
    taken = None
    if weights is not None:
        below = [name for name, *_ in dense_state if is_below(plain_name(name), weights.dense_name)]
        keys = {name: plain_name(name).removeprefix(f"{weights.dense_name}.") for name in below}
        # those that the dense arch has all the same are known when it is loaded
        taken = [name for name in below if not any(fnmatchcase(keys[name], p) for p in allow_unexpected_dense)]
    account = account_export(
        planned.plan.checkpoint,
        planned,
        fates_by_plan(planned),
        dense_state=dense_state,
        taken=taken,
        is_filtered=is_filtered,
    )
    return None if account is msgspec.UNSET else msgspec.json.decode(msgspec.json.encode(account))


def _say_row(row: tuple[float, ...] | str) -> str:
    if isinstance(row, str):
        return row
    told = ", ".join(f"{value:g}" for value in row[:8])
    return f"[{told}, ...]" if len(row) > 8 else f"[{told}]"


def _store(
    planned: PlannedSparse, paths: ExportPaths, parts: dict[int, FileParts], *, row_index: bool
) -> dict[str, int]:
    """Return the bytes that go through the export, in each direction, and those that the store copies itself."""
    plan = planned.plan
    read, sent = count_client_bytes(plan, parts)
    checkpoint = plan.checkpoint
    ids = sum(
        int(checkpoint.parts.rows[checkpoint.parts.of_table(number)].sum()) * ID_BYTES
        for number, table in enumerate(checkpoint.tables)
        if table.has_ids
    )
    is_s3 = [paths.source is not None and paths.source.s3 is not None, paths.target.s3 is not None]
    id_rows = plan.blocks.rows[plan.blocks.column == 0].tolist() if row_index else []
    return {
        "downloaded": read if is_s3[0] else 0,
        "uploaded": sent if is_s3[1] else 0,
        "row_indexes": sum(map(estimate_bytes, id_rows)) if is_s3[1] else 0,
        "copied": plan.num_bytes - sent if is_s3[1] else 0,
        "ids": ids * sum(is_s3),
    }


def _count_row_bytes(plan: SparsePlan) -> int:
    """Return the bytes of all rows as they are written, without ids: what row fingerprints are computed from."""
    blocks = plan.blocks
    return sum(
        int(blocks.rows[plan.blocks_of(number, slot.column)].sum()) * slot.row_bytes
        for number in range(len(plan.checkpoint.tables))
        for slot in plan.slots_of(number)
        if slot.name != ID_SLOT
    )


def _say_store(store: dict[str, int], num_bytes: int) -> str:
    def share(name: str) -> str:
        return f"{amount(store[name])} ({store[name] / max(num_bytes, 1):.1%})" if store[name] else ""

    is_within = bool(store["downloaded"] and store["uploaded"])
    figures = say_figures(share("downloaded"), share("uploaded"), share("copied"), is_within=is_within)
    indexes = f"{amount(store['row_indexes'])} of row indexes are uploaded, " if store["row_indexes"] else ""
    if store.get("row_fingerprints"):
        indexes += f"{amount(store['row_fingerprints'])} of row fingerprints are uploaded, "
        indexes += f"{amount(store['read_back'])} of rows are read for these, "
    return (
        f"store: of the shards' {amount(num_bytes)}: {figures}; besides, {indexes}{amount(store['ids'])} of ids are read for the "
        "census and the check, and headers, indexes and receipts, which only the summary counts"
    )


def _tables(planned: PlannedSparse) -> list[dict[str, Any]]:
    plan = planned.plan
    tables = []
    for number, table in enumerate(plan.checkpoint.tables):
        parts = plan.checkpoint.parts.of_table(number)
        rows = int(plan.checkpoint.parts.rows[parts].sum())
        dropped = account_for(plan.checkpoint, plan.dropped, number, pruned=planned.census.pruned, pruning=plan.pruning)
        misplaced = int(planned.census.misplaced[parts].sum())
        kept = plan.slots_of(number)
        blocks = plan.blocks_of(number, kept[0].column)
        slots = [(slot, "") for slot in kept] + list(plan.selection.dropped[number])
        tables.append(
            {
                "name": table.name,
                "is_hashed": table.is_hashed,
                "source_name": table.name_in_source,
                "default_row": table.default_row,
                "width_confirmed_by": table.width_confirmed_by,
                "rows": rows,
                "rows_out": rows - dropped.rows,
                "rows_dropped": dropped.rows_by_reason,
                "misplaced": misplaced,
                "repaired": misplaced - dropped.misplaced,
                "duplicates": dropped.rows_by_reason.get(DUPLICATE, 0),
                "rows_by_part": np.asarray(plan.blocks.rows[blocks]).tolist(),
                "slots": [
                    {
                        "name": slot.name,
                        "dtype": DTYPES[table.slots[slot.column].dtype].torch,
                        "bytes": table.slots[slot.column].num_bytes(rows),
                        "reason": reason,
                        **_describe_cast(table.slots[slot.column], slot, rows - dropped.rows),
                    }
                    for slot, reason in sorted(slots, key=lambda item: item[0].column)
                ],
            }
        )
    return tables


def _describe_cast(stored: SlotMeta, slot: SlotMeta, rows: int) -> dict[str, Any]:
    """Return what a slot is written as, where that is not how it is stored."""
    cast = cast_of(stored, slot)
    if cast is None:
        return {}
    return {"written": cast.name, "written_bytes": rows * slot.row_bytes}

"""``plan``: what an export would do, computed as the export computes it; nothing is written."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from dist_export.collective import Ranks, join
from dist_export.config import ExportConfig
from dist_export.exporter import open_source, read_confs
from dist_export.id_columns import ID_BYTES
from dist_export.layout.dtypes import DTYPES
from dist_export.objects import Objects, build_objects
from dist_export.places import Places, may_copy_within, open_places, place_of
from dist_export.plan.dropped import DUPLICATE, account_for
from dist_export.plan.parts import FileParts, count_client_bytes, plan_parts
from dist_export.plan.units import assign, plan_units
from dist_export.progress import amount, count
from dist_export.source import PlannedSparse, plan_sparse


def make_report(config: ExportConfig, *, world_size: int) -> dict[str, Any]:
    """Plan for ``world_size`` ranks in this one process and return the plan as plain values. UserError as an export."""
    with join(timeout_secs=config.timeout) as ranks:
        return _report(ranks, config, world_size)


def _report(ranks: Ranks, config: ExportConfig, world_size: int) -> dict[str, Any]:
    places = open_places(ranks, config, place_of(config))
    fg_only = config.with_changes(model=None, need_export_sparse=True) if config.fg else None
    objects = build_objects(fg_only) if fg_only is not None else Objects()
    checkpoint = open_source(ranks, config, places.source)
    _, _, features = read_confs(config, objects, checkpoint)
    report: dict[str, Any] = {
        "export_dir": places.final.url,
        "source": places.source.url,
        "format": None if checkpoint is None else checkpoint.format,
        "files": [],
        "tables": [],
        "ranks": [],
        "dense_tensors": {"kept": [], "dropped": []},
        "dense": None if config.model is None else f"{config.dense_model_name} of {config.model}",
        "notes": [*(checkpoint.warnings if checkpoint is not None else ()), *features.notes],
    }
    if not config.need_export_sparse or checkpoint is None:
        return report
    planned = plan_sparse(ranks, checkpoint, config, world_size=world_size)
    plan = planned.plan
    if places.is_replacing:
        report["notes"].append("export_dir holds a package, which is replaced when the new one is whole")
    if places.in_place:
        report["notes"].append(
            "export_dir is ckpt_dir: its files stay as they are, the package is completed around them"
        )
    report["files"] = [{"name": file.name, "bytes": file.num_bytes} for file in plan.files]
    report["tables"] = _tables(planned)
    report["dense_tensors"] = {
        "kept": [tensor.name for tensor in plan.selection.kept_dense],
        "dropped": [tensor.name for tensor, _ in plan.selection.dropped_dense],
    }
    parts = {}
    may_copy = may_copy_within(places, config)
    if places.target.s3 is not None and not places.in_place:
        parts = plan_parts(plan, part_bytes=planned.limits.part_bytes, may_copy=may_copy)
    if places.source.s3 is not None or places.target.s3 is not None:
        report["store"] = _store(planned, places, parts)
    writing, _ = plan_units(plan, by_parts={number: its for number, its in parts.items() if its.has_remote})
    threads = planned.limits.threads
    queues = assign(writing, world_size * threads)
    by_rank = [list(itertools.chain(*queues[rank * threads : (rank + 1) * threads])) for rank in range(world_size)]
    report["threads"] = threads
    report["ranks"] = [
        {"rank": rank, "units": len(mine), "bytes": sum(writing[unit].num_bytes for unit in mine)}
        for rank, mine in enumerate(by_rank)
    ]
    report["copied_ranges"] = len(plan.copies)
    report["gathered_rows"] = sum(gather.num_kept for gather in plan.gathers)
    return report


def render_report(report: dict[str, Any]) -> list[str]:
    """Return the plan line by line, for people."""
    total = sum(file["bytes"] for file in report["files"])
    lines = [
        f"would export {report['source']} to {report['export_dir']}: {count(len(report['files']), 'shard')}, {amount(total)}"
    ]
    if report["format"]:
        lines.append(f"  source: {report['format']} checkpoint")
    lines += [f"  {file['name']}  {amount(file['bytes']):>10}" for file in report["files"]]
    for table in report["tables"]:
        repaired = f", {table['misplaced']:,} of them in another shard's slice" if table["misplaced"] else ""
        dropped = "".join(f", {rows:,} dropped ({reason})" for reason, rows in table["rows_dropped"].items())
        lines.append(f"  table {table['name']}: {table['rows']:,} rows{repaired}{dropped}")
        for slot in table["slots"]:
            fate = "keep" if not slot["reason"] else f"drop ({slot['reason']})"
            lines.append(f"    {slot['name']:<28} {slot['dtype']:<9} {amount(slot['bytes']):>10}  {fate}")
    for what, names in report["dense_tensors"].items():
        if names:
            lines.append(f"  dense tensors {what}: {', '.join(names)}")
    if "copied_ranges" in report:
        lines.append(f"  {report['copied_ranges']:,} byte ranges copied, {report['gathered_rows']:,} rows gathered")
    threads = f" on {report['threads']} threads" if report.get("threads", 1) > 1 else ""
    if "store" in report:
        lines.append(f"  {_say_store(report['store'], sum(file['bytes'] for file in report['files']))}")
    lines += [
        f"  rank {share['rank']}: {count(share['units'], 'unit')}, {amount(share['bytes'])}{threads}"
        for share in report["ranks"]
    ]
    if report["dense"]:
        lines.append(f"  dense arch: {report['dense']}, traced by rank 0 (a plan does not look at it)")
    return lines + [f"  note: {note}" for note in report["notes"]]


def _store(planned: PlannedSparse, places: Places, parts: dict[int, FileParts]) -> dict[str, int]:
    """Return the bytes that go through the export, in each direction, and those that the store copies itself."""
    plan = planned.plan
    read, sent = count_client_bytes(plan, parts)
    checkpoint = plan.checkpoint
    ids = sum(
        int(checkpoint.parts.rows[checkpoint.parts.of_table(number)].sum()) * ID_BYTES
        for number, table in enumerate(checkpoint.tables)
        if table.has_ids
    )
    is_s3 = [places.source.s3 is not None, places.target.s3 is not None]
    return {
        "downloaded": read if is_s3[0] else 0,
        "uploaded": sent if is_s3[1] else 0,
        "copied": plan.num_bytes - sent if is_s3[1] else 0,
        "ids": ids * sum(is_s3),
    }


def _say_store(store: dict[str, int], num_bytes: int) -> str:
    def share(name: str) -> str:
        return f"{amount(store[name])} ({store[name] / max(num_bytes, 1):.1%} of the shards)"

    ids = f"{amount(store['ids'])} of ids are read for the census and the check"
    within = f"{amount(store['copied'])} copied within it" if store["copied"] else "all through the export"
    return f"store: {share('downloaded')} downloaded, {share('uploaded')} uploaded, {within}; {ids}"


def _tables(planned: PlannedSparse) -> list[dict[str, Any]]:
    plan = planned.plan
    tables = []
    for number, table in enumerate(plan.checkpoint.tables):
        parts = plan.checkpoint.parts.of_table(number)
        rows = int(plan.checkpoint.parts.rows[parts].sum())
        dropped = account_for(plan.checkpoint, plan.dropped, number)
        misplaced = int(planned.census.misplaced[parts].sum())
        kept = plan.slots_of(number)
        blocks = plan.blocks_of(number, kept[0].column)
        slots = [(slot, "") for slot in kept] + list(plan.selection.dropped[number])
        tables.append(
            {
                "name": table.name,
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
                        "dtype": DTYPES[slot.dtype].torch,
                        "bytes": rows * slot.row_bytes,
                        "reason": reason,
                    }
                    for slot, reason in sorted(slots, key=lambda item: item[0].column)
                ],
            }
        )
    return tables

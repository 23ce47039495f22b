"""Make the facts of the page from a manifest and from what was read beside it. Pure: the result is JSON.

The page has sections of few shapes: pairs of a label and a text, columns with rows, and bars, which ``page.js`` draws. Tables
have facts of their own, because the reader of the page searches and sorts them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from dist_export.diff.entries import PackageDiff
from dist_export.diff.text import render_diff
from dist_export.humanize import amount, count
from dist_export.manifest import FeatureEntry, Manifest, SlotEntry, TableEntry
from dist_export.report.entries import Found, FoundVersions, embedding_of
from dist_export.report.norms import NormEntry
from dist_export.report.scores import describe_scores
from dist_export.report.timeline import describe_timeline

_MODES = {
    "filter": "filter: only what serving needs",
    "copy": "copy: all slots of the checkpoint",
    "in_place": "in place: the checkpoint's own files are the shards",
    "dense_only": "dense only: no tables",
}
_MOST_SHARDS = 1000
"""Shards that the page has bars for: the largest ones."""


def describe_report(manifest: Manifest, where: str, found: Found, *, sample_rows: int, made_by: str) -> dict[str, Any]:
    """Return the facts of the page.

    Args:
        manifest: of the package.
        where: the package, as the user gave it.
        found: what was read beside the manifest.
        sample_rows: how many rows of each table were read at most; 0 is all.
        made_by: which software makes the page, and when.
    """
    timeline = describe_timeline(
        manifest.run,
        found.events.lines,
        digest=manifest.digest,
        where=found.events.where,
        why_not=found.events.why_not,
    )
    return {
        "title": where,
        "made_by": made_by,
        "overview": list(_describe_package(manifest, where)),
        "notes": list(manifest.notes),
        "account": _describe_account(manifest),
        "sampled": _describe_sample(sample_rows),
        "tables": [_describe_table(table, found.norms[table.name]) for table in manifest.tables],
        "left_out": [[table.name, table.rows, table.reason] for table in manifest.left_out_tables or ()],
        "shards": _describe_shards(manifest),
        "timeline": {"text": timeline.text, "bars": [bar._asdict() for bar in timeline.bars]},
        "tensors": list(_describe_tensors(manifest)),
        "features": [_describe_feature(feature) for feature in _features_of(manifest)],
        "scores": describe_scores(manifest),
        "versions": _describe_versions(found.versions),
        "against": None if found.against is None else _describe_diff(found.against),
    }


def _describe_package(manifest: Manifest, where: str) -> Iterable[tuple[str, str]]:
    """Yield what the package is: label and text."""
    source, run = manifest.source, manifest.run
    rows = sum(table.rows_out for table in manifest.tables)
    kept, dropped = (
        sum(slot.num_bytes for table in manifest.tables for slot in slots(table)) for slots in (_kept, _dropped)
    )
    yield "Package", where
    if manifest.base is not msgspec.UNSET:
        yield (
            "Delta package of",
            f"{manifest.base.path} ({manifest.base.digest}). Rows here are the delta's own, without the base's",
        )
    yield "Mode", _MODES.get(manifest.mode, manifest.mode)
    yield (
        "Source",
        f"{source.path_for_people} ({source.format}), {count(source.num_files, 'file')}, {amount(source.num_bytes)}",
    )
    yield "Training step", "not known" if source.dense_step is None else f"{source.dense_step:,}"
    if source.other_rows:
        yield "Step of the rows", f"{source.other_rows}, not that of the dense part"
    if source.uri is not msgspec.UNSET:
        yield "Source in its registry", source.uri
    yield "Fingerprint of the source", source.fingerprint or "none"
    if isinstance(run.get("started"), str):
        yield "Export began", run["started"]
    if isinstance(run.get("world_size"), int):
        yield "Ranks", f"{run['world_size']:,}"
    yield (
        "Contents",
        (
            f"{count(len(manifest.tables), 'table')}, {count(rows, 'row')}, {count(manifest.num_shards, 'shard')}, "
            f"{count(len(manifest.files), 'file')}, {amount(manifest.num_bytes)}"
        ),
    )
    names = [sorted({slot.name for table in manifest.tables for slot in slots(table)}) for slots in (_kept, _dropped)]
    yield "Kept slots", f"{amount(kept)}: {', '.join(names[0])}" if names[0] else "none"
    yield "Dropped slots", f"{amount(dropped)}: {', '.join(names[1])}" if names[1] else "none"
    for rule in manifest.prune or ():
        values = {
            name: value for name, value in msgspec.to_builtins(rule).items() if name not in ("tables", "reason", "rows")
        }
        told = ", ".join(f"{name} {value}" for name, value in values.items())
        yield "Prune", f"{', '.join(rule.tables)}: {told or rule.reason} pruned {count(rule.rows, 'row')}"
    yield "Dense arch", _name_dense(manifest)
    yield "Score program", "no" if manifest.score is msgspec.UNSET else manifest.score.program
    yield "Serving contract", _name_contract(manifest)
    yield "Written by", ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    yield "Digest", manifest.digest


def _kept(table: TableEntry) -> tuple[SlotEntry, ...]:
    return table.kept


def _dropped(table: TableEntry) -> tuple[SlotEntry, ...]:
    return table.dropped


def _name_dense(manifest: Manifest) -> str:
    if manifest.dense is None:
        return "no"
    formats = manifest.dense.formats or ()
    return ", ".join([manifest.dense.program, *(entry.file for entry in formats)])


def _name_contract(manifest: Manifest) -> str:
    if manifest.serving is msgspec.UNSET:
        return "no"
    unknown = [entry.name for entry in manifest.serving.inputs if entry.unknown is not msgspec.UNSET]
    told = f"; not known of {', '.join(unknown)}" if unknown else ""
    return f"{count(len(manifest.serving.features), 'feature')}{told}"


def _describe_account(manifest: Manifest) -> dict[str, Any] | None:
    """Return the bytes of the source by their fate; None if the source does not list them."""
    account = manifest.account
    if account is msgspec.UNSET:
        return None
    parts = [["exported", "", account.exported], ["in the program", "", account.in_program]]
    parts += [["dropped", reason, size] for reason, size in account.dropped.items()]
    parts += [["left out", reason, size] for reason, size in account.left_out.items()]
    return {
        "text": f"{count(account.tensors, 'tensor')}, {amount(account.num_bytes)} in the checkpoint.",
        "parts": [part for part in parts if part[2]],
        "others": [
            [tensor.name, tensor.fate.replace("_", " "), tensor.reason, tensor.num_bytes] for tensor in account.others
        ],
    }


def _describe_sample(sample_rows: int) -> str:
    if not sample_rows:
        return "All rows were read."
    return (
        f"At most {sample_rows:,} rows of each table were read, spread evenly over its shards. Counts of dead, NaN and Inf rows "
        "are of the rows that were read. --sample_rows 0 reads all."
    )


def _describe_table(table: TableEntry, norms: NormEntry | str) -> dict[str, Any]:
    slot = embedding_of(table)
    is_text = isinstance(norms, str)
    return {
        "name": table.name,
        "kind": "row-indexed" if table.is_row_indexed else "hash",
        "rows_in": table.rows_in,
        "rows_out": table.rows_out,
        "rows_dropped": table.rows_dropped,
        "kept": sum(slot.num_bytes for slot in table.kept),
        "dropped": sum(slot.num_bytes for slot in table.dropped),
        "dropped_slots": [f"{slot.name} ({slot.reason})" if slot.reason else slot.name for slot in table.dropped],
        "row": "" if slot is None else _name_row(slot),
        "casts": []
        if slot is None
        else [f"from {cast.source_dtype}, largest error {cast.max_abs_error:.3g}" for cast in slot.casts],
        "unread": norms if is_text else "",
        "norms": None if is_text else msgspec.to_builtins(norms),
    }


def _name_row(slot: SlotEntry) -> str:
    """Return the dtype and the width of a row."""
    if slot.encoding is not msgspec.UNSET:
        return f"{slot.encoding} {slot.dim}"
    return f"{slot.dtype} {'x'.join(map(str, slot.shape)) or '1'}"


def _describe_shards(manifest: Manifest) -> dict[str, Any]:
    """Return bytes and rows by shard, the largest first, and how even they are."""
    rows: dict[str, int] = {}
    for table in manifest.tables:
        for part in table.parts:
            rows[part.file] = rows.get(part.file, 0) + part.rows
    shards = [(file.path, file.num_bytes, rows[file.path]) for file in manifest.files if file.path in rows]
    shards.sort(key=lambda shard: (-shard[1], shard[0]))
    if not shards:
        return {"text": "The package has no shards.", "bars": []}
    largest, mean = shards[0][1], sum(num_bytes for _, num_bytes, _ in shards) / len(shards)
    above = f", {100 * (largest / mean - 1):.1f} % above the mean" if mean else ""
    text = f"{count(len(shards), 'shard')}; the mean is {amount(round(mean))}, the largest {amount(largest)}{above}."
    if len(shards) > _MOST_SHARDS:
        text += f" The page has the {_MOST_SHARDS:,} largest."
    return {"text": text, "bars": shards[:_MOST_SHARDS]}


def _describe_tensors(manifest: Manifest) -> Iterable[list[str]]:
    """Yield inputs and outputs of the programs: program, input or output, name, dtype, shape."""
    programs = {"dense": manifest.dense or None, "score": manifest.score or None}
    for program, entry in programs.items():
        if entry is None:
            continue
        for kind, tensors in (("input", entry.inputs), ("output", entry.outputs)):
            for tensor in tensors:
                yield [program, kind, tensor.name, tensor.dtype, f"({', '.join(map(str, tensor.shape))})"]
        for name in entry.dropped_inputs:
            yield [program, "not used", name, "", ""]


def _features_of(manifest: Manifest) -> tuple[FeatureEntry, ...]:
    return () if manifest.serving is msgspec.UNSET else manifest.serving.features


def _describe_feature(feature: FeatureEntry) -> list[str]:
    def say(value: Any) -> str:
        return "not known" if value is msgspec.UNSET else "none" if value is None else str(value)

    return [feature.name, feature.table, str(feature.dim), say(feature.pooling), say(feature.padding_id)]


def _describe_versions(found: FoundVersions | None) -> dict[str, Any] | None:
    if found is None:
        return None
    rows = [
        [
            version.name,
            f"{version.published_at[:19]}Z",
            "" if version.step is None else f"{version.step:,}",
            ", ".join(
                text
                for text, is_true in (
                    ("current", version.is_current),
                    (f"delta over {version.base}", version.base is not None),
                    ("this package", version.name == found.name),
                    ("removed", not version.is_there),
                )
                if is_true
            ),
        ]
        for version in found.versions
    ]
    text = f"They cannot be read: {found.why_not}" if found.why_not else "The last published first."
    return {"text": f"{found.where}. {text}", "rows": rows}


def _describe_diff(found: PackageDiff) -> dict[str, Any]:
    """Return what ``diff`` says. A is the other package, and B the one that the report is about."""
    return {
        "lines": render_diff(found),
        "is_equal": found.is_equal,
        "num_tables": len(found.tables),
        "tables": [
            {
                **msgspec.to_builtins(table),
                "slots": [*table.slots, *(["another default row"] if table.default_row else [])],
            }
            for table in found.tables
            if not table.is_equal
        ],
    }

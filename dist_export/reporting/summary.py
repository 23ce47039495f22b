"""The closing summary of an export as text, from its manifest alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import msgspec

from dist_export._version import VERSION
from dist_export.checkpoint.detect import describe_format
from dist_export.errors import printable
from dist_export.formats.dtypes import CODE_BY_TORCH, DTYPES
from dist_export.formats.row_encodings import INT8_ROWWISE, TAIL_BYTES
from dist_export.humanize import amount, count, few
from dist_export.manifest import CastEntry, DenseEntry, DriftEntry, Manifest, SlotEntry, TableEntry
from dist_export.reporting.account_text import say_account
from dist_export.reporting.score_text import say_contract, say_score
from dist_export.transfer.work_done import Share


def summarize(manifest: Manifest, shares: Sequence[Share], where: str) -> list[str]:
    """Return the closing summary of an export as lines. What a compacted package has from its delta stands apart."""
    head = [f"package: {where}", f"  files    {len(manifest.files)}, {amount(manifest.num_bytes)}"]
    source, found, notes = (
        _say_source(manifest),
        _say_found(manifest),
        [f"  note     {note}" for note in manifest.notes],
    )
    tables = [] if manifest.mode == "dense_only" else _say_tables(manifest, shares)
    ran = _say_run(manifest, shares)
    if isinstance(manifest.compacted, msgspec.UnsetType):
        return [*head, *source, *tables, *found, *ran, *notes]
    its = manifest.compacted
    between = () if isinstance(its.between, msgspec.UnsetType) else its.between
    below = [link.path for link in (its.delta, *between, its.base)]
    delta, carried = its.delta.path, manifest.run.get("carried_notes", len(notes))
    files = "files, " if "compare" in manifest.run.get("seconds", {}) else ""
    return [
        *head,
        f"  made of  {' and its base '.join(below)}",
        f"  checked  the {files}ids and numbers of rows of all of them with their manifests, and the written shards",
        *(*tables, *ran, *notes[carried:]),
        f"  carried over from {delta}, and not measured or compared again:",
        *(f"  {line}" for line in (*source, *found, *notes[:carried])),
    ]


def _say_source(manifest: Manifest) -> list[str]:
    if manifest.source.format == "live":
        return ["  source   the live model, in memory"]
    if manifest.source.format == "none":
        return []
    told_by = describe_format(manifest.source.format)
    return [f"  source   {manifest.source.format} checkpoint {manifest.source.path}{told_by}"]


def _say_tables(manifest: Manifest, shares: Sequence[Share]) -> list[str]:
    """Return lines about the tables that were written."""
    kept = sum(slot.num_bytes for table in manifest.tables for slot in table.kept)
    rows = sum(table.rows_out for table in manifest.tables)
    seconds = max((share.seconds for share in shares), default=0.0)
    moved = sum(share.num_bytes for share in shares)
    speed = f", {amount(round(moved / seconds))}/s" if seconds else ""
    where = f"{count(rows, 'row')} in {count(manifest.num_shards, 'shard')}"
    by_number = sum(table.is_hashed is False for table in manifest.tables)
    named = f" ({by_number} by row number)" if by_number else ""
    dropped = f", {_say_slots(manifest)}" if manifest.compacted is msgspec.UNSET else ""
    return [
        f"  tables   {len(manifest.tables)}{named}, {where} ({manifest.mode}{speed})",
        f"  rows     kept {amount(kept)}{dropped}",
    ]


def _say_slots(manifest: Manifest) -> str:
    dropped = sum(slot.num_bytes for table in manifest.tables for slot in table.dropped)
    names = sorted({slot.name for table in manifest.tables for slot in table.dropped})
    told = f" ({', '.join(names)})" if names else ""
    return f"dropped {amount(dropped)}{told}"


def _say_found(manifest: Manifest) -> list[str]:
    """Return lines about what became of the source, and about the dense arch and its scores."""
    lines = []
    if manifest.mode != "dense_only":
        lines += [f"  rows     {_say_slots(manifest)}"] if manifest.compacted is not msgspec.UNSET else _delta(manifest)
        lines += [*_views(manifest), *_casts(manifest)]
        lines += [f"  dropped  {count(rows, 'row')} ({reason})" for reason, rows in _rows_dropped(manifest).items()]
        if misplaced := sum(table.misplaced for table in manifest.tables):
            repaired = sum(table.repaired for table in manifest.tables)
            rest = "" if repaired == misplaced else f", {misplaced - repaired:,} more were dropped"
            lines.append(f"  repaired {repaired:,} rows lay in another shard's slice and were moved to their own{rest}")
    if manifest.account is not msgspec.UNSET:
        lines.append(f"  account  {say_account(manifest.account)}")
    if manifest.dropped_dense_tensors:
        names = ", ".join(tensor.name for tensor in manifest.dropped_dense_tensors)
        lines.append(f"  dropped  dense tensors {names}")
    if manifest.dense is not None:
        lines += _say_signature(manifest.dense)
    return [*lines, *_say_scores(manifest)]


def _say_run(manifest: Manifest, shares: Sequence[Share]) -> list[str]:
    """Return lines about the export itself."""
    lines, is_traced = [], manifest.dense is not None and manifest.compacted is msgspec.UNSET
    if store := manifest.run.get("store"):
        lines.append(f"  store    {_say_traffic(store, manifest.source.path)}")
    if left := manifest.run.get("left_alone"):
        place = "export_dir" if manifest.compacted is msgspec.UNSET else "OUT"
        lines.append(f"  left     {few(left)}: in {place}, but not of this package")
    if reused := manifest.run.get("reused_shards"):
        lines.append(f"  resumed  {count(reused, 'shard')} of an interrupted export kept, for they were whole")
    for share in shares:
        idle = " (it was tracing)" if share.num_units == 0 and share.rank == 0 and is_traced else ""
        helped = f" ({share.num_helped:,} of other ranks)" if share.num_helped else ""
        did = f"{count(share.num_units, 'unit')}{helped}{idle}, {amount(share.num_bytes)}"
        lines.append(f"  rank {share.rank}   {did} in {share.seconds:.2f} s")
    timed = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in manifest.run.get("seconds", {}).items())
    return [*lines, f"  times    {timed}"]


def _delta(manifest: Manifest) -> list[str]:
    """Return lines about the base of a delta."""
    if manifest.base is msgspec.UNSET:
        return []
    deltas = [table.delta for table in manifest.tables if table.delta is not msgspec.UNSET]
    changed, new, deleted = (sum(getattr(delta, name) for delta in deltas) for name in ("changed", "new", "deleted"))
    in_base = count(sum(delta.rows_base for delta in deltas), "row")
    if _is_dense_only(manifest):
        return [f"  delta    a new dense part over {in_base} of {manifest.base.path}"]
    return [
        f"  delta    {changed:,} changed, {new:,} new, {deleted:,} deleted against {in_base} of {manifest.base.path}"
    ]


def _is_dense_only(manifest: Manifest) -> bool:
    """Whether this is a delta with a new dense part over the tables of its base as they are."""
    return manifest.base is not msgspec.UNSET and manifest.base.dense_only is True


def _say_signature(dense: DenseEntry) -> list[str]:
    lines = [f"  inputs   {', '.join(tensor.name for tensor in dense.inputs)}"]
    if dense.dropped_inputs:
        lines.append(f"  unused   {', '.join(dense.dropped_inputs)} (no data path to an output; left out)")
    return [*lines, f"  outputs  {', '.join(tensor.name for tensor in dense.outputs)}"]


def _say_scores(manifest: Manifest) -> list[str]:
    """Return lines about the comparisons with the model."""
    lines = []
    if manifest.parity is not None:
        worst = max(manifest.parity.max_abs.values(), default=0.0)
        sizes = ", ".join(map(str, manifest.parity.batch_sizes))
        lines.append(f"  parity   largest difference {worst:.2g} at batch sizes {sizes}")
        if (files := manifest.parity.from_files) is not None:
            what = "rows and program as written"
            if _is_dense_only(manifest):
                what = "rows of the base and program as written"
            elif manifest.drift is not None and manifest.drift.not_measured is not msgspec.UNSET:
                what += ", and rows of the model's own (see the drift)"
            if not files.reads_rows:  # the model's own rows, or a model without tables
                what = "the program as written" + ("" if manifest.mode == "dense_only" else ", no row from the shards")
            figures = f"{max(files.max_abs.values(), default=0.0):.2g}, {max(files.max_ulp.values(), default=0):,} ULP"
            lines.append(f"  scores   of {count(files.rows, 'row')} with {what}: largest difference {figures}")
    if manifest.score is not msgspec.UNSET:
        lines.append(f"  program  {say_score(manifest.score)}")
    if manifest.serving is not msgspec.UNSET:
        lines.append(f"  contract {say_contract(manifest.serving)}")
    if manifest.dense is not None and manifest.dense.formats is not msgspec.UNSET:
        for entry in manifest.dense.formats:
            worst = max(entry.parity.max_abs.values(), default=0.0)
            lines.append(f"  {entry.format:<8} {entry.file}, largest difference {worst:.2g}")
    if manifest.drift is not None:
        lines.append(f"  drift    {_say_drift(manifest.drift, manifest.run.get('drift') or {})}")
    sample = manifest.run.get("sample") or {}
    if sample.get("asked"):
        asked, missing, pruned = (sum(sample.get(name, {}).values()) for name in ("asked", "missing", "left_behind"))
        apart = f", {pruned:,} left behind by prune" if pruned else ""
        where = "base" if _is_dense_only(manifest) else "checkpoint"
        world_size = manifest.run.get("world_size")
        of_all = f" by all {world_size} ranks together" if isinstance(world_size, int) and world_size > 1 else ""
        lines.append(f"  sample   {count(asked, 'id')} looked up{of_all}, {missing:,} not in the {where}{apart}")
    return lines


def summarize_same(manifest: Manifest, where: str) -> list[str]:
    """Return the summary for a target that already holds the same package: its content, and that nothing was written."""
    first, *rest = _summarize_read(manifest, where)
    when = manifest.run.get("started", "")
    lines = [
        first,
        f"  already exported{f' at {when}' if when else ''}, with these settings from this source: nothing was written",
    ]
    is_compacted = manifest.compacted is not msgspec.UNSET
    way = "--overwrite true or another OUT writes" if is_compacted else "overwrite: true or another export_dir exports"
    if manifest.dense is not None and not is_compacted:
        lines.append(f"  the model's code is not compared: if it has changed, {way} it anew")
    if (version := manifest.versions.get("dist_export")) != VERSION:
        lines.append(f"  dist_export {version} exported it, and this is {VERSION}: {way} it anew")
    return [printable(line) for line in lines + rest]


def summarize_again(manifest: Manifest) -> list[str]:
    """Return the closing summary from the manifest only. Each line is printable."""
    return [printable(line) for line in _summarize_read(manifest, None)]


def _summarize_read(manifest: Manifest, where: str | None) -> list[str]:
    """Return the summary of a manifest that was read. ``run`` may hold anything, because no digest covers it.

    If ``where`` is None, the directory and the shares of the ranks are taken from ``run``.
    """
    try:
        if where is not None:
            return summarize(manifest, [], where)
        shares = [Share(**share) for share in manifest.run.get("ranks", [])]
        return summarize(manifest, shares, manifest.run.get("export_dir", manifest.digest))
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
        lines = summarize(msgspec.structs.replace(manifest, run={}), [], where or manifest.digest)
        return [*lines, "  run      what it says of the export cannot be read"]


def _say_drift(drift: DriftEntry, counts: dict[str, int]) -> str:
    """Return as text the drift of the output that drifts most, and the rows on which it was measured."""
    if drift.not_measured is not msgspec.UNSET:
        return f"not measured: {drift.not_measured}"
    figures = "none"
    if drift.outputs:
        name, worst = max(drift.outputs.items(), key=lambda item: (item[1].not_finite, item[1].max_abs))
        pairs = sum(output.pairs for output in drift.outputs.values())
        swapped = sum(output.pairs_swapped for output in drift.outputs.values())
        figures = (
            f"from the unmodified model up to {worst.max_abs:.2g} ({printable(name)}), mean {worst.mean_abs:.2g}; "
            f"{swapped:,} of {count(pairs, 'pair')} of rows change their order"
        )
        figures += f"; {worst.not_finite:,} not finite on one side" if worst.not_finite else ""
    batches = "1 batch" if drift.batches == 1 else f"{drift.batches:,} batches"
    skipped = f", {drift.skipped:,} of another shape left out" if drift.skipped else ""
    apart = [f"{counts[key]:,} {what}" for key, what in _DRIFT_COUNTS.items() if counts.get(key)]
    ids = f"; of {count(counts['ids'], 'id')} {', '.join(apart)}" if apart else ""
    return f"{figures} ({count(drift.rows, 'row')} of {batches}{skipped}{ids})"


_DRIFT_COUNTS = {"without_row": "without a row in the checkpoint", "pruned": "pruned"}


def _views(manifest: Manifest) -> list[str]:
    """Return lines about tables that were left out or renamed."""
    lines = []
    left_out = manifest.left_out_tables or ()
    if left_out:
        rows = sum(table.rows for table in left_out)
        told = few([table.name for table in left_out])
        lines.append(f"  left out {count(len(left_out), 'table')}, {count(rows, 'row')}: {told}")
    renamed = [f"{table.source_name} -> {table.name}" for table in manifest.tables if table.source_name]
    return lines + ([f"  renamed  {few(renamed)}"] if renamed else [])


def _casts(manifest: Manifest) -> list[str]:
    """Return a line for each kind of cast: the number of tables, the saved bytes, and the largest error with its table."""
    kinds: dict[tuple[str, str], list[tuple[TableEntry, SlotEntry, CastEntry]]] = {}
    for table in manifest.tables:
        for slot in table.kept:
            if slot.cast is not msgspec.UNSET:
                written = slot.dtype if slot.encoding is msgspec.UNSET else slot.encoding
                kinds.setdefault((slot.cast.source_dtype, written), []).append((table, slot, slot.cast))
    lines = []
    for (source, written), its in sorted(kinds.items()):
        before = sum(_stored_bytes(slot, cast) for _, slot, cast in its)
        saved = before - sum(slot.num_bytes for _, slot, _ in its)
        worst = max(its, key=lambda item: item[2].max_abs_error)
        overflow = sum(cast.nans + cast.out_of_range for _, _, cast in its)
        clamped = f", {overflow:,} values clamped" if overflow else ""
        change = f"saves {amount(saved)}" if saved >= 0 else f"takes {amount(-saved)} more"
        lines.append(
            f"  cast     {count(len(its), 'table')} {source} -> {written}, {change}; largest error "
            f"{worst[2].max_abs_error:.3g} ({worst[0].name}){clamped}"
        )
    return lines


def _stored_bytes(slot: SlotEntry, cast: CastEntry) -> int:
    """Return the bytes that the values of a slot took in the source."""
    if cast.source_dtype != INT8_ROWWISE:
        return cast.values * DTYPES[CODE_BY_TORCH[cast.source_dtype]].itemsize
    return cast.values + cast.values // math.prod(slot.shape) * TAIL_BYTES


def _say_traffic(store: dict[str, int], source: str) -> str:
    """Return as text all traffic of all ranks with S3. Unlike the figures of the plan, it is not only that of shards."""
    figures = say_figures(
        *(amount(store[name]) if store[name] else "" for name in ("downloaded", "uploaded", "copied")),
        is_within=bool(store["uploaded"]) and source.startswith(("s3://", "s3a://")),
    )
    asked = f"{count(store['requests'], 'request')}, {store['retries']:,} tried again"
    return f"{figures}: all of it, ids, headers, indexes and receipts too; {asked}"


def say_figures(downloaded: str, uploaded: str, copied: str, *, is_within: bool) -> str:
    """Return the traffic between an export and a store as text. Empty figures are omitted.

    Args:
        downloaded: bytes read from the store, as text.
        uploaded: bytes sent to the store, as text.
        copied: bytes that the store copied itself, as text.
        is_within: whether source and target are both on a store, so that it could copy bytes itself.
    """
    figures = [f"{text} {name}" for text, name in ((downloaded, "downloaded"), (uploaded, "uploaded")) if text]
    if copied or is_within:
        figures.append(f"{copied or 'nothing'} copied within the store")
    return ", ".join(figures)


def _rows_dropped(manifest: Manifest) -> dict[str, int]:
    """Return the dropped rows of all tables by reason."""
    rows: Counter[str] = Counter()
    for table in manifest.tables:
        rows.update(table.rows_dropped)
    return dict(sorted(rows.items()))

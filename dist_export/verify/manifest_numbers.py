"""Compare mode, number of shards and account of a manifest with its own files, tables and tensors."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

import msgspec

from dist_export.formats.dtypes import CODE_BY_TORCH, DTYPES
from dist_export.formats.row_encodings import INT8_ROWWISE, TAIL_BYTES
from dist_export.manifest import MANIFEST, AccountEntry, Manifest, SlotEntry
from dist_export.verify.listing import SHARD
from dist_export.verify.report import Report

_COPIES = ("copy", "in_place")
_COPIED = ("recis", "package")
"""Formats whose files can be the shards of a package as they are."""


def check_numbers(manifest: Manifest, report: Report) -> None:
    """Add a finding for each number that others of the manifest contradict."""
    for text in _contradictions_of_mode(manifest):
        report.add(MANIFEST, "manifest", text)
    account = manifest.account
    if not isinstance(account, msgspec.UnsetType):
        for text in _contradictions_of_account(manifest, account):
            report.add(MANIFEST, "account", f"the account of the source's payload contradicts itself: {text}")


def _contradictions_of_mode(manifest: Manifest) -> Iterator[str]:
    mode, number = manifest.mode, manifest.num_shards
    shards = [found for found in map(SHARD.fullmatch, (file.path for file in manifest.files)) if found]
    if mode == "filter":
        if shards and all(
            int(found[1]) != number for found in shards
        ):  # one alone is another fault, which its headers show
            yield f"num_shards is {number:,}, and a shard is called {shards[0][0]}"
    elif mode == "dense_only":
        if number or shards:
            yield f"mode is 'dense_only', with num_shards {number:,} and {len(shards):,} shards"
    elif mode not in _COPIES:
        yield f"mode is {mode!r}, which no package has"
    else:
        most = max((len(table.parts) for table in manifest.tables), default=0)
        if number != most:
            yield f"num_shards is {number:,}, and a table of this copy has up to {most:,} parts"
        if manifest.source.format not in _COPIED:
            yield f"mode is {mode!r}, and files of the source's format {manifest.source.format!r} are never copied"
        changed = next((table.name for table in manifest.tables if table.dropped or table.rows_dropped), "")
        if changed:
            yield f"mode is {mode!r}, and rows or slots of table {changed!r} were dropped, which a copy has all"


def _contradictions_of_account(manifest: Manifest, account: AccountEntry) -> Iterator[str]:
    by_fate: Counter[tuple[str, str]] = Counter()
    for other in account.others:
        by_fate[other.fate, other.reason if other.fate in ("dropped", "left_out") else ""] += other.num_bytes
    if account.in_program != by_fate["in_program", ""]:
        yield f"{account.in_program:,} bytes are in_program, the tensors of that fate have {by_fate['in_program', '']:,}"
    for fate, sums in (("dropped", account.dropped), ("left_out", account.left_out)):
        for (its_fate, reason), num_bytes in by_fate.items():
            if its_fate == fate and sums.get(reason, 0) < num_bytes:
                yield f"{sums.get(reason, 0):,} bytes are {fate} by {reason}, tensors of that fate have {num_bytes:,}"
    # ids may be numbers of rows, which the source does not hold, and tables may be one tensor of the source
    dense = sum(math.prod(tensor.shape) * _itemsize(tensor.dtype) for tensor in manifest.dense_tensors)
    most = dense + by_fate["exported", ""]
    most += sum(table.rows_out * _source_bytes(slot) for table in manifest.tables for slot in table.kept)
    if account.exported > most:
        yield f"{account.exported:,} bytes are exported, the tables and tensors of the package have at most {most:,}"
    slots = sum(len(table.kept) + len(table.dropped) for table in manifest.tables)
    most = slots + len(account.others) + len(manifest.dense_tensors) + len(manifest.dropped_dense_tensors)
    has_others = not isinstance(manifest.left_out_tables, msgspec.UnsetType)
    if account.tensors < len(account.others) or (account.tensors > most and not has_others):
        yield f"it has {account.tensors:,} tensors, between {len(account.others):,} and {most:,} are named"


def _source_bytes(slot: SlotEntry) -> int:
    """Return the bytes of a row of a slot that count as exported: those of the narrower of source and package."""
    after = math.prod(slot.shape) * _itemsize(slot.dtype)
    if isinstance(slot.cast, msgspec.UnsetType):
        return after
    values = math.prod(slot.shape) if isinstance(slot.dim, msgspec.UnsetType) else slot.dim
    source = slot.cast.source_dtype
    before = values + TAIL_BYTES if source == INT8_ROWWISE else values * _itemsize(source)
    return min(before, after)


def _itemsize(name: str) -> int:
    return DTYPES[CODE_BY_TORCH[name]].itemsize if name in CODE_BY_TORCH else 0

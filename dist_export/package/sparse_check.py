"""Check the sparse part of a package: indexes, headers, merged manifest, the manifest's tables, and every id."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import msgspec
import numpy as np

from dist_export.layout.dtypes import CODE_BY_TORCH, DTYPES
from dist_export.layout.indexes import Indexes, split_internal
from dist_export.layout.recis import (
    DENSE_SUFFIX,
    EMBEDDING_SLOT,
    ID_SLOT,
    MERGED,
    MergedEntry,
    Slice,
    dense_entry,
    embedding_entry,
    format_slice,
    is_in_slice,
    mix,
    parse_slice,
)
from dist_export.layout.safetensors import Header
from dist_export.manifest import TableEntry
from dist_export.package.package import Package
from dist_export.package.shards import read_header, read_indexes
from dist_export.storage import Directory

_RUN_ROWS = 1 << 20


class FoundBlock(NamedTuple):
    """One sparse block, as header and tensorkey.json tell."""

    table: str
    slot: str
    slice: Slice
    file: str
    key: str
    dtype: str
    shape: tuple[int, ...]
    begin: int


def check_sparse(package: Package, findings: list[str], checked: list[str]) -> None:
    """Add what is wrong to ``findings``, one line each, and what was looked at to ``checked``.

    Raises:
        PackageError: an index or a header that cannot be read at all.
    """
    indexes = read_indexes(package.directory)
    headers = {name: read_header(package.directory, name) for name in indexes.files}
    before = len(findings)
    _check_indexes(indexes, headers, findings)
    listed = {entry.path for entry in package.manifest.files}
    findings += [f"{name}: in index, not in the manifest" for name in indexes.files if name not in listed]
    blocks = _find_blocks(indexes, headers)
    _check_merged(package, headers, blocks, findings)
    _check_tables(package, blocks, findings)
    if len(findings) == before:
        checked.append(f"{len(headers)} shards: headers, index, tensorkey.json and merged manifest agree")
        _check_rows(package, blocks, findings, checked)


def _find_blocks(indexes: Indexes, headers: dict[str, Header]) -> dict[str, FoundBlock]:
    found = {}
    internal_of_key = indexes.internal_of_key
    for name, header in headers.items():
        columns = zip(header.keys, header.dtypes.tolist(), header.shapes, header.begins.tolist(), strict=True)
        for key, code, shape, begin in columns:
            block = split_internal(internal_of_key.get(key, ""))
            if block is not None:
                found[key] = FoundBlock(*block, name, key, DTYPES[code].torch, shape, begin)
    return found


def _check_indexes(indexes: Indexes, headers: dict[str, Header], findings: list[str]) -> None:
    found: dict[str, str] = {}
    file_of_key, internal_of_key = indexes.file_of_key, indexes.internal_of_key
    for name, header in headers.items():
        if header.has_metadata:
            findings.append(f"{name}: has a __metadata__ entry, which RecIS's reader refuses")
        if header.has_lower_bool:
            findings.append(f"{name}: holds dtype 'bool', which RecIS's reader refuses")
        for key in header.keys:
            if key in found:
                findings.append(f"{name}: {key!r} also stands in {found[key]}")
            found[key] = name
            number = file_of_key.get(key)
            if number is None or indexes.files[number] != name:
                told = "does not name it" if number is None else f"says {indexes.files[number]}"
                findings.append(f"{name}: holds {key!r}, but index {told}")
    findings += [f"index: {key!r} is in no file" for key in file_of_key if key not in found]
    findings += [f"tensorkey.json: {key!r} is in no file" for key in internal_of_key if key not in found]
    names: dict[str, str] = {}
    for key, internal in internal_of_key.items():
        if internal in names:
            findings.append(
                f"tensorkey.json: {key!r} and {names[internal]!r} are one block {internal!r}; RecIS keeps one"
            )
        names[internal] = key


def _check_merged(
    package: Package, headers: dict[str, Header], blocks: dict[str, FoundBlock], findings: list[str]
) -> None:
    """Compare the merged manifest with the headers; a checkpoint's own, in place, may be in the old style."""
    merged = _read_merged(package.directory)
    id_keys = {(b.table, b.slice): b.key for b in blocks.values() if b.slot == ID_SLOT}
    expected: dict[str, dict[str, Any]] = {}
    for block in blocks.values():
        if block.slot == EMBEDDING_SLOT:
            id_key = id_keys.get((block.table, block.slice), "")
            code = CODE_BY_TORCH[block.dtype]
            expected[block.key] = _plain(embedding_entry(block.key, id_key, code, block.shape))
    for header in headers.values():
        for key, code, shape in zip(header.keys, header.dtypes.tolist(), header.shapes, strict=True):
            if key not in blocks:
                expected[key] = _plain(dense_entry(key, DTYPES[code].torch, shape))
    is_ours = package.manifest.mode != "in_place"
    for key, entry in expected.items():
        found = merged.get(key)
        if found is None:
            findings.append(f"{MERGED}: {key!r} is missing")
            continue
        for name, value in entry.items():
            if found.get(name) != value and (is_ours or name == "shape"):
                findings.append(f"{MERGED}: {key!r} has {name} {found.get(name)!r}, the shards say {value!r}")
    for key, found in merged.items():
        if key not in expected and (found.get("is_hashmap") or key.endswith(DENSE_SUFFIX)) and is_ours:
            findings.append(f"{MERGED}: {key!r} is in no file")


def _plain(entry: MergedEntry) -> dict[str, Any]:
    return {**msgspec.to_builtins(entry), "shape": list(entry.shape)}


def _check_tables(package: Package, blocks: dict[str, FoundBlock], findings: list[str]) -> None:
    """Compare the manifest's tables, slots and parts with the blocks of the shards, both ways."""
    claimed: set[str] = set()
    names: set[str] = set()
    for table in package.manifest.tables:
        if table.name in names:
            findings.append(f"manifest.json: lists the table {table.name!r} twice")
        names.add(table.name)
        slots = {slot.name: slot for slot in table.kept}
        missing = [needed for needed in (ID_SLOT, EMBEDDING_SLOT) if needed not in slots]
        findings += [f"manifest.json: table {table.name!r} keeps no {needed}" for needed in missing]
        for part in table.parts:
            # in a copy, a part without rows may lack slots that others have
            if set(part.keys) - set(slots) or ID_SLOT not in part.keys or (part.rows and set(part.keys) != set(slots)):
                findings.append(f"manifest.json: table {table.name!r} has a part with slots {sorted(part.keys)}")
            for slot, key in part.keys.items():
                claimed.add(key)
                block, kept = blocks.get(key), slots.get(slot)
                if block is None or kept is None:
                    findings.append(f"manifest.json: block {key!r} of table {table.name!r} is in no shard")
                    continue
                found = (block.table, block.slot, block.slice, block.file, block.dtype, block.shape)
                stated = (table.name, slot, parse_slice(part.slice), part.file, kept.dtype, (part.rows, *kept.shape))
                if found != stated:
                    findings.append(f"manifest.json: block {key!r} is stated as {stated}, the shards say {found}")
        _check_account(table, findings)
    findings += [f"{block.file}: {key!r} is not in the manifest" for key, block in blocks.items() if key not in claimed]


def _check_account(entry: TableEntry, findings: list[str]) -> None:
    dropped = sum(entry.rows_dropped.values())
    if entry.rows_in != entry.rows_out + dropped:
        findings.append(
            f"{entry.name}: the manifest's account does not add up: {entry.rows_in:,} rows in, {entry.rows_out:,} out, "
            f"{dropped:,} dropped"
        )
    # a misplaced row is repaired or dropped, and a row is dropped as a duplicate only where one was found
    is_possible = (
        min(entry.rows_dropped.values(), default=0) >= 0
        and 0 <= entry.repaired <= entry.misplaced <= entry.repaired + dropped
        and entry.rows_dropped.get("duplicate", 0) <= entry.duplicates <= dropped
    )
    if not is_possible:
        findings.append(
            f"{entry.name}: the manifest's account contradicts itself: {entry.misplaced:,} rows misplaced, "
            f"{entry.repaired:,} repaired, {entry.duplicates:,} duplicates, dropped {entry.rows_dropped}"
        )
    if sum(part.rows for part in entry.parts) != entry.rows_out:
        findings.append(f"{entry.name}: the rows of its parts do not add up to {entry.rows_out:,}")


def _check_rows(package: Package, blocks: dict[str, FoundBlock], findings: list[str], checked: list[str]) -> None:
    """Read every id once: its slice, the sum that the manifest states, and whether it stands twice in its table."""
    total = 0
    for table in package.manifest.tables:
        ids = np.empty(table.rows_out, np.int64)
        first, id_sum = 0, 0
        for part in table.parts:
            block = blocks[part.keys[ID_SLOT]]
            held = ids[first : first + part.rows]
            _read_ids(package.directory, block, held)
            strangers = part.rows - int(np.count_nonzero(is_in_slice(held, block.slice)))
            if strangers:
                findings.append(
                    f"{table.name}: {strangers:,} ids of {block.file} lie outside the slice {format_slice(block.slice)}"
                )
            id_sum = (id_sum + int(mix(held).sum(dtype=np.uint64))) % (1 << 64)
            first += part.rows
        if f"{id_sum:016x}" != table.id_sum:
            findings.append(
                f"{table.name}: its ids are not those that were exported (sum {id_sum:016x}, not {table.id_sum})"
            )
        ids.sort()
        twice = int(np.count_nonzero(ids[1:] == ids[:-1]))
        if twice:
            findings.append(f"{table.name}: {twice:,} ids stand twice")
        total += len(ids)
    checked.append(
        f"{len(package.manifest.tables)} tables, {total:,} rows: all there, unique, each in the slice of its shard"
    )


def _read_ids(directory: Directory, block: FoundBlock, held: np.ndarray) -> None:
    with directory.open_reader(block.file) as reader:
        for first in range(0, len(held), _RUN_ROWS):
            reader.read_into(held[first : first + _RUN_ROWS].data.cast("B"), block.begin + first * 8)


def _read_merged(directory: Directory) -> dict[str, dict[str, Any]]:
    document = json.loads(directory.read(MERGED))
    if not isinstance(document, dict) or not all(isinstance(entry, dict) for entry in document.values()):
        raise TypeError(f"{MERGED} should map each name to an object")
    return document

"""Check an exported directory against its manifest and itself. Every finding is one line; none is an exception."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import msgspec
import numpy as np

from dist_export.errors import DistExportError, PackageError
from dist_export.layout.dtypes import DTYPES
from dist_export.layout.indexes import Indexes, split_internal
from dist_export.layout.recis import EMBEDDING_SLOT, ID_SLOT, MERGED, Slice, format_slice, is_in_slice
from dist_export.layout.safetensors import Header
from dist_export.manifest import DenseEntry, Manifest
from dist_export.package.package import Package
from dist_export.package.shards import read_header, read_indexes
from dist_export.storage import Directory, digest_file

_RUN_ROWS = 1 << 20


@dataclass
class Report:
    """What a verification found, and what it looked at."""

    findings: list[str] = field(default_factory=list)
    """Empty where the package is sound."""
    checked: list[str] = field(default_factory=list)


def verify(path: str, storage_options: dict[str, Any] | None = None) -> Report:
    """Check sizes and digests, headers, indexes against files, row accounting, and that the dense program loads.

    Raises:
        PackageError: there is no package to verify: no manifest, or one that cannot be read.
    """
    package = Package(Directory(path, storage_options))
    report = Report()
    _check_files(package, report)
    if package.manifest.mode != "dense_only":
        _check_sparse(package, report)
    if package.manifest.dense is not None:
        _check_dense(package, package.manifest.dense, report)
    return report


def _check_files(package: Package, report: Report) -> None:
    directory = package.directory
    num_bytes = 0
    for entry in package.manifest.files:
        pure = PurePosixPath(entry.path)
        if pure.is_absolute() or ".." in pure.parts or not entry.path.isprintable():
            report.findings.append(f"manifest.json: {entry.path!r} does not lie in the package")
            continue
        try:
            size = directory.stat(entry.path).size
        except FileNotFoundError:
            report.findings.append(f"{entry.path}: missing")
            continue
        if size != entry.num_bytes:
            report.findings.append(f"{entry.path}: {size:,} bytes, the manifest says {entry.num_bytes:,}")
        elif (digest := digest_file(directory, entry.path)) != entry.digest:
            report.findings.append(
                f"{entry.path}: its content is not what was written (digest {digest}, not {entry.digest})"
            )
        num_bytes += size
    report.checked.append(f"{len(package.manifest.files)} files, {num_bytes:,} bytes: sizes and digests")


def _check_sparse(package: Package, report: Report) -> None:
    try:
        indexes = read_indexes(package.directory)
        headers = {name: read_header(package.directory, name) for name in indexes.files}
    except PackageError as error:
        report.findings.append(str(error))
        return
    before = len(report.findings)
    _check_indexes(indexes, headers, report)
    listed = {entry.path for entry in package.manifest.files}
    report.findings += [f"{name}: in index, not in the manifest" for name in indexes.files if name not in listed]
    _check_merged(package.directory, headers, indexes, report)
    if len(report.findings) == before:
        _check_rows(package, indexes, headers, report)
    report.checked.append(f"{len(headers)} shards: headers, index, tensorkey.json and merged manifest agree")


def _check_indexes(indexes: Indexes, headers: dict[str, Header], report: Report) -> None:
    found: dict[str, str] = {}
    for name, header in headers.items():
        if header.has_metadata:
            report.findings.append(f"{name}: has a __metadata__ entry, which RecIS's reader refuses")
        if header.has_lower_bool:
            report.findings.append(f"{name}: holds dtype 'bool', which RecIS's reader refuses")
        for key in header.keys:
            if key in found:
                report.findings.append(f"{name}: {key!r} also stands in {found[key]}")
            found[key] = name
            number = indexes.file_of_key.get(key)
            if number is None or indexes.files[number] != name:
                told = "does not name it" if number is None else f"says {indexes.files[number]}"
                report.findings.append(f"{name}: holds {key!r}, but index {told}")
    report.findings += [f"index: {key!r} is in no file" for key in indexes.file_of_key if key not in found]
    report.findings += [f"tensorkey.json: {key!r} is in no file" for key in indexes.internal_of_key if key not in found]
    names: dict[str, str] = {}
    for key, internal in indexes.internal_of_key.items():
        if internal in names:
            report.findings.append(
                f"tensorkey.json: {key!r} and {names[internal]!r} are one block {internal!r}; RecIS keeps one"
            )
        names[internal] = key


def _check_merged(directory: Directory, headers: dict[str, Header], indexes: Indexes, report: Report) -> None:
    try:
        merged = msgspec.json.decode(directory.read(MERGED), type=dict[str, dict[str, Any]])
    except FileNotFoundError:
        report.findings.append(f"{MERGED}: missing")
        return
    except msgspec.MsgspecError as error:
        report.findings.append(f"{MERGED}: {error}")
        return
    for name, header in headers.items():
        for row, key in enumerate(header.keys):
            entry = merged.get(key)
            block = split_internal(indexes.internal_of_key.get(key, ""))
            if entry is None:
                if block is not None and block.slot == EMBEDDING_SLOT and "@" not in block.table:
                    report.findings.append(f"{MERGED}: {key!r} of {name} is missing")
                continue
            if entry.get("shape") != list(header.shapes[row]):
                report.findings.append(
                    f"{MERGED}: {key!r} has shape {entry.get('shape')}, {name} says {list(header.shapes[row])}"
                )
            dtype = DTYPES[header.dtypes[row]]
            if entry.get("dtype") not in (dtype.torch, dtype.name, ""):
                report.findings.append(f"{MERGED}: {key!r} is {entry.get('dtype')}, {name} says {dtype.torch}")
            if entry.get("is_hashmap") and block is not None and block.slot == EMBEDDING_SLOT:
                id_key = entry.get("hashmap_key")
                if indexes.file_of_key.get(str(id_key)) is None:
                    report.findings.append(f"{MERGED}: {key!r} names the ids {id_key!r}, which are in no file")


def _check_rows(package: Package, indexes: Indexes, headers: dict[str, Header], report: Report) -> None:
    """Compare every part with the manifest, every id with its slice, and look for ids that stand twice."""
    blocks: dict[tuple[str, Slice], dict[str, tuple[str, int]]] = {}
    for name, header in headers.items():
        for row, key in enumerate(header.keys):
            block = split_internal(indexes.internal_of_key.get(key, ""))
            if block is not None:
                blocks.setdefault((block.table, block.slice), {})[block.slot] = (name, row)
    manifest = package.manifest
    rows_out: dict[str, int] = {table.name: 0 for table in manifest.tables}
    ids_of: dict[str, list[np.ndarray]] = {}
    for (table, part), slots in sorted(blocks.items()):
        if table not in rows_out:
            report.findings.append(f"{table}: in the shards, not in the manifest")
            continue
        if ID_SLOT not in slots or EMBEDDING_SLOT not in slots:
            report.findings.append(f"{table}: its part {format_slice(part)} has no {ID_SLOT} or no {EMBEDDING_SLOT}")
            continue
        rows = {slot: headers[name].shapes[row][0] for slot, (name, row) in slots.items()}
        if len(set(rows.values())) > 1:
            report.findings.append(f"{table}: its part {format_slice(part)} has unequal rows {rows}")
            continue
        name, row = slots[ID_SLOT]
        ids = _read_ids(package.directory, name, int(headers[name].begins[row]), rows[ID_SLOT])
        strangers = int(np.count_nonzero(~is_in_slice(ids, part)))
        if strangers:
            report.findings.append(f"{table}: {strangers:,} ids of {name} lie outside the slice {format_slice(part)}")
        rows_out[table] += len(ids)
        ids_of.setdefault(table, []).append(ids)
    _check_accounts(manifest, rows_out, report)
    for table, columns in ids_of.items():
        ids = np.concatenate(columns)
        twice = len(ids) - len(np.unique(ids))
        if twice:
            report.findings.append(f"{table}: {twice:,} ids stand twice")
    total = sum(rows_out.values())
    report.checked.append(f"{len(rows_out)} tables, {total:,} rows: all there, unique, each in the slice of its shard")


def _check_accounts(manifest: Manifest, rows_out: dict[str, int], report: Report) -> None:
    for entry in manifest.tables:
        if entry.rows_in != entry.rows_out + sum(entry.rows_dropped.values()):
            report.findings.append(
                f"{entry.name}: the manifest's account does not add up: {entry.rows_in:,} rows in, {entry.rows_out:,} out, "
                f"dropped {entry.rows_dropped}"
            )
        if rows_out[entry.name] != entry.rows_out:
            report.findings.append(
                f"{entry.name}: {rows_out[entry.name]:,} rows in the shards, {entry.rows_out:,} in the manifest"
            )
        if sum(part.rows for part in entry.parts) != entry.rows_out:
            report.findings.append(f"{entry.name}: the rows of its parts do not add up to {entry.rows_out:,}")


def _read_ids(directory: Directory, name: str, begin: int, rows: int) -> np.ndarray:
    ids = np.empty(rows, np.int64)
    with directory.open_reader(name) as reader:
        for first in range(0, rows, _RUN_ROWS):
            piece = ids[first : first + _RUN_ROWS]
            reader.read_into(piece.data.cast("B"), begin + first * 8)
    return ids


def _check_dense(package: Package, entry: DenseEntry, report: Report) -> None:
    """Load the program (after a look into its archive), call it on the stored sample, compare names and shapes."""
    folder = package.directory
    try:
        program = package.load_program()
        inputs = _read_json(folder, f"{entry.folder}/inputs_dict.json")
        outputs = _read_json(folder, f"{entry.folder}/output_info.json")["OutputNodes"]
        order = _read_json(folder, f"{entry.folder}/params_order.json")
    except (DistExportError, FileNotFoundError, KeyError, TypeError) as error:
        report.findings.append(f"{entry.program}: {error}")
        return
    names = [output.get("OutputNodeName") for output in outputs]
    if names != [output.name for output in entry.outputs]:
        report.findings.append(f"{entry.folder}/output_info.json: outputs {names}, the manifest says otherwise")
    if order != [tensor.name for tensor in entry.inputs]:
        report.findings.append(f"{entry.folder}/params_order.json: inputs {order}, the manifest says otherwise")
    try:
        found = _call(program, inputs, order)
    except Exception as error:  # noqa: BLE001 -- whatever a foreign program raises, it does not run
        first = next(iter(str(error).strip().splitlines()), "")
        report.findings.append(f"{entry.program}: fails on the stored sample: {type(error).__name__}: {first}")
        return
    if len(found) != len(names):
        report.findings.append(f"{entry.program}: returns {len(found)} outputs, output_info.json names {len(names)}")
    for tensor, output in zip(found, outputs, strict=False):
        if list(tensor.shape) != output.get("shape") or str(tensor.dtype) != output.get("dtype"):
            report.findings.append(
                f"{entry.program}: output {output.get('OutputNodeName')!r} is {tensor.dtype} {list(tensor.shape)}, "
                f"output_info.json says {output.get('dtype')} {output.get('shape')}"
            )
    report.checked.append(f"dense program: loads, runs on the stored sample, outputs {', '.join(map(str, names))}")


def _call(program: Any, inputs: dict[str, Any], order: list[str]) -> list[Any]:
    import torch

    kwargs = {}
    for name in order:
        entry = inputs[name]
        dtype = getattr(torch, re.sub(r"^torch\.", "", entry["dtype"]))
        kwargs[name] = torch.tensor(entry["values"], dtype=dtype).reshape(entry["shape"])
    with torch.no_grad():
        output = program.module()(**kwargs)
    return [output] if isinstance(output, torch.Tensor) else list(output)


def _read_json(directory: Directory, name: str) -> Any:
    try:
        return json.loads(directory.read(name))  # the sample may hold NaN, which Python's json reads and writes
    except ValueError as error:
        raise PackageError(f"{name}: {error}") from None

"""Describe a DCP checkpoint for ``inspect``: tables and their sharding, optimizer slots, dense parameters, a dump beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from dist_export.checkpoint.dcp.classify import DcpTable
from dist_export.checkpoint.dcp.placeholders import read_beside
from dist_export.checkpoint.dcp.tables import locate_tables
from dist_export.checkpoint.detect import DCP, DCP_AND_DUMP, FORMATS, open_reader
from dist_export.checkpoint.dynamicemb_widths import confirm_widths
from dist_export.checkpoint.tensor_settings import TensorSettings
from dist_export.formats.dtypes import CODE_BY_TORCH, DTYPES
from dist_export.inspect.checkpoints import NO_TABLES, describe_skipped, describe_tables
from dist_export.storage.directory import Directory


def describe_dcp(
    directory: Directory, *, asked: str, settings: TensorSettings, dynamicemb_dims: Mapping[str, int]
) -> dict[str, Any]:
    """Check that the checkpoint is complete and its tables can be read, and return its content as plain values.

    This reads the metadata and the head of each item that is a piece of a table, but no payload. For a dump, it reads the
    sizes of files.

    Args:
        directory: the checkpoint.
        asked: its format: DCP alone, or DCP with a dump.
        settings: the settings about its tensors.
        dynamicemb_dims: for a dump: pattern of tables -> dimension.

    Raises:
        CheckpointError: the checkpoint cannot be exported.
    """
    with_dump = asked == DCP_AND_DUMP
    beside = read_beside(directory, settings, with_dump=with_dump)
    found = beside.checkpoint
    strided = locate_tables(found)
    described = {
        "kind": FORMATS[DCP].kind.partition(" ")[2],
        "path": directory.url,
        "files": len(found.files),
        "bytes": sum(found.files.values()),
        "tables": [_describe_table(table, strided[table.name]) for table in found.tables],
        "dense_tensors": [],
        "dense_parameters": [
            {"name": name, "dtype": tensor.dtype, "shape": list(tensor.shape)} for name, tensor in found.dense
        ],
        "other_optimizer_state": list(found.other_state),
        "objects": list(found.objects),
        "stand_ins": list(beside.stand_ins),
        "skipped": describe_skipped(found.skipped),
        "left_out": describe_skipped(found.left_out),
        "warnings": [*found.notes, *beside.notes],
        "dense": None,
    }
    return _add_dump(described, directory, settings, dynamicemb_dims) if with_dump else described


def _add_dump(
    described: dict[str, Any], directory: Directory, settings: TensorSettings, dynamicemb_dims: Mapping[str, int]
) -> dict[str, Any]:
    """Return the description of both: add the tables of the dump, as the export joins them, to the described tables."""
    reader = open_reader(directory, asked=DCP_AND_DUMP, settings=settings)
    joined = reader.assemble([reader.read_headers(range(len(reader.files)))])
    joined = confirm_widths(joined, dynamicemb_dims, {})
    dumped = [table for table, meta in zip(describe_tables(joined), joined.tables, strict=True) if meta.is_hashed]
    return described | {
        "kind": FORMATS[DCP_AND_DUMP].kind.partition(" ")[2],
        "files": len(joined.files),
        "bytes": joined.num_bytes,
        "tables": [table | {"is_hashed": False} for table in described["tables"]] + dumped,
        "warnings": list(joined.warnings),
    }


def render_dcp(found: dict[str, Any]) -> list[str]:
    """Return the lines that only a DCP checkpoint has; none for other kinds."""
    if "dense_parameters" not in found:
        return []
    lines = []
    for table in (its for its in found["tables"] if "sharding" in its):
        more = f", {table['strided_pieces']} of them not row after row" if table["strided_pieces"] else ""
        lines.append(f"  {table['name']} is shared out {table['sharding']}{more}")
        lines += [
            f"  {table['name']}: the slot {slot['name']} has shape {slot['shape']}, which does not go with "
            f"{table['rows']:,} rows, so it cannot be kept"
            for slot in table["slot_shapes"]
            if not slot["fits"]
        ]
    if not found["tables"] and not found["stand_ins"]:
        lines.append(f"  {NO_TABLES}")
    for tensor in found["dense_parameters"]:
        lines.append(f"  dense      {tensor['name']} {tensor['dtype']} {tensor['shape']}")
    if found["stand_ins"]:
        lines.append(f"  left out   {', '.join(found['stand_ins'])}: they are placeholders for tables of the dump")
    lines.append(f"  other      {len(found['other_optimizer_state'])} tensors of optimizer state that is of no table")
    return lines


def _describe_table(table: DcpTable, strided: int) -> dict[str, Any]:
    weight = table.weight
    tensors = [weight, *(slot.tensor for slot in table.slots)]
    return {
        "name": table.name,
        "rows": weight.shape[0],
        "shape": [weight.shape[1]],
        "dtype": weight.dtype,
        "parts": len(weight.chunks),
        "bytes": sum(math.prod(tensor.shape) * _itemsize(tensor.dtype) for tensor in tensors),
        "slots": ["embedding", *(slot.name for slot in table.slots)],
        "fqn": weight.name,
        "sharding": table.sharding,
        "strided_pieces": strided,
        "slot_shapes": [
            {"name": slot.name, "dtype": slot.tensor.dtype, "shape": list(slot.tensor.shape), "fits": slot.fits}
            for slot in table.slots
        ],
    }


def _itemsize(dtype: str) -> int:
    code = CODE_BY_TORCH.get(dtype)
    return 0 if code is None else DTYPES[code].itemsize  # only optimizer state can have a dtype that no package has

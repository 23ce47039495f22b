"""``inspect`` of a DCP checkpoint: tables and how they were shared out, optimizer slots, dense parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from dist_export.checkpoint.dcp import DcpTable, locate_tables, read_dcp
from dist_export.layout.dtypes import CODE_BY_TORCH, DTYPES
from dist_export.storage import Directory


def describe_dcp(directory: Directory, *, tables: Sequence[str], optimizer_slots: Sequence[str]) -> dict[str, Any]:
    """Return what the checkpoint holds as plain values, once it is known to be complete and its tables are found.

    Reads the metadata and the head of each item that is a piece of a table, no payload. CheckpointError for a checkpoint
    that could not be read.
    """
    found = read_dcp(directory, tables=tables, optimizer_slots=optimizer_slots)
    strided = locate_tables(found)
    return {
        "kind": "DCP checkpoint",
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
        "dense": None,
    }


def render_dcp(found: dict[str, Any]) -> list[str]:
    """Return line by line what only a DCP checkpoint has; nothing for anything else."""
    if "dense_parameters" not in found:
        return []
    lines = []
    for table in found["tables"]:
        more = f", {table['strided_pieces']} of them not row after row" if table["strided_pieces"] else ""
        lines.append(f"  {table['name']} is shared out {table['sharding']}{more}")
        lines += [
            f"  {table['name']}: the slot {slot['name']} has shape {slot['shape']}, which does not go with "
            f"{table['rows']:,} rows, so it cannot be kept"
            for slot in table["slot_shapes"]
            if not slot["fits"]
        ]
    if not found["tables"]:
        lines.append(
            "  no tables: no matrix lies below embedding_bags or embeddings; --tables PATTERN names those that are"
        )
    for tensor in found["dense_parameters"]:
        lines.append(f"  dense      {tensor['name']} {tensor['dtype']} {tensor['shape']}")
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
    return 0 if code is None else DTYPES[code].itemsize  # state of a dtype that no package has; tables are of none

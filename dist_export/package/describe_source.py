"""``inspect`` of a plain checkpoint or a DynamicEmb dump: tables and dense parameters, from headers and sizes alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dist_export.checkpoint.formats import NAMES, open_dense, open_reader
from dist_export.checkpoint.reader import Checkpoint, TableMeta
from dist_export.layout.dtypes import DTYPES
from dist_export.layout.recis import EMBEDDING_SLOT, ID_SLOT
from dist_export.storage import Directory


def describe_source(
    directory: Directory, *, asked: str, tables: Sequence[str], optimizer_slots: Sequence[str]
) -> dict[str, Any]:
    """Return what an export would read, as plain values. CheckpointError where it could not read it."""
    reader = open_reader(directory, asked=asked, tables=tables, optimizer_slots=optimizer_slots)
    found: Checkpoint = reader.assemble([reader.read_headers(range(len(reader.files)))])
    dense = open_dense(directory, asked, tables=tables, optimizer_slots=optimizer_slots).describe()
    return {
        "kind": NAMES[found.format].partition(" ")[2],
        "path": directory.url,
        "files": len(found.files),
        "bytes": found.num_bytes,
        "tables": [_describe_table(found, number, table) for number, table in enumerate(found.tables)],
        "dense_tensors": [],
        "parameters": [{"name": name, "dtype": dtype, "shape": list(shape)} for name, dtype, shape in dense],
        "warnings": [*found.warnings, *([found.no_tables] if found.no_tables else [])],
        "dense": None,
    }


def render_source(found: dict[str, Any]) -> list[str]:
    """Return line by line what only such a source has; nothing for anything else."""
    lines = [f"  dense      {t['name']} {t['dtype']} {t['shape']}" for t in found.get("parameters", [])]
    return lines + [f"  note       {warning}" for warning in found.get("warnings", [])]


def _describe_table(checkpoint: Checkpoint, number: int, table: TableMeta) -> dict[str, Any]:
    embedding = next(slot for slot in table.slots if slot.name == EMBEDDING_SLOT)
    parts = checkpoint.parts.of_table(number)
    rows = int(checkpoint.parts.rows[parts].sum())
    stored = [slot for slot in table.slots if slot.name != ID_SLOT or table.has_ids]
    return {
        "name": table.name,
        "rows": rows,
        "shape": list(embedding.inner_shape),
        "dtype": DTYPES[embedding.dtype].torch,
        "parts": len(parts),
        "bytes": rows * sum(slot.row_bytes for slot in stored),
        "slots": [slot.name for slot in stored],
    }

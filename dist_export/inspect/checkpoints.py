"""Describe a plain checkpoint or a DynamicEmb dump for ``inspect``: tables and dense parameters, from headers and sizes only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dist_export.checkpoint.detect import FORMATS, holds_tables, open_dense, open_reader
from dist_export.checkpoint.dynamicemb_widths import confirm_widths
from dist_export.checkpoint.metadata import Checkpoint
from dist_export.checkpoint.tensor_settings import TensorSettings
from dist_export.checkpoint.tensors.classify import Skipped
from dist_export.formats.dtypes import DTYPES
from dist_export.formats.recis import EMBEDDING_SLOT, ID_SLOT
from dist_export.storage.directory import Directory

NO_TABLES = (
    "no tables: no matrix lies below embedding_bags or embeddings; --treat_as_tables PATTERN names those that are"
)


def describe_source(
    directory: Directory, *, asked: str, settings: TensorSettings, dynamicemb_dims: Mapping[str, int]
) -> dict[str, Any]:
    """Return what an export would read, as plain values. Raises CheckpointError if an export could not read it."""
    reader = open_reader(directory, asked=asked, settings=settings)
    found: Checkpoint | None = None
    if holds_tables(directory, asked, settings):
        found = reader.assemble([reader.read_headers(range(len(reader.files)))])
        found = confirm_widths(found, dynamicemb_dims, {})
    parameters = open_dense(directory, asked, settings)
    dense = parameters.describe()
    return {
        "kind": FORMATS[asked].kind.partition(" ")[2],
        "path": directory.url,
        "files": len(reader.files),
        "bytes": sum(file.size for file in reader.files),
        "tables": describe_tables(found) if found else [],
        "dense_tensors": [],
        "parameters": [{"name": name, "dtype": dtype, "shape": list(shape)} for name, dtype, shape in dense],
        "skipped": describe_skipped(parameters.skipped),
        "left_out": describe_skipped(parameters.left_out),
        "warnings": list(found.warnings) if found else [NO_TABLES, *parameters.notes],
        "dense": None,
    }


def render_source(found: dict[str, Any]) -> list[str]:
    """Return the lines that only such a source has; none for other kinds."""
    lines = [f"  dense      {t['name']} {t['dtype']} {t['shape']}" for t in found.get("parameters", [])]
    return lines + [f"  note       {warning}" for warning in found.get("warnings", [])]


def describe_skipped(tensors: Sequence[Skipped]) -> list[dict[str, Any]]:
    """Return the tensors that are not read, as plain values."""
    return [{"name": its.name, "dtype": its.dtype, "shape": list(its.shape), "reason": its.reason} for its in tensors]


def render_skipped(found: dict[str, Any]) -> list[str]:
    """Return a line for each tensor in ``skipped``. Tensors of other states (``left_out``) get none: notes name their states."""
    return [f"  not read   {t['name']} {t['dtype']} {t['shape']}: {t['reason']}" for t in found.get("skipped", [])]


def describe_tables(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """Return the tables of a checkpoint as plain values."""
    return [_describe_table(checkpoint, number) for number in range(len(checkpoint.tables))]


def _describe_table(checkpoint: Checkpoint, number: int) -> dict[str, Any]:
    table = checkpoint.tables[number]
    embedding = next(slot for slot in table.slots if slot.name == EMBEDDING_SLOT)
    parts = checkpoint.parts.of_table(number)
    rows = int(checkpoint.parts.rows[parts].sum())
    stored = [slot for slot in table.slots if slot.name != ID_SLOT or table.has_ids]
    confirmed = table.width_confirmed_by
    return {
        "name": table.name,
        "rows": rows,
        "shape": list(embedding.inner_shape),
        "dtype": DTYPES[embedding.dtype].torch,
        "parts": len(parts),
        "bytes": sum(slot.num_bytes(rows) for slot in stored),
        "slots": [slot.name for slot in stored],
        **({} if confirmed is None else {"width_confirmed_by": list(confirmed)}),
    }

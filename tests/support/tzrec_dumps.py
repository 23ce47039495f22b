"""Dumps of looked-up embeddings as TorchEasyRec's trainer writes them (the trainer itself needs CUDA), by pyarrow."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import parquet

Rows = Mapping[str, tuple[np.ndarray, np.ndarray]]
"""Table -> keys (int64) and rows (float32 or uint8)."""


def schema_of(value_type: pa.DataType) -> pa.Schema:
    """Return the columns of a dump."""
    return pa.schema(
        [
            ("global_step", pa.int64()),
            ("rank", pa.int32()),
            ("world_size", pa.int32()),
            ("feature_name", pa.string()),
            ("table_fqn", pa.string()),
            ("key_id", pa.int64()),
            ("embedding", pa.list_(value_type)),
            ("source", pa.string()),
        ]
    )


def write_file(path: Path, tables: Rows, *, step: int, rank: int, world_size: int, is_quantized: bool = False) -> Path:
    """Write one file: a chunk for each table, or the columns alone where a rank has looked up nothing."""
    value_type = pa.uint8() if is_quantized else pa.float32()
    schema = schema_of(value_type)
    path.parent.mkdir(parents=True, exist_ok=True)
    with parquet.ParquetWriter(path, schema) as writer:
        if not tables:
            writer.write_table(schema.empty_table())
        for table, (keys, rows) in tables.items():
            count, dim = rows.shape
            offsets = pa.array(np.arange(0, (count + 1) * dim, dim, dtype=np.int32))
            columns = [
                pa.repeat(pa.scalar(step, pa.int64()), count),
                pa.repeat(pa.scalar(rank, pa.int32()), count),
                pa.repeat(pa.scalar(world_size, pa.int32()), count),
                pa.repeat(pa.scalar(f"{table.rpartition('.')[2]}_id", pa.string()), count),
                pa.repeat(pa.scalar(table, pa.string()), count),
                pa.array(np.asarray(keys, np.int64)),
                pa.ListArray.from_arrays(offsets, pa.array(rows.reshape(-1), type=value_type)),
                pa.repeat(pa.scalar("model_delta_tracker", pa.string()), count),
            ]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))
    return path


def write_dump(
    folder: Path, step: int, *ranks: Rows, is_quantized: bool = False, prefix: str = "delta_embedding"
) -> None:
    """Write the dump of one step, of as many ranks as there are ``ranks``."""
    if len(ranks) == 1:
        path = folder / f"{prefix}_step_{step}.parquet"
        write_file(path, ranks[0], step=step, rank=0, world_size=1, is_quantized=is_quantized)
        return
    for rank, tables in enumerate(ranks):
        path = folder / f"step_{step}" / f"{prefix}_step_{step}_rank_{rank}_of_{len(ranks)}.parquet"
        write_file(path, tables, step=step, rank=rank, world_size=len(ranks), is_quantized=is_quantized)


def quantize(rows: np.ndarray) -> np.ndarray:
    """Return rows as the trainer quantises them: a byte for each value, then scale and offset as float16."""
    least, most = rows.min(axis=1, keepdims=True), rows.max(axis=1, keepdims=True)
    scale, offset = ((most - least) / 255).astype(np.float16), least.astype(np.float16)
    wide = scale.astype(np.float32)
    values = np.clip(np.rint((rows - offset) / np.where(wide == 0, 1, wide)), 0, 255).astype(np.uint8)
    return np.concatenate([values, scale.view(np.uint8), offset.view(np.uint8)], axis=1)

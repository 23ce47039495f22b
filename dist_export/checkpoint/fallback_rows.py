"""What torchrec's MCH gives an id that it does not know, so that serving gives the same: the last row of the id's shard."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from dist_export.checkpoint.id_reader import made_column
from dist_export.checkpoint.metadata import Checkpoint
from dist_export.checkpoint.raw_ids import RawIds, find_shard_ends
from dist_export.checkpoint.row_reader import RowReader
from dist_export.errors import CheckpointError
from dist_export.formats.dtypes import DTYPES
from dist_export.formats.recis import EMBEDDING_SLOT


def needs_fallbacks(checkpoint: Checkpoint) -> bool:
    """Whether a table has a row for unknown ids, and the settings give it no default row."""
    return any(_state_of(checkpoint, number) is not None for number in range(len(checkpoint.tables)))


def find_fallbacks(checkpoint: Checkpoint) -> dict[str, tuple[float, ...]]:
    """Return the row of unknown ids of each such table, by its name. One rank; reads columns of ids and a row a shard.

    Raises:
        CheckpointError: the shards of a table have different last rows, so that no one row is that of all unknown ids.
    """
    found = {}
    with RowReader(checkpoint) as reader:
        for number, table in enumerate(checkpoint.tables):
            raw_ids = _state_of(checkpoint, number)
            if raw_ids is None:
                continue
            ends = find_shard_ends(reader.source, raw_ids.state)
            rows = [_read_row(reader, checkpoint, number, end - 1) for end in ends]
            other = next((place for place, row in enumerate(rows) if row.tobytes() != rows[0].tobytes()), None)
            advice = f"set what serving gives these ids: default_row: {{{table.name_in_source!r}: zeros}}, or the values of a row"
            where = f"{checkpoint.directory.url}: table {table.name_in_source!r}: an id that the trainer did not know"
            if other is not None:
                raise CheckpointError(
                    f"{where} got the last row of its shard, and those differ: row {ends[0] - 1:,} is not row "
                    f"{ends[other] - 1:,}. So no single row is right for all such ids; {advice}"
                )
            if not np.isfinite(rows[0]).all():
                raise CheckpointError(f"{where} got row {ends[0] - 1:,}, which holds NaN or an infinity; {advice}")
            found[table.name] = tuple(rows[0].tolist())
    return found


def set_fallbacks(checkpoint: Checkpoint, rows: Mapping[str, tuple[float, ...]]) -> Checkpoint:
    """Return the checkpoint with these default rows, by the names of their tables. Pure."""
    tables = tuple(
        replace(table, default_row=rows[table.name]) if table.name in rows else table for table in checkpoint.tables
    )
    return replace(checkpoint, tables=tables)


def _state_of(checkpoint: Checkpoint, number: int) -> RawIds | None:
    """Return the ids of a table's first rows, where unknown ids have a row in it and no default row is set; else None."""
    if checkpoint.tables[number].default_row is not None:
        return None
    for part in checkpoint.parts.of_table(number):
        column = made_column(checkpoint, part)
        if isinstance(column, RawIds) and column.state.mapping is not None and checkpoint.parts.rows[part]:
            return column
    return None


def _read_row(reader: RowReader, checkpoint: Checkpoint, table: int, number: int) -> np.ndarray:
    """Return the embedding of one row, by its number in the source: float or integer, (dim,)."""
    slot = next(slot for slot in checkpoint.tables[table].slots if slot.name == EMBEDDING_SLOT)
    parts = checkpoint.parts.of_table(table)
    part = next(
        part for part in parts if 0 <= number - checkpoint.parts.first_row_of(part) < int(checkpoint.parts.rows[part])
    )
    raw = np.empty(slot.row_bytes, np.uint8)
    reader.read_into(raw, part, slot.column, number - checkpoint.parts.first_row_of(part), 1)
    values = raw.view(DTYPES[slot.dtype].numpy)
    if DTYPES[slot.dtype].torch == "bfloat16":
        values = (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return values

"""Whether an exported package is right: what ``verify`` finds, the rows that should be there, and some rows' bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from scripts.bench.generate import Source, blocks_of, encode_header, file_name
from scripts.bench.processes import ContenderError

_NUM_LOOKED_UP = 64


def judge_package(package: Path, source: Source, checkpoint: Path, *, label: str, rows: int) -> None:
    """Check the package that ``label`` made of a generated checkpoint, with so many rows of each table.

    ContenderError says what is wrong.
    """
    from dist_export import open_package
    from dist_export.package.verify import verify

    findings = verify(str(package)).findings
    if findings:
        raise ContenderError(f"{label}: the package is not sound: {findings[0]} ({len(findings)} findings)")
    opened = open_package(package)
    found_rows = {table.name: table.rows_out for table in opened.manifest.tables}
    expected = {source.table_name(table): rows for table in range(source.tables)}
    if found_rows != expected:
        raise ContenderError(f"{label}: the package has the rows {found_rows}, expected are {expected}")
    for table in {0, source.tables - 1}:
        for shard in {0, source.shards - 1}:
            first = max(0, source.rows_of(shard) - _NUM_LOOKED_UP)
            count = source.rows_of(shard) - first
            ids = source.ids_of(table, shard, first, count)
            found, has_row = opened.lookup(source.table_name(table), ids)
            sought = _read_rows(checkpoint, source, table, shard, first, count)
            if not has_row.all() or found.tobytes() != sought.tobytes():
                raise ContenderError(f"{label}: rows of {source.table_name(table)} are not those of the checkpoint")


def _read_rows(checkpoint: Path, source: Source, table: int, shard: int, first: int, count: int) -> np.ndarray:
    """Return ``count`` embedding rows of one part from row ``first`` on."""
    for writer in range(source.files_per_shard):
        blocks = list(blocks_of(source, shard, writer))
        position = len(encode_header(blocks, source.dim))
        for block in blocks:
            if (block.table, block.slot) == (table, "embedding"):
                start = position + first * 4 * source.dim
                path = checkpoint / file_name(source, shard, writer)
                rows: np.ndarray = np.fromfile(path, np.float32, count * source.dim, offset=start)
                return rows.reshape(count, source.dim)
            position += block.num_bytes
    raise LookupError(f"the source has no table {table}")

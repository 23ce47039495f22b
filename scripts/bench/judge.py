"""Whether an exported package is right: what ``verify`` finds, the rows that should be there, and some rows' bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from scripts.bench.generate import Source, blocks_of, encode_header, file_name
from scripts.bench.processes import ContenderError
from scripts.bench.torchrec_source import read_tables, table_fqn

_NUM_LOOKED_UP = 64


def judge_package(package: Path, source: Source, checkpoint: Path, *, label: str, rows: int) -> None:
    """Check the package that ``label`` made of a generated checkpoint, with so many rows of each table.

    ContenderError says what is wrong.
    """
    from dist_export import open_package
    from dist_export.verify.verify import verify

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
            if not has_row.all() or not _are_equal(found, sought, opened.table(source.table_name(table))):
                raise ContenderError(f"{label}: rows of {source.table_name(table)} are not those of the checkpoint")


def judge_numbered(package: Path, source: Source, checkpoint: Path, *, label: str) -> None:
    """Check a package whose rows go by number, all of them; ContenderError says what is wrong."""
    from dist_export import open_package
    from dist_export.verify.verify import verify

    findings = verify(str(package)).findings
    if findings:
        raise ContenderError(f"{label}: the package is not sound: {findings[0]} ({len(findings)} findings)")
    opened = open_package(package)
    for name, sought in read_tables(checkpoint):
        found, has_row = opened.lookup(table_fqn(name), np.arange(len(sought)))
        if not has_row.all() or found.tobytes() != sought.tobytes():
            raise ContenderError(f"{label}: rows of {name} are not those of the checkpoint")
    if len(opened.manifest.tables) != source.tables:
        raise ContenderError(f"{label}: the package has {len(opened.manifest.tables)} tables of {source.tables}")


def _are_equal(found: np.ndarray, sought: np.ndarray, table: Any) -> bool:
    """Whether rows are those of the checkpoint: bit by bit, or as near as the manifest says where they were cast."""
    slot = next(slot for slot in table.kept if slot.name == "embedding")
    if not getattr(slot, "cast", None):
        return found.tobytes() == sought.tobytes()
    errors = np.abs(found.astype(np.float64) - sought)
    return bool(0 < errors.max() <= slot.cast.max_abs_error)


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

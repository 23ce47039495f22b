"""Two sources in one directory as one checkpoint: the tables of both, found in the files of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import xxhash

from dist_export.checkpoint.metadata import (
    ABSENT,
    FIRST_MADE,
    Blocks,
    Checkpoint,
    CheckpointReader,
    Parts,
    SourceFile,
    Strips,
)
from dist_export.checkpoint.payload import join_payloads
from dist_export.errors import CheckpointError

_STRIPS = ("part", "column", "first_byte", "width", "row_stride", "file", "offset")


class JoinedShare(NamedTuple):
    """What one rank found in the headers of its share of the files."""

    first: Any
    second: Any


class JoinedReader:
    """Reads two sources that lie in one directory. See :class:`~dist_export.checkpoint.metadata.CheckpointReader`."""

    def __init__(self, first: CheckpointReader[Any], second: CheckpointReader[Any], *, kind: str) -> None:
        """Join what two readers of the same ``Directory`` read, as a checkpoint of format ``kind``."""
        self._first, self._second, self._kind = first, second, kind
        self.files: tuple[SourceFile, ...] = (*first.files, *second.files)

    def read_headers(self, files: range) -> JoinedShare:
        """Read the headers of these files. CheckpointError as of the readers."""
        border = len(self._first.files)
        mine = range(min(files.start, border), min(files.stop, border))
        others = range(max(files.start - border, 0), max(files.stop - border, 0))
        return JoinedShare(self._first.read_headers(mine), self._second.read_headers(others))

    def assemble(self, shares: Sequence[JoinedShare]) -> Checkpoint:
        """Let both assemble what is theirs, and join it. CheckpointError as of the readers, and for no table in either."""
        first = self._first.assemble([share.first for share in shares])
        second = self._second.assemble([share.second for share in shares])
        joined = join_checkpoints(first, second, kind=self._kind)
        if not joined.tables:
            raise CheckpointError(
                f"{joined.directory.url}: no table has a row; {'; '.join(joined.warnings)}"
                "; set need_export_sparse: false for an export without tables"
            )
        return joined


def join_checkpoints(first: Checkpoint, second: Checkpoint, *, kind: str) -> Checkpoint:
    """Return one checkpoint of format ``kind``: files, tables, parts and strips of ``first``, then those of ``second``. Pure.

    Both are of files in one directory. Tables keep their names, and what they say of ids and rows.

    Raises:
        CheckpointError: a table of the same name in both, with the place of each.
    """
    names = {table.name: number for number, table in enumerate(first.tables)}
    for number, table in enumerate(second.tables):
        if table.name in names:
            raise CheckpointError(
                f"{first.directory.url}: two tables are called {table.name!r}: one of {first.format} in "
                f"{_place_of(first, names[table.name])}, one of {second.format} in {_place_of(second, number)}. To export one "
                f"of the two sources alone, set format: {first.format} or format: {second.format}"
            )
    num_files, num_parts, num_tables = len(first.files), len(first.parts), len(first.tables)
    strips = {name: (getattr(first.strips, name), getattr(second.strips, name)) for name in _STRIPS}
    strips["part"] = (strips["part"][0], strips["part"][1] + num_parts)
    strips["file"] = (strips["file"][0], strips["file"][1] + num_files)
    hasher = xxhash.xxh3_128(kind.encode())
    for its in (first, second):
        hasher.update(f"\n{its.format} {its.fingerprint}".encode())
    return Checkpoint(
        format=kind,
        directory=first.directory,
        files=(*first.files, *second.files),
        tables=(*first.tables, *second.tables),
        parts=_join_parts(first.parts, second.parts, num_tables),
        blocks=_join_blocks(first.blocks, second.blocks, num_files, len(first.made)),
        dense=(*first.dense, *(replace(tensor, file=tensor.file + num_files) for tensor in second.dense)),
        fingerprint=f"xxh3:{hasher.hexdigest()}",
        copy_hindrances=(*first.copy_hindrances, *second.copy_hindrances),
        verbatim={**first.verbatim, **second.verbatim},
        warnings=(*first.warnings, *second.warnings),
        strips=Strips(**{name: np.concatenate(columns) for name, columns in strips.items()}),
        optimizer_patterns=first.optimizer_patterns | second.optimizer_patterns,
        left_out=(*first.left_out, *second.left_out),
        payload=join_payloads(first.payload, second.payload),
        made=(*first.made, *(column.moved(num_files) for column in second.made)),
    )


def _join_parts(first: Parts, second: Parts, num_tables: int) -> Parts:
    columns = {
        name: np.concatenate([getattr(first, name), getattr(second, name)]) for name in ("begin", "end", "size", "rows")
    }
    first_row = None
    if first.first_row is not None or second.first_row is not None:
        # a table with ids has no use for it
        known = [np.zeros(len(its), np.int64) if its.first_row is None else its.first_row for its in (first, second)]
        first_row = np.concatenate(known)
    return Parts(table=np.concatenate([first.table, second.table + num_tables]), first_row=first_row, **columns)


def _join_blocks(first: Blocks, second: Blocks, num_files: int, num_made: int) -> Blocks:
    width = max(first.file.shape[1], second.file.shape[1])
    moved = np.where(second.file >= 0, second.file + num_files, second.file)
    moved = np.where(moved <= FIRST_MADE, moved - num_made, moved).astype(np.int32)
    return Blocks(
        file=np.concatenate([_widen(its, width, ABSENT) for its in (first.file, moved)]),
        offset=np.concatenate([_widen(its.offset, width, 0) for its in (first, second)]),
        key=np.concatenate([_widen(its.key, width, "") for its in (first, second)]),
    )


def _widen(matrix: np.ndarray, width: int, fill: object) -> np.ndarray:
    """Return a matrix with as many columns as ``width``; the new ones hold ``fill``."""
    wide = np.full((len(matrix), width), fill, matrix.dtype)
    wide[:, : matrix.shape[1]] = matrix
    return wide


def _place_of(checkpoint: Checkpoint, table: int) -> str:
    """Return a file that holds rows of a table, for messages."""
    parts = checkpoint.parts.of_table(table)
    files = checkpoint.blocks.file[parts.start : parts.stop]
    held = files[files >= 0]
    strips = checkpoint.strips.file[np.isin(checkpoint.strips.part, parts)]
    found = [*held.tolist(), *strips.tolist()]
    return checkpoint.directory.describe(checkpoint.files[found[0]].name) if found else checkpoint.directory.url

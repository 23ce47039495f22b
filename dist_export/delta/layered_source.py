"""A delta package and its base as one source: the tables of the delta, with the parts of both.

An id may be in a part of both; :mod:`dist_export.delta.replaced_rows` says which row of the base is left out. A table that is
row-indexed in the base has no ids. Its rows are read as the base has them, with those of the delta on top.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import xxhash

from dist_export.checkpoint.metadata import (
    ABSENT,
    Blocks,
    Checkpoint,
    CheckpointReader,
    Parts,
    SourceFile,
    TableMeta,
)
from dist_export.checkpoint.package_source import PackageSource, has_row_indexed
from dist_export.checkpoint.recis.reader import RecisReader
from dist_export.delta.layered_directory import LayeredDirectory, MadeFile, name_in_base
from dist_export.delta.overlaid_rows import OverlaidRows, list_runs
from dist_export.errors import CheckpointError, PackageError
from dist_export.formats.recis import EMBEDDING_SLOT
from dist_export.manifest import TableEntry
from dist_export.package.reader import Package

OF_DELTA, OF_BASE = 0, 1
"""Values of ``Parts.layer``."""

_COLUMNS = ("begin", "end", "size", "rows", "first_row", "layer")


class LayeredShare(NamedTuple):
    """What one rank found in the headers of its share of the files."""

    delta: Any
    base: Any


class _Rows(NamedTuple):
    """The parts of one table."""

    columns: Mapping[str, np.ndarray]
    """int64, (n,), by the names of ``_COLUMNS``."""
    file: np.ndarray
    offset: np.ndarray
    key: np.ndarray
    """(n, slots of the table)."""


class LayeredReader:
    """Reads both packages. See :class:`~dist_export.checkpoint.metadata.CheckpointReader`."""

    def __init__(self, package: Package) -> None:
        """``package`` is a delta that is open with its base. CheckpointError if one cannot be read."""
        assert package.base is not None
        self._package, self._base = package, package.base
        self._readers = _open(package), _open(package.base)
        self._border = len(self._readers[0].files)
        in_base = [replace(file, name=name_in_base(file.name)) for file in self._readers[1].files]
        self.files: tuple[SourceFile, ...] = (*self._readers[0].files, *in_base)

    def read_headers(self, files: range) -> LayeredShare:
        """Read the headers of these files. CheckpointError where one is damaged."""
        mine = range(min(files.start, self._border), min(files.stop, self._border))
        others = range(max(files.start - self._border, 0), max(files.stop - self._border, 0))
        return LayeredShare(self._readers[0].read_headers(mine), self._readers[1].read_headers(others))

    def assemble(self, shares: Sequence[LayeredShare]) -> Checkpoint:
        """Put the tables together. CheckpointError if the shards are not what the manifests say."""
        delta = self._readers[0].assemble([share.delta for share in shares])
        base = self._readers[1].assemble([share.base for share in shares])
        try:
            return _Join(self._package, self.files, self._border, delta, base).join()
        except PackageError as error:
            raise CheckpointError(str(error)) from error


class _Join:
    """Puts the tables of two checkpoints together."""

    def __init__(
        self, package: Package, files: tuple[SourceFile, ...], border: int, delta: Checkpoint, base: Checkpoint
    ) -> None:
        assert package.base is not None
        self._package, self._base_package = package, package.base
        self._files = list(files)
        self._border = border
        self._delta, self._base = delta, base
        self._numbers = [{table.name: place for place, table in enumerate(its.tables)} for its in (delta, base)]
        self._made: dict[str, MadeFile] = {}

    def join(self) -> Checkpoint:
        """Return the checkpoint."""
        entries = self._package.manifest.tables
        tables, rows = zip(*(self._join_table(entry) for entry in entries), strict=True) if entries else ((), ())
        width = max((its.file.shape[1] for its in rows), default=1)
        digests = f"{self._package.manifest.digest} {self._base_package.manifest.digest}"
        return Checkpoint(
            format="package",
            directory=LayeredDirectory(self._package.directory, self._base_package.directory, self._made),
            files=tuple(self._files),
            tables=tuple(tables),
            parts=Parts(
                table=np.repeat(np.arange(len(rows)), [len(its.file) for its in rows]),
                **{
                    name: np.concatenate([[], *(its.columns[name] for its in rows)]).astype(np.int64)
                    for name in _COLUMNS
                },
            ),
            blocks=Blocks(
                file=_stack([its.file for its in rows], width, ABSENT, np.int32),
                offset=_stack([its.offset for its in rows], width, 0, np.int64),
                key=_stack([its.key for its in rows], width, "", object),
            ),
            dense=self._delta.dense,  # those of the base are of an earlier state
            fingerprint=f"xxh3:{xxhash.xxh3_128_hexdigest(digests.encode())}",
            copy_hindrances=("it is a delta package with its base, of which new shards are written",),
            verbatim={},
            warnings=(),
        )

    def _join_table(self, entry: TableEntry) -> tuple[TableMeta, _Rows]:
        own, below = (numbers.get(entry.name) for numbers in self._numbers)
        if own is None:
            raise CheckpointError(
                f"{self._package.directory.url}: its index has no table {entry.name!r}, which its manifest.json names; run verify"
            )
        meta = self._delta.tables[own]
        rows = self._take(self._delta, own, meta, OF_DELTA)
        if below is None:
            return meta, rows
        if not self._base.tables[below].is_hashed:
            meta = replace(self._base.tables[below], default_row=meta.default_row)
            rows = self._take(self._base, below, meta, OF_BASE)
            return meta, self._lay_over(entry, meta, rows) if entry.rows_out else rows
        both = _concatenate(rows, self._take(self._base, below, meta, OF_BASE))
        # as in every checkpoint, by the slice
        return meta, _sort(both, np.lexsort([both.columns[name] for name in ("layer", "size", "end", "begin")]))

    def _take(self, checkpoint: Checkpoint, number: int, meta: TableMeta, layer: int) -> _Rows:
        """Return the parts of a table, with its blocks in the order of the slots of ``meta``. CheckpointError."""
        slots = {slot.name: slot for slot in checkpoint.tables[number].slots}
        for slot in meta.slots:
            if slot.name not in slots or slots[slot.name].row_bytes != slot.row_bytes:
                raise CheckpointError(
                    f"{self._base_package.directory.url}: slot {slot.name!r} of table {meta.name!r} is not that of the delta "
                    f"{self._package.directory.url}; run verify on both"
                )
        parts, columns = checkpoint.parts, [slots[slot.name].column for slot in meta.slots]
        its = parts.of_table(number)
        mine = slice(its.start, its.stop)
        first_row = np.zeros(len(its), np.int64) if parts.first_row is None else parts.first_row[mine]
        found = {name: getattr(parts, name)[mine] for name in ("begin", "end", "size", "rows")}
        file = checkpoint.blocks.file[mine][:, columns]
        return _Rows(
            {**found, "first_row": first_row, "layer": np.full(len(its), layer)},
            file if layer == OF_DELTA else np.where(file >= 0, file + self._border, file),
            checkpoint.blocks.offset[mine][:, columns],
            checkpoint.blocks.key[mine][:, columns],
        )

    def _lay_over(self, entry: TableEntry, meta: TableMeta, rows: _Rows) -> _Rows:
        """Return the parts of a row-indexed table, whose rows are read with those of the delta on top, and one for new rows."""
        assert entry.delta
        num_base, num_new = int(rows.columns["rows"].sum()), getattr(entry.delta, "new", 0)
        if num_new:
            last = [num_base, num_base + num_new, num_base + num_new, num_new, num_base, OF_BASE]
            added = {name: np.array([value]) for name, value in zip(_COLUMNS, last, strict=True)}
            none = rows.file[:1] * 0 + ABSENT
            key = np.full(none.shape, f"{meta.name} (new rows)", object)
            rows = _concatenate(rows, _Rows(added, none, none.astype(np.int64) * 0, key))
        embedding = next(slot for slot in meta.slots if slot.name == EMBEDDING_SLOT)
        total = num_base + num_new
        name = f"table {meta.name}"
        below, above = self._base_package.rows_of(entry.name), self._package.rows_of(entry.name)
        runs = list_runs(self._base_package.table(entry.name))
        made = functools.partial(
            OverlaidRows, f"{self._package.directory.url}: {name}", below, runs, above, row_bytes=embedding.row_bytes
        )
        version = f"{self._package.manifest.digest} {self._base_package.manifest.digest}"
        self._made[name] = MadeFile(total * embedding.row_bytes, version, made)
        self._files.append(SourceFile(name=name, size=total * embedding.row_bytes, version=version))
        file, offset = rows.file.copy(), rows.offset.copy()
        file[:, embedding.column] = len(self._files) - 1
        offset[:, embedding.column] = rows.columns["first_row"] * embedding.row_bytes
        return rows._replace(columns={**rows.columns, "size": np.full(len(file), total)}, file=file, offset=offset)


def _open(package: Package) -> CheckpointReader[Any]:
    """Open the shards of a package by itself."""
    directory, manifest = package.directory, package.manifest
    return PackageSource(directory, manifest, None if has_row_indexed(manifest) else RecisReader(directory))


def _concatenate(first: _Rows, second: _Rows) -> _Rows:
    columns = {name: np.concatenate([first.columns[name], second.columns[name]]) for name in _COLUMNS}
    return _Rows(columns, *(np.concatenate(pair) for pair in zip(first[1:], second[1:], strict=True)))


def _sort(rows: _Rows, order: np.ndarray) -> _Rows:
    columns = {name: column[order] for name, column in rows.columns.items()}
    return _Rows(columns, rows.file[order], rows.offset[order], rows.key[order])


def _stack(matrices: list[np.ndarray], width: int, fill: Any, dtype: Any) -> np.ndarray:
    """Put matrices below each other, each with ``width`` columns; the columns that one lacks hold ``fill``."""
    wide = [np.full((len(matrix), width), fill, dtype) for matrix in matrices]
    for target, matrix in zip(wide, matrices, strict=True):
        target[:, : matrix.shape[1]] = matrix
    return np.concatenate(wide) if wide else np.full((0, width), fill, dtype)

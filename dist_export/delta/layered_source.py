"""A delta package and all that is below it as one source: the tables of the delta, with the parts of each layer.

An id may be in parts of several; :mod:`dist_export.delta.replaced_rows` says which rows are left out. A table that is row-indexed
in the full package has no ids. Its rows are read as that has them, with those of the deltas on top.
"""

from __future__ import annotations

import functools
import itertools
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
from dist_export.delta.layered_directory import LayeredDirectory, MadeFile, name_in_layer
from dist_export.delta.overlaid_rows import OverlaidRows, list_runs
from dist_export.errors import CheckpointError, PackageError
from dist_export.formats.recis import EMBEDDING_SLOT, ID_SLOT
from dist_export.manifest import TableEntry, count_served
from dist_export.package.reader import Package

OF_DELTA, OF_BASE = 0, 1
"""Values of ``Parts.layer``; 2 is what the base is on top of, and so on."""

_COLUMNS = ("begin", "end", "size", "rows", "first_row", "layer")


class LayeredShare(NamedTuple):
    """What one rank found in the headers of its share of the files."""

    layers: tuple[Any, ...]


class _Rows(NamedTuple):
    """The parts of one table."""

    columns: Mapping[str, np.ndarray]
    """int64, (n,), by the names of ``_COLUMNS``."""
    file: np.ndarray
    offset: np.ndarray
    key: np.ndarray
    """(n, slots of the table)."""


class LayeredReader:
    """Reads all packages. See :class:`~dist_export.checkpoint.metadata.CheckpointReader`."""

    def __init__(self, package: Package) -> None:
        """``package`` is a delta that is open with its base. CheckpointError if one cannot be read."""
        self._package = package
        self._readers = [_open(layer) for layer in package.layers]
        self._borders = np.cumsum([0, *(len(reader.files) for reader in self._readers)]).tolist()
        self.files: tuple[SourceFile, ...] = tuple(
            replace(file, name=name_in_layer(layer, file.name))
            for layer, reader in enumerate(self._readers)
            for file in reader.files
        )

    def read_headers(self, files: range) -> LayeredShare:
        """Read the headers of these files. CheckpointError where one is damaged."""
        shares = []
        for reader, (begin, end) in zip(self._readers, itertools.pairwise(self._borders), strict=True):
            start, stop = (min(max(edge, begin), end) - begin for edge in (files.start, files.stop))
            shares.append(reader.read_headers(range(start, stop)))
        return LayeredShare(tuple(shares))

    def assemble(self, shares: Sequence[LayeredShare]) -> Checkpoint:
        """Put the tables together. CheckpointError if the shards are not what the manifests say."""
        checkpoints = [
            reader.assemble([share.layers[layer] for share in shares]) for layer, reader in enumerate(self._readers)
        ]
        try:
            return _Join(self._package, self.files, self._borders, checkpoints).join()
        except PackageError as error:
            raise CheckpointError(str(error)) from error


class _Join:
    """Puts the tables of the checkpoints of all layers together."""

    def __init__(
        self, package: Package, files: tuple[SourceFile, ...], borders: Sequence[int], checkpoints: Sequence[Checkpoint]
    ) -> None:
        self._package = package
        self._files = list(files)
        self._borders = borders
        self._checkpoints = checkpoints
        self._numbers = [{table.name: place for place, table in enumerate(its.tables)} for its in checkpoints]
        self._made: dict[str, MadeFile] = {}

    def join(self) -> Checkpoint:
        """Return the checkpoint."""
        entries = self._package.manifest.tables
        tables, rows = zip(*(self._join_table(entry) for entry in entries), strict=True) if entries else ((), ())
        width = max((its.file.shape[1] for its in rows), default=1)
        layers = self._package.layers
        return Checkpoint(
            format="package",
            directory=LayeredDirectory([layer.directory for layer in layers], self._made),
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
            dense=self._checkpoints[OF_DELTA].dense,  # those below are of an earlier state
            fingerprint=f"xxh3:{xxhash.xxh3_128_hexdigest(self._version.encode())}",
            copy_hindrances=("it is a delta package with its base, of which new shards are written",),
            verbatim={},
            warnings=(),
        )

    def _join_table(self, entry: TableEntry) -> tuple[TableMeta, _Rows]:
        own = self._numbers[OF_DELTA].get(entry.name)
        if own is None:
            raise CheckpointError(
                f"{self._package.directory.url}: its index has no table {entry.name!r}, which its manifest.json names; run verify"
            )
        meta = self._checkpoints[OF_DELTA].tables[own]
        bottom, last = self._numbers[-1].get(entry.name), len(self._numbers) - 1
        if bottom is not None and not self._checkpoints[last].tables[bottom].is_hashed:
            meta = replace(self._checkpoints[last].tables[bottom], default_row=meta.default_row)
            rows, above = self._take(meta, last), self._list_above(entry.name)
            return meta, self._lay_over(entry, meta, rows, above) if above else rows
        rows = self._take(meta, OF_DELTA)
        below = [layer for layer, numbers in enumerate(self._numbers) if layer and entry.name in numbers]
        for layer in below:
            rows = _concatenate(rows, self._take(meta, layer))
        if not below:
            return meta, rows
        # as in every checkpoint, by the slice
        return meta, _sort(rows, np.lexsort([rows.columns[name] for name in ("layer", "size", "end", "begin")]))

    @property
    def _version(self) -> str:
        """Tells these packages from others."""
        return " ".join(layer.manifest.digest for layer in self._package.layers)

    def _list_above(self, table: str) -> list[Package]:
        """Return the deltas that have rows of a table, the last one first."""
        having = [its for its in self._package.layers[:-1] if any(entry.name == table for entry in its.manifest.tables)]
        return [its for its in having if its.table(table).rows_out]

    def _take(self, meta: TableMeta, layer: int) -> _Rows:
        """Return a layer's parts of a table, with its blocks in the order of the slots of ``meta``. CheckpointError."""
        checkpoint, number = self._checkpoints[layer], self._numbers[layer][meta.name]
        slots = {slot.name: slot for slot in checkpoint.tables[number].slots}
        for slot in meta.slots:
            if slot.name not in slots or slots[slot.name].row_bytes != slot.row_bytes:
                raise CheckpointError(
                    f"{self._package.layers[layer].directory.url}: slot {slot.name!r} of table {meta.name!r} is not that of the "
                    f"delta {self._package.directory.url}; run verify on both"
                )
        parts, columns = checkpoint.parts, [slots[slot.name].column for slot in meta.slots]
        its = parts.of_table(number)
        mine = slice(its.start, its.stop)
        first_row = np.zeros(len(its), np.int64) if parts.first_row is None else parts.first_row[mine]
        found = {name: getattr(parts, name)[mine] for name in ("begin", "end", "size", "rows")}
        file = checkpoint.blocks.file[mine][:, columns]
        return _Rows(
            {**found, "first_row": first_row, "layer": np.full(len(its), layer)},
            np.where(file >= 0, file + self._borders[layer], file),
            checkpoint.blocks.offset[mine][:, columns],
            checkpoint.blocks.key[mine][:, columns],
        )

    def _lay_over(self, entry: TableEntry, meta: TableMeta, rows: _Rows, above: list[Package]) -> _Rows:
        """Return the parts of a row-indexed table, whose rows are read with those of the deltas on top, and one for new rows."""
        num_base, full = int(rows.columns["rows"].sum()), self._package.layers[-1]
        num_new = max(count_served(entry) - num_base, 0)
        if num_new:
            layer = len(self._numbers) - 1
            last = [num_base, num_base + num_new, num_base + num_new, num_new, num_base, layer]
            added = {name: np.array([value]) for name, value in zip(_COLUMNS, last, strict=True)}
            none = rows.file[:1] * 0 + ABSENT
            key = np.full(none.shape, f"{meta.name} (new rows)", object)
            rows = _concatenate(rows, _Rows(added, none, none.astype(np.int64) * 0, key))
        total, runs = num_base + num_new, list_runs(full.table(entry.name))
        file, offset = rows.file.copy(), rows.offset.copy()
        for slot in (its for its in meta.slots if its.name != ID_SLOT):
            name = f"table {meta.name}" if slot.name == EMBEDDING_SLOT else f"table {meta.name}, slot {slot.name}"
            below, *readers = (its.rows_of(entry.name, slot=slot.name) for its in (full, *above))
            where = f"{self._package.directory.url}: {name}"
            made = functools.partial(OverlaidRows, where, below, runs, readers, row_bytes=slot.row_bytes)
            self._made[name] = MadeFile(total * slot.row_bytes, self._version, made)
            self._files.append(SourceFile(name=name, size=total * slot.row_bytes, version=self._version))
            file[:, slot.column] = len(self._files) - 1
            offset[:, slot.column] = rows.columns["first_row"] * slot.row_bytes
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

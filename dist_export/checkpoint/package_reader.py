"""Reader of our own packages that have tables whose rows go by number, for the score that is taken from the written files.

It goes by what a server goes by: hash tables as ``index`` and ``tensorkey.json`` have them, and for the others the merged
manifest, which names their blocks; which rows a block has is told by the order of the parts and the headers. The package's own
``manifest.json`` is not there yet.
"""

from __future__ import annotations

import concurrent.futures
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import msgspec
import numpy as np

from dist_export.checkpoint.metadata import ABSENT, Blocks, Checkpoint, Parts, SlotMeta, SourceFile, TableMeta
from dist_export.checkpoint.recis.assemble import build_parts
from dist_export.checkpoint.recis.header_columns import HeaderColumns, join_columns, to_columns
from dist_export.checkpoint.recis.match_index import match_blocks
from dist_export.errors import CheckpointError
from dist_export.formats.dtypes import DTYPES, I64
from dist_export.formats.recis import EMBEDDING_SLOT, ID_SLOT, INDEX, MERGED, TENSORKEY, MergedEntry, encode_index
from dist_export.formats.recis_index import Indexes, decode_indexes
from dist_export.formats.safetensors import Header, decode_header, header_length
from dist_export.storage.directory import Directory

_PART = re.compile(r"(?P<table>.+)/part_(?P<number>\d{1,9})_(?P<total>\d{1,9})", re.DOTALL)
_REQUESTS_AT_ONCE = 16
_DECODER = msgspec.json.Decoder(dict[str, MergedEntry])


class RowIndexedBlock(NamedTuple):
    """One slot of one part of a table whose rows go by number."""

    table: str
    slot: str
    number: int
    total: int
    """The part and the number of parts, as its key has them."""
    dtype: int
    shape: tuple[int, ...]
    file: int
    offset: int
    key: str


class _RowIndexed(NamedTuple):
    """A table whose rows go by number."""

    table: TableMeta
    columns: tuple[tuple[RowIndexedBlock, ...], ...]
    """By slot after the ids, the blocks of all parts in order."""
    rows: list[int]
    """Of each part."""


class PackageShare(NamedTuple):
    """What one rank read."""

    columns: HeaderColumns
    """Of the blocks that ``index`` names."""
    row_indexed: tuple[RowIndexedBlock, ...]


class PackageReader:
    """Reads one written package. See :class:`~dist_export.checkpoint.metadata.CheckpointReader`."""

    def __init__(
        self, directory: Directory, shards: Sequence[str], slots: Mapping[str, tuple[str, str]] | None = None
    ) -> None:
        """Read the indexes, as far as there are any, and the merged manifest. CheckpointError where they are damaged.

        Args:
            directory: the package.
            shards: the package's files: others may lie beside them.
            slots: by key of a block of a row-indexed table, the table and the slot, as ``manifest.json`` has them. None takes
                the embeddings, which the merged manifest names: it has no other slot.
        """
        self._directory = directory
        self._slots = slots
        self._shards = shards
        try:
            self._read_indexes()
        except OSError as error:
            raise CheckpointError(
                f"{error.filename or directory.url} cannot be read: {error.strerror or error}"
            ) from error

    def _read_indexes(self) -> None:
        directory = self._directory
        names = set(directory.names())
        raw = [
            directory.read_text(name) if name in names else nothing
            for name, nothing in ((INDEX, encode_index({})), (TENSORKEY, b"{}"))
        ]
        indexes = decode_indexes(*raw, where=directory.url.rstrip("/"))
        files = dict.fromkeys((*indexes.files, *self._shards))
        self._index: Indexes = replace(indexes, files=tuple(files))
        try:
            merged = _DECODER.decode(directory.read_text(MERGED))
        except msgspec.MsgspecError as error:
            raise CheckpointError(
                f"{directory.describe(MERGED)} is not what was written: {error}"
                ". Copy the package again, or export it anew"
            ) from None
        embeddings = (key for key, entry in merged.items() if not entry.dense and entry.is_hashmap is False)
        self._row_indexed = dict.fromkeys(embeddings, ("", EMBEDDING_SLOT)) | dict(self._slots or {})
        self.files: tuple[SourceFile, ...] = tuple(self._stat(name) for name in self._index.files)

    def read_headers(self, files: range) -> PackageShare:
        """Read the headers of these files; which of their blocks are whose, ``index`` and the merged manifest say."""
        if self._directory.is_local:
            headers = [self._read_header(number) for number in files]
        else:
            with concurrent.futures.ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
                headers = list(pool.map(self._read_header, files))
        columns, row_indexed = [], []
        for number, header in zip(files, headers, strict=True):
            positions = [self._index.place_of_key.get(key, -1) for key in header.keys]
            known = [row for row, place in enumerate(positions) if place >= 0]
            columns.append(
                to_columns(
                    _take(header, known), file=number, place=np.array([positions[row] for row in known], np.int32)
                )
            )
            row_indexed += [
                self._to_block(number, header, row)
                for row, key in enumerate(header.keys)
                if positions[row] < 0 and key in self._row_indexed
            ]
        return PackageShare(join_columns(columns), tuple(row_indexed))

    def assemble(self, shares: Sequence[PackageShare]) -> Checkpoint:
        """Put hash tables and numbered ones together. CheckpointError where a block or a part is missing."""
        headers = join_columns([share.columns for share in shares])
        where = tuple(self._directory.describe(file.name) for file in self.files)
        matched = match_blocks(headers, self._index, where=where, tensorkey=self._directory.describe(TENSORKEY))
        tables, parts, blocks = build_parts(matched.sparse)
        by_table: dict[str, list[RowIndexedBlock]] = {}
        for block in (block for share in shares for block in share.row_indexed):
            by_table.setdefault(block.table, []).append(block)
        row_indexed = [self._build_table(name, by_table[name]) for name in sorted(by_table)]
        return Checkpoint(
            format="package",
            directory=self._directory,
            files=self.files,
            tables=(*tables, *(its.table for its in row_indexed)),
            parts=_join_parts(parts, len(tables), [its.rows for its in row_indexed]),
            blocks=_join_blocks(blocks, [its.columns for its in row_indexed]),
            dense=matched.dense,
            fingerprint="",
            copy_hindrances=(),
            verbatim={},
            warnings=(),
        )

    def _stat(self, name: str) -> SourceFile:
        return SourceFile.of(name, self._directory.stat(name))

    def _read_header(self, number: int) -> Header:
        file = self.files[number]
        where = self._directory.describe(file.name)
        try:
            with self._directory.open_reader(file.name) as reader:
                prefix = bytearray(min(8, file.size))
                reader.read_into(memoryview(prefix), 0)
                raw = reader.read_text(8, header_length(bytes(prefix), path=where, file_size=file.size))
        except OSError as error:
            raise CheckpointError(f"{where} cannot be read: {error.strerror or error}") from error
        return decode_header(raw, path=where, file_size=file.size)

    def _to_block(self, number: int, header: Header, row: int) -> RowIndexedBlock:
        found, shape = _PART.fullmatch(header.keys[row]), header.shape(row)
        if found is None or not shape:
            raise CheckpointError(
                f"{self._directory.describe(self.files[number].name)}: block {header.keys[row]!r} is no part of a table"
                ". Copy the package again, or export it anew"
            )
        table, slot = self._row_indexed[header.keys[row]]
        return RowIndexedBlock(
            table=table or found["table"],
            slot=slot,
            number=int(found["number"]),
            total=int(found["total"]),
            dtype=int(header.dtypes[row]),
            shape=shape,
            file=number,
            offset=int(header.begins[row]),
            key=header.keys[row],
        )

    def _build_table(self, name: str, blocks: list[RowIndexedBlock]) -> _RowIndexed:
        """Put the parts of a table together. CheckpointError where one is missing, or they are not of one kind."""
        by_slot: dict[str, list[RowIndexedBlock]] = {EMBEDDING_SLOT: []}
        for block in sorted(blocks, key=lambda block: block.number):
            by_slot.setdefault(block.slot, []).append(block)
        first = blocks[0]
        rows = [block.shape[0] for block in by_slot[EMBEDDING_SLOT]]
        for slot, its in by_slot.items():
            is_whole = [block.number for block in its] == list(range(first.total))
            kinds = {(block.total, block.dtype, block.shape[1:]) for block in its}
            which = "" if slot == EMBEDDING_SLOT else f", slot {slot!r}"
            if not is_whole or len(kinds) > 1 or [block.shape[0] for block in its] != rows:
                raise CheckpointError(
                    f"{self._directory.url}: the shards hold parts {', '.join(str(block.number) for block in its[:8])} of "
                    f"{first.total} of table {name!r}{which}, or parts of several kinds"
                    ". Copy the package again, or export it anew"
                )
        slots = [SlotMeta(name=ID_SLOT, dtype=I64, inner_shape=(), row_bytes=8, column=0)]
        for column, (slot, its) in enumerate(by_slot.items(), 1):
            inner, dtype = its[0].shape[1:], its[0].dtype
            row_bytes = math.prod(inner) * DTYPES[dtype].itemsize
            slots.append(SlotMeta(name=slot, dtype=dtype, inner_shape=inner, row_bytes=row_bytes, column=column))
        table = TableMeta(name=name, slots=tuple(slots), is_hashed=False, has_ids=False)
        return _RowIndexed(table, tuple(map(tuple, by_slot.values())), rows)


def _take(header: Header, rows: list[int]) -> Header:
    """Return some entries of a header."""
    return replace(
        header,
        keys=tuple(header.keys[row] for row in rows),
        **{name: getattr(header, name)[rows] for name in ("dtypes", "rows", "inner", "begins", "ends")},
    )


def _join_parts(parts: Parts, num_tables: int, row_indexed: list[list[int]]) -> Parts:
    """Put the parts of numbered tables, given by their rows, behind those of ``num_tables`` hash tables."""
    columns = [np.stack([parts.table, parts.begin, parts.end, parts.size, parts.rows, np.zeros_like(parts.table)])]
    for table, its in enumerate(row_indexed, num_tables):
        rows = np.array(its, np.int64)
        end = np.cumsum(rows)
        size = np.full_like(rows, max(int(end[-1]), 1))
        columns.append(np.stack([np.full_like(rows, table), end - rows, end, size, rows, end - rows]))
    table_column, begin, end, size, rows, first_row = np.concatenate(columns, axis=1)
    return Parts(table=table_column, begin=begin, end=end, size=size, rows=rows, first_row=first_row)


def _join_blocks(blocks: Blocks, row_indexed: list[tuple[tuple[RowIndexedBlock, ...], ...]]) -> Blocks:
    """Put the blocks of numbered tables, by slot after the ids, behind those of hash tables."""
    num_parts, num_slots = blocks.file.shape
    place = num_parts
    shape = (
        num_parts + sum(len(columns[0]) for columns in row_indexed),
        max([num_slots, *(1 + len(columns) for columns in row_indexed)]),
    )
    file = np.full(shape, ABSENT, np.int32)
    offset = np.zeros(shape, np.int64)
    key = np.full(shape, None, object)
    file[:num_parts, :num_slots], offset[:num_parts, :num_slots] = blocks.file, blocks.offset
    key[:num_parts, :num_slots] = blocks.key
    for columns in row_indexed:
        rows = slice(place, place + len(columns[0]))
        for column, its in enumerate(columns, 1):
            file[rows, column] = [block.file for block in its]
            offset[rows, column] = [block.offset for block in its]
            key[rows, column] = [block.key for block in its]
        place = rows.stop
    return Blocks(file=file, offset=offset, key=key)

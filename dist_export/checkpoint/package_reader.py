"""Reader of our own packages that have tables whose rows go by number, for the score that is taken from the written files.

It goes by what a server goes by: hash tables as ``index`` and ``tensorkey.json`` have them, and for the others the merged
manifest, which names their blocks; which rows a block has is told by the order of the parts and the headers. The package's own
``manifest.json`` is not there yet.
"""

from __future__ import annotations

import concurrent.futures
import math
import re
from collections.abc import Sequence
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
    """The embeddings of one part of a table whose rows go by number."""

    table: str
    number: int
    total: int
    """The part and the number of parts, as its key has them."""
    dtype: int
    shape: tuple[int, ...]
    file: int
    offset: int


class PackageShare(NamedTuple):
    """What one rank read."""

    columns: HeaderColumns
    """Of the blocks that ``index`` names."""
    row_indexed: tuple[RowIndexedBlock, ...]


class PackageReader:
    """Reads one written package. See :class:`~dist_export.checkpoint.metadata.CheckpointReader`."""

    def __init__(self, directory: Directory, shards: Sequence[str]) -> None:
        """Read the indexes, as far as there are any, and the merged manifest. CheckpointError where they are damaged.

        ``shards`` are the package's files: others may lie beside them.
        """
        self._directory = directory
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
        self._row_indexed = frozenset(
            key for key, entry in merged.items() if not entry.dense and entry.is_hashmap is False
        )
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
        for block in sorted(block for share in shares for block in share.row_indexed):
            by_table.setdefault(block.table, []).append(block)
        row_indexed = [self._build_table(name, its) for name, its in by_table.items()]
        return Checkpoint(
            format="package",
            directory=self._directory,
            files=self.files,
            tables=(*tables, *(table for table, _ in row_indexed)),
            parts=_join_parts(parts, len(tables), [its for _, its in row_indexed]),
            blocks=_join_blocks(blocks, [block for _, its in row_indexed for block in its]),
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
        return RowIndexedBlock(
            table=found["table"],
            number=int(found["number"]),
            total=int(found["total"]),
            dtype=int(header.dtypes[row]),
            shape=shape,
            file=number,
            offset=int(header.begins[row]),
        )

    def _build_table(self, name: str, blocks: list[RowIndexedBlock]) -> tuple[TableMeta, list[RowIndexedBlock]]:
        first = blocks[0]
        is_whole = [block.number for block in blocks] == list(range(first.total))
        if not is_whole or any(
            (b.total, b.dtype, b.shape[1:]) != (first.total, first.dtype, first.shape[1:]) for b in blocks
        ):
            raise CheckpointError(
                f"{self._directory.url}: the shards hold parts {', '.join(str(block.number) for block in blocks[:8])} of "
                f"{first.total} of table {name!r}, or parts of several kinds"
                ". Copy the package again, or export it anew"
            )
        row_bytes = math.prod(first.shape[1:]) * DTYPES[first.dtype].itemsize
        embedding = SlotMeta(
            name=EMBEDDING_SLOT, dtype=first.dtype, inner_shape=first.shape[1:], row_bytes=row_bytes, column=1
        )
        ids = SlotMeta(name=ID_SLOT, dtype=I64, inner_shape=(), row_bytes=8, column=0)
        return TableMeta(name=name, slots=(ids, embedding), is_hashed=False, has_ids=False), blocks


def _take(header: Header, rows: list[int]) -> Header:
    """Return some entries of a header."""
    return replace(
        header,
        keys=tuple(header.keys[row] for row in rows),
        **{name: getattr(header, name)[rows] for name in ("dtypes", "rows", "inner", "begins", "ends")},
    )


def _join_parts(parts: Parts, num_tables: int, row_indexed: list[list[RowIndexedBlock]]) -> Parts:
    """Put the parts of numbered tables behind those of ``num_tables`` hash tables."""
    columns = [np.stack([parts.table, parts.begin, parts.end, parts.size, parts.rows, np.zeros_like(parts.table)])]
    for table, blocks in enumerate(row_indexed, num_tables):
        rows = np.array([block.shape[0] for block in blocks], np.int64)
        end = np.cumsum(rows)
        size = np.full_like(rows, max(int(end[-1]), 1))
        columns.append(np.stack([np.full_like(rows, table), end - rows, end, size, rows, end - rows]))
    table_column, begin, end, size, rows, first_row = np.concatenate(columns, axis=1)
    return Parts(table=table_column, begin=begin, end=end, size=size, rows=rows, first_row=first_row)


def _join_blocks(blocks: Blocks, row_indexed: list[RowIndexedBlock]) -> Blocks:
    """Put the blocks of numbered tables, two slots each, behind those of hash tables."""
    num_parts, num_slots = blocks.file.shape
    shape = (num_parts + len(row_indexed), max(num_slots, 2))
    file = np.full(shape, ABSENT, np.int32)
    offset = np.zeros(shape, np.int64)
    key = np.full(shape, None, object)
    file[:num_parts, :num_slots], offset[:num_parts, :num_slots] = blocks.file, blocks.offset
    key[:num_parts, :num_slots] = blocks.key
    file[num_parts:, 1] = [block.file for block in row_indexed]
    offset[num_parts:, 1] = [block.offset for block in row_indexed]
    key[num_parts:, 1] = [f"{block.table}/part_{block.number}_{block.total}" for block in row_indexed]
    return Blocks(file=file, offset=offset, key=key)

"""The model in memory as a source: what the ranks hold becomes tables, parts and blocks, as if it had been saved.

A tensor of a rank stands for a file. Of replicas each rank gets a run of the rows to write, once they are shown to be equal.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import msgspec
import numpy as np
import xxhash
from torch import nn

from dist_export.checkpoint.metadata import (
    ABSENT,
    IN_STRIPS,
    Blocks,
    Checkpoint,
    Parts,
    SlotMeta,
    SourceFile,
    Strips,
    TableMeta,
    no_strips,
)
from dist_export.checkpoint.payload import Payload
from dist_export.errors import CheckpointError
from dist_export.formats.dtypes import DTYPES, I64
from dist_export.formats.recis import EMBEDDING_SLOT, ID_SLOT
from dist_export.live.discover import LiveShard, find_live_tables, key_of
from dist_export.live.memory import MemoryFile, ModelMemory, RowSource
from dist_export.runtime.io_activity import ACTIVITY
from dist_export.runtime.ranks import Ranks
from dist_export.storage.directory import Directory, Location

LIVE = "live"
"""The format's name, in settings and manifest."""

_HASH_BYTES = 4 << 20


class ModelPlace(Directory):
    """Stands where a checkpoint's directory stands in messages; there is nothing to open in it."""

    def __init__(self) -> None:
        super().__init__(Location("the live model", path=""))

    def describe(self, name: str) -> str:
        """Return what a message calls a "file"."""
        return f"{self.url}, {name}"


def open_live(ranks: Ranks, sparse_arch: nn.Module, *, sparse_model_name: str) -> Checkpoint:
    """Describe the tables that the ranks hold in memory. All ranks; reads replicas, to compare them, and nothing else.

    Raises:
        ModelError: a table that cannot be read as it is.
        CheckpointError: no table; ranks that contradict each other; rows that no rank holds; replicas that differ.
    """
    tables = ranks.run(
        "look for the model's tables",
        lambda: find_live_tables(
            sparse_arch, sparse_model_name=sparse_model_name, rank=ranks.rank, world_size=ranks.world_size
        ),
        may_block=True,
    )
    held = ranks.all_gather("tell what each rank holds", lambda: tables.shards)
    digests = ranks.all_gather("read the replicas", lambda: _hash_replicas(held, tables.sources))
    ranks.run("compare the replicas", lambda: _refuse_different(digests))
    return ranks.run("put the tables together", lambda: assemble(held, tables.sources, ranks.rank))


def assemble(held: Sequence[Sequence[LiveShard]], sources: Mapping[Hashable, RowSource], rank: int) -> Checkpoint:
    """Build the metadata from what all ranks hold, in rank order; ``sources`` are those of ``rank``. Pure but for these.

    Raises:
        CheckpointError: as :func:`open_live`.
    """
    by_table: dict[str, list[tuple[int, LiveShard]]] = {}
    for owner, shards in enumerate(held):
        for shard in shards:
            by_table.setdefault(shard.table, []).append((owner, shard))
    if not by_table:
        raise CheckpointError(
            "no rank's sparse arch holds a table; a table is a module with ids() and embeddings(), an nn.Embedding or "
            "nn.EmbeddingBag, or one in a torchrec collection. sparse_model_name is the path of the sparse arch in the model"
        )
    builder = _Builder()
    for name, its in by_table.items():
        first_owner, first = its[0]
        for owner, shard in its:
            if (shard.is_hashed, shard.dtype, shard.shape) != (first.is_hashed, first.dtype, first.shape):
                raise CheckpointError(
                    f"table {name!r} is {DTYPES[first.dtype].torch} {list(first.shape)} on rank {first_owner} and "
                    f"{DTYPES[shard.dtype].torch} {list(shard.shape)} on rank {owner}"
                )
        builder.add_hash_table(name, its) if first.is_hashed else builder.add_rows(name, its)
    return builder.build(sources, rank, len(held))


class _Piece(NamedTuple):
    """Rows ``begin`` to ``end`` of some columns of a table, which one rank is to write."""

    owner: int
    shard: LiveShard
    begin: int
    end: int


class _Builder:
    """Collects files, tables, parts and blocks; table by table."""

    def __init__(self) -> None:
        self._files: list[MemoryFile] = []
        self._owners: list[int] = []
        self._tables: list[TableMeta] = []
        self._parts: list[tuple[int, int, int, int, int, int]] = []
        self._blocks: list[tuple[tuple[int, int], tuple[int, int], str]] = []
        self._strips: list[tuple[int, int, int, int, int, int, int]] = []

    def add_hash_table(self, name: str, its: list[tuple[int, LiveShard]]) -> None:
        """Take in a hash table: a part for each rank that holds it."""
        shape = its[0][1].shape
        self._tables.append(_describe(name, its[0][1].dtype, shape, is_hashed=True))
        row_bytes = self._tables[-1].slots[1].row_bytes
        for owner, shard in sorted(its, key=lambda item: (item[1].slice, item[0])):
            assert shard.slice is not None
            files = []
            for slot, width in ((ID_SLOT, 8), (EMBEDDING_SLOT, row_bytes)):
                files.append(self._add_file(owner, shard, slot, 0, shard.rows * width))
            self._parts.append((len(self._tables) - 1, *shard.slice, shard.rows, 0))
            self._blocks.append(((files[0], 0), (files[1], 0), f"{name} on rank {owner}"))

    def add_rows(self, name: str, its: list[tuple[int, LiveShard]]) -> None:
        """Take in a table whose rows go by number: a part for each run of rows that the same ranks hold."""
        num_rows, num_columns = its[0][1].shape
        meta = _describe(name, its[0][1].dtype, (num_columns,), is_hashed=False)
        self._tables.append(meta)
        row_bytes = meta.slots[1].row_bytes
        itemsize = DTYPES[its[0][1].dtype].itemsize
        pieces = [piece for holders in _by_rectangle(its) for piece in _split_among(holders)]
        numbers = {
            piece: self._add_file(
                piece.owner,
                piece.shard,
                EMBEDDING_SLOT,
                (piece.begin - piece.shard.first_row) * piece.shard.columns * itemsize,
                (piece.end - piece.begin) * piece.shard.columns * itemsize,
            )
            for piece in pieces
        }
        edges = sorted({0, num_rows, *(p.begin for p in pieces), *(p.end for p in pieces)})
        runs = list(itertools.pairwise(edges)) or [(0, 0)]
        for begin, end in runs:
            over = sorted(
                (p for p in pieces if p.begin <= begin and end <= p.end and (p.begin < p.end or begin == end)),
                key=lambda p: (p.shard.first_column, p.owner),
            )
            _refuse_gaps(name, begin, end, num_columns, over)
            over = over if begin < end else over[:1]
            self._parts.append((len(self._tables) - 1, begin, end, max(num_rows, 1), end - begin, begin))
            where = [(numbers[p], (begin - p.begin) * p.shard.columns * itemsize, p.shard) for p in over]
            if len(where) == 1:
                self._blocks.append(((ABSENT, 0), where[0][:2], f"{name} rows {begin}:{end}"))
                continue
            part = len(self._blocks)
            self._blocks.append(((ABSENT, 0), (IN_STRIPS, 0), f"{name} rows {begin}:{end}"))
            for number, offset, shard in where:
                width = shard.columns * itemsize
                self._strips.append((part, 1, shard.first_column * itemsize, width, width, number, offset))
        assert row_bytes == num_columns * itemsize

    def build(self, sources: Mapping[Hashable, RowSource], rank: int, world_size: int) -> Checkpoint:
        """Return the metadata of all tables."""
        columns = np.array(self._parts, np.int64).reshape(-1, 6).T
        table, begin, end, size, rows, first_row = (column.copy() for column in columns)
        parts = Parts(table=table, begin=begin, end=end, size=size, rows=rows, first_row=first_row)
        blocks = Blocks(
            file=np.array([[ids[0], embedding[0]] for ids, embedding, _ in self._blocks], np.int32),
            offset=np.array([[ids[1], embedding[1]] for ids, embedding, _ in self._blocks], np.int64),
            key=np.array([[name, name] for _, _, name in self._blocks], object),
        )
        strips = no_strips()
        if self._strips:
            names = ("part", "column", "first_byte", "width", "row_stride", "file", "offset")
            strips = Strips(**dict(zip(names, np.array(sorted(self._strips), np.int64).T, strict=True)))
        told = [self._tables, columns.tolist(), blocks.file.tolist(), self._owners, [file.name for file in self._files]]
        return Checkpoint(
            format=LIVE,
            directory=ModelPlace(),
            files=tuple(SourceFile(name=file.name, size=file.num_bytes, version="") for file in self._files),
            tables=tuple(self._tables),
            parts=parts,
            blocks=blocks,
            dense=(),
            fingerprint=f"xxh3:{xxhash.xxh3_128_hexdigest(msgspec.json.encode(told))}",
            copy_hindrances=("its tables are in memory",),
            verbatim={},
            warnings=(),
            strips=strips,
            payload=Payload(
                tensors=sum(len(table.stored_slots()) for table in self._tables),
                num_bytes=sum(file.num_bytes for file in self._files),
            ),
            memory=ModelMemory(rank, world_size, np.array(self._owners, np.int64), self._files, sources),
        )

    def _add_file(self, owner: int, shard: LiveShard, slot: str, offset: int, num_bytes: int) -> int:
        name = f"{slot} of {shard.table} on rank {owner}"
        self._files.append(MemoryFile(key_of(shard, slot), offset, num_bytes, f"the live model, {name}"))
        self._owners.append(owner)
        return len(self._files) - 1


def _describe(name: str, dtype: int, inner_shape: tuple[int, ...], *, is_hashed: bool) -> TableMeta:
    row_bytes = int(np.prod(inner_shape, dtype=np.int64)) * DTYPES[dtype].itemsize
    return TableMeta(
        name=name,
        slots=(
            SlotMeta(name=ID_SLOT, dtype=I64, inner_shape=(), row_bytes=8, column=0),
            SlotMeta(name=EMBEDDING_SLOT, dtype=dtype, inner_shape=inner_shape, row_bytes=row_bytes, column=1),
        ),
        is_hashed=is_hashed,
        has_ids=is_hashed,
    )


def _by_rectangle(its: list[tuple[int, LiveShard]]) -> list[list[tuple[int, LiveShard]]]:
    """Put together the ranks that hold replicas of the same rows and columns."""
    found: dict[tuple[int, int, int, int], list[tuple[int, LiveShard]]] = {}
    for owner, shard in its:
        found.setdefault(shard.rectangle, []).append((owner, shard))
    return [found[rectangle] for rectangle in sorted(found)]


def _split_among(holders: list[tuple[int, LiveShard]]) -> list[_Piece]:
    """Share the rows of a rectangle out evenly over the ranks that hold it; of an empty one the first has none to write."""
    shard = holders[0][1]
    edges = [shard.first_row + shard.rows * number // len(holders) for number in range(len(holders) + 1)]
    pieces = [_Piece(holders[i][0], shard, edges[i], edges[i + 1]) for i in range(len(holders))]
    return [piece for piece in pieces if piece.begin < piece.end] or pieces[:1]


def _refuse_gaps(name: str, begin: int, end: int, num_columns: int, over: list[_Piece]) -> None:
    covered = 0
    for piece in over if begin < end else ():
        if piece.shard.first_column != covered:
            what = "no rank holds" if piece.shard.first_column > covered else "several ranks hold different shards of"
            raise CheckpointError(
                f"table {name!r}: {what} rows {begin:,}:{end:,} of column {min(covered, piece.shard.first_column)}"
            )
        covered += piece.shard.columns
    if begin < end and covered != num_columns:
        raise CheckpointError(f"table {name!r}: no rank holds rows {begin:,}:{end:,} of column {covered}")


def _hash_replicas(held: Sequence[Sequence[LiveShard]], sources: Mapping[Hashable, RowSource]) -> dict[str, str]:
    """Return the digest of each shard of this rank that others hold too, by its name in messages."""
    count: dict[Hashable, int] = {}
    shards: dict[Hashable, LiveShard] = {}
    for shard in itertools.chain.from_iterable(held):
        key = key_of(shard, EMBEDDING_SLOT)
        count[key] = count.get(key, 0) + (not shard.is_hashed)
        shards[key] = shard
    found = {}
    for key, shard in shards.items():
        if count[key] > 1 and key in sources:
            first_row, first_column, rows, columns = shard.rectangle
            where = f"{shard.table!r} (rows {first_row:,}:{first_row + rows:,}, columns {first_column}:{first_column + columns})"
            found[where] = _hash(sources[key])
    return found


def _hash(source: RowSource) -> str:
    hasher = xxhash.xxh3_128()
    buffer = memoryview(bytearray(min(_HASH_BYTES, source.num_bytes)))
    for first in range(0, source.num_bytes, _HASH_BYTES):
        piece = buffer[: min(_HASH_BYTES, source.num_bytes - first)]
        source.read_into(piece, first)
        hasher.update(piece)
        ACTIVITY.done += 1  # so that the watchdog sees a large table get on
    return hasher.hexdigest()


def _refuse_different(digests: Sequence[Mapping[str, str]]) -> None:
    first: dict[str, tuple[int, str]] = {}
    for rank, found in enumerate(digests):
        for where, digest in found.items():
            other, expected = first.setdefault(where, (rank, digest))
            if digest != expected:
                raise CheckpointError(
                    f"table {where}: its replicas on ranks {other} and {rank} differ, so training has not kept them in step; "
                    "broadcast the one that is right, or export a checkpoint of one rank"
                )

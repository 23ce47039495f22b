"""Reader of DCP checkpoints (``torch.distributed.checkpoint``): tables of torchrec and of plain torch, whose rows go by number.

Source: directories that torchrec and torch write, also through FSDP and DTensor. The parts of a table are the ranges of
rows that lie in the same chunks of its weight and of its slots; where a chunk holds whole rows, one behind the other, the
part is a range of bytes of its file, else its rows are put together from strips.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import msgspec
import numpy as np
import xxhash

from dist_export.checkpoint.dcp import ChunkFinder, DcpCheckpoint, DcpSlot, DcpTable, read_dcp
from dist_export.checkpoint.dcp_metadata import Chunk, TensorMeta
from dist_export.checkpoint.dynamicemb import find_dumps
from dist_export.checkpoint.reader import (
    ABSENT,
    IN_STRIPS,
    Blocks,
    Checkpoint,
    Parts,
    SlotMeta,
    SourceFile,
    Strips,
    TableMeta,
)
from dist_export.errors import CheckpointError, UnaskedError
from dist_export.layout.dtypes import CODE_BY_TORCH, DTYPES, I64
from dist_export.layout.recis import EMBEDDING_SLOT, ID_SLOT
from dist_export.readers import OpenReaders
from dist_export.storage import Directory

_ID = SlotMeta(name=ID_SLOT, dtype=I64, inner_shape=(), row_bytes=8, column=0)
_SHOWN = 8
_MAX_STRIPS = 1 << 22
"""Of a checkpoint, at 56 bytes each: the columns of transposed pieces, or somebody's joke."""


class ItemShare(NamedTuple):
    """What one rank found: where items lie in their files."""

    items: np.ndarray
    """int64 (4, n): the item, as ``DcpReader`` counts them; position of its first element; bytes from row to row and from
    column to column."""
    metadata_digest: bytes
    """Of the metadata by which the items are counted."""


class _Piece(NamedTuple):
    """A chunk of a matrix, and where its elements lie."""

    first_row: int
    num_rows: int
    first_column: int
    num_columns: int
    file: int
    offset: int
    row_stride: int
    column_stride: int


class DcpReader:
    """Reads one DCP checkpoint. See :class:`~dist_export.checkpoint.reader.CheckpointReader`."""

    def __init__(
        self, directory: Directory, *, tables: Sequence[str] = (), optimizer_slots: Sequence[str] = ()
    ) -> None:
        """Read the metadata. Arguments as those of :func:`~dist_export.checkpoint.dcp.read_dcp`.

        Raises:
            CheckpointError: the checkpoint is not complete, or no tensor of it is a table.
        """
        self.directory = directory
        self._found = read_dcp(directory, tables=tables, optimizer_slots=optimizer_slots)
        if not self._found.tables:
            raise UnaskedError(_no_tables(self._found))
        self._optimizer_slots = frozenset(optimizer_slots)
        self.files: tuple[SourceFile, ...] = tuple(
            SourceFile(name=name, size=size, version=self._found.versions[name])
            for name, size in self._found.files.items()
        )
        self._number_of = {file.name: number for number, file in enumerate(self.files)}
        self._items: list[tuple[TensorMeta, Chunk]] = [
            (tensor, chunk)
            for table in self._found.tables
            for tensor in (table.weight, *(slot.tensor for slot in table.slots if _can_be_kept(slot)))
            for chunk in tensor.chunks
            if math.prod(chunk.sizes)
        ]

    def read_headers(self, files: range) -> ItemShare:
        """Find the items of tables and of slots that fit their table, in these files. Reads no payload."""
        places = [self._number_of[chunk.file] for _, chunk in self._items]
        mine = [number for number, file in enumerate(places) if file in files]
        mine.sort(key=lambda number: (places[number], self._items[number][1].begin))
        items = np.zeros((4, len(mine)), np.int64)
        finder = ChunkFinder(self.directory)
        with OpenReaders(lambda number: self.directory.open_reader(self.files[number].name)) as readers:
            for column, number in enumerate(mine):
                tensor, chunk = self._items[number]
                try:
                    reader = readers[places[number]]
                except OSError as error:
                    where = self.directory.describe(chunk.file)
                    raise CheckpointError(f"{where} cannot be read: {error.strerror or error}") from None
                item = finder.locate(reader, tensor, chunk)
                items[:, column] = number, item.offset, *(*item.strides, 0)[:2]
        return ItemShare(items, self._digest())

    def assemble(self, shares: Sequence[ItemShare]) -> Checkpoint:
        """Cut the tables into parts, and say where the rows of each lie."""
        if any(share.metadata_digest != self._digest() for share in shares):
            raise CheckpointError(
                f"{self.directory.url}: .metadata is not the same on all ranks; it must be one shared directory whose "
                "files no longer change"
            )
        items = np.concatenate([np.zeros((4, 0), np.int64), *(share.items for share in shares)], axis=1)
        items = items[:, np.argsort(items[0])]
        pieces: dict[str, list[_Piece]] = {}
        for (tensor, chunk), (_, *place) in zip(self._items, items.T.tolist(), strict=True):
            first_column, num_columns = (*chunk.offsets[1:], 0)[0], (*chunk.sizes[1:], 1)[0]
            piece = _Piece(
                chunk.offsets[0], chunk.sizes[0], first_column, num_columns, self._number_of[chunk.file], *place
            )
            pieces.setdefault(tensor.name, []).append(piece)
        layout = _Layout(self.directory.url)
        tables = tuple(layout.add(table, pieces) for table in self._found.tables)
        parts, blocks, strips = layout.finish()
        return Checkpoint(
            format="dcp",
            directory=self.directory,
            files=self.files,
            tables=tables,
            parts=parts,
            blocks=blocks,
            dense=(),
            fingerprint=self._fingerprint(items),
            copy_hindrances=("it is a DCP checkpoint, whose files serving does not read",),
            verbatim={},
            warnings=(*_list_left_out(self._found.tables), *_note_dump(self.directory)),
            strips=strips,
            optimizer_patterns=self._optimizer_slots,
        )

    def _digest(self) -> bytes:
        return b"".join(self._found.metadata.values())

    def _fingerprint(self, items: np.ndarray) -> str:
        hasher = xxhash.xxh3_128(b"dcp")
        for name, digest in self._found.metadata.items():
            hasher.update(name.encode() + digest)
        for file in self.files:
            hasher.update(msgspec.json.encode([file.name, file.size, file.version]))
        hasher.update(np.ascontiguousarray(items).tobytes())
        return f"xxh3:{hasher.hexdigest()}"


class _Layout:
    """Parts, blocks and strips of table after table."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._parts: list[np.ndarray] = []
        self._blocks: list[list[tuple[int, int, str]]] = []
        """By part: (file, offset, key) of each slot."""
        self._strips = [np.zeros((7, 0), np.int64)]
        self._num_strips = 0
        self._num_tables = 0

    def add(self, table: DcpTable, pieces: Mapping[str, list[_Piece]]) -> TableMeta:
        """Cut a table into parts at every row where a chunk begins; return what it is."""
        rows = table.weight.shape[0]
        tensors: list[TensorMeta | None] = [None, table.weight]
        slots = [_ID, _describe(EMBEDDING_SLOT, table.weight, 1, is_optimizer=False)]
        for slot in table.slots:
            if slot.tensor.dtype not in CODE_BY_TORCH:
                continue
            slots.append(_describe(slot.name, slot.tensor, len(slots), is_optimizer=True, fits=slot.fits))
            tensors.append(slot.tensor if slot.fits else None)
        of_slot = [pieces.get(tensor.name, []) if tensor is not None else [] for tensor in tensors]
        edges = np.unique(
            [0, rows, *(edge for p in itertools.chain(*of_slot) for edge in (p.first_row, p.first_row + p.num_rows))]
        )
        begins, ends = (edges[:-1], edges[1:]) if rows else (np.zeros(1, np.int64), np.ones(1, np.int64))
        first_part = len(self._blocks)
        size = max(rows, 1)
        held = ends - begins if rows else np.zeros(1, np.int64)
        self._parts.append(
            np.stack([np.full_like(begins, self._num_tables), begins, ends, np.full_like(begins, size), held])
        )
        self._num_tables += 1
        self._blocks += [[(ABSENT, 0, "")] for _ in begins]
        for slot_meta, tensor, found in zip(slots[1:], tensors[1:], of_slot[1:], strict=True):
            by_part: list[list[_Piece]] = [[] for _ in begins]
            for piece in found:
                first, last = np.searchsorted(begins, [piece.first_row, piece.first_row + piece.num_rows])
                for part in range(int(first), int(last)):
                    by_part[part].append(piece)
            for part, begin in enumerate(begins.tolist()):
                block = (ABSENT, 0, "")
                if tensor is not None:
                    block = self._place(first_part + part, slot_meta, begin, int(held[part]), by_part[part], tensor)
                self._blocks[first_part + part].append(block)
        return TableMeta(name=table.name, slots=tuple(slots), is_hashed=False, has_ids=False)

    def _place(
        self, part: int, slot: SlotMeta, begin: int, rows: int, pieces: list[_Piece], tensor: TensorMeta
    ) -> tuple[int, int, str]:
        """Say where the rows of one part and slot lie, as a block or as strips."""
        itemsize = DTYPES[slot.dtype].itemsize
        if not pieces:  # there are no rows, or none with a byte
            return ABSENT, 0, tensor.name
        key = f"{tensor.name} at {[pieces[0].first_row, pieces[0].first_column][: len(tensor.shape)]}"
        only = pieces[0]
        is_packed = only.column_stride == itemsize or only.num_columns == 1
        if len(pieces) == 1 and is_packed and (only.row_stride == slot.row_bytes or rows == 1):
            return only.file, only.offset + (begin - only.first_row) * only.row_stride, key
        for piece in pieces:
            offset = piece.offset + (begin - piece.first_row) * piece.row_stride
            is_packed = piece.column_stride == itemsize or piece.num_columns == 1
            width = piece.num_columns if is_packed else 1
            self._num_strips += piece.num_columns // width
            if self._num_strips > _MAX_STRIPS:
                raise CheckpointError(
                    f"{self._where}: {tensor.name!r}: its columns do not lie side by side, and would be read in more than "
                    f"{_MAX_STRIPS:,} strips; save it again, contiguous"
                )
            column = np.arange(0, piece.num_columns, width)
            strips = np.empty((7, len(column)), np.int64)
            strips[0], strips[1], strips[3] = part, slot.column, width * itemsize
            strips[2] = (piece.first_column + column) * itemsize
            strips[4], strips[5] = piece.row_stride, piece.file
            strips[6] = offset + column * piece.column_stride
            self._strips.append(strips)
        return IN_STRIPS, 0, key

    def finish(self) -> tuple[Parts, Blocks, Strips]:
        """Return the columns of all tables."""
        table, begin, end, size, rows = np.concatenate(self._parts, axis=1)
        num_slots = max(len(row) for row in self._blocks)
        shape = (len(self._blocks), num_slots)
        blocks = Blocks(
            file=np.full(shape, ABSENT, np.int32), offset=np.zeros(shape, np.int64), key=np.full(shape, "", object)
        )
        for part, row in enumerate(self._blocks):
            for column, (file, offset, key) in enumerate(row):
                blocks.file[part, column], blocks.offset[part, column], blocks.key[part, column] = file, offset, key
        strips = np.concatenate(self._strips, axis=1)
        strips = strips[:, np.lexsort((strips[2], strips[1], strips[0]))]
        names = ("part", "column", "first_byte", "width", "row_stride", "file", "offset")
        return (
            Parts(table=table, begin=begin, end=end, size=size, rows=rows, first_row=begin),
            blocks,
            Strips(**dict(zip(names, strips, strict=True))),
        )


def _can_be_kept(slot: DcpSlot) -> bool:
    return slot.fits and slot.tensor.dtype in CODE_BY_TORCH


def _describe(name: str, tensor: TensorMeta, column: int, *, is_optimizer: bool, fits: bool = True) -> SlotMeta:
    dtype = CODE_BY_TORCH[tensor.dtype]
    inner = tensor.shape[1:] if fits else ()
    return SlotMeta(
        name=name,
        dtype=dtype,
        inner_shape=inner,
        row_bytes=math.prod(inner) * DTYPES[dtype].itemsize,
        column=column,
        is_optimizer=is_optimizer,
        stored_shape=None if fits else tensor.shape,
    )


def _list_left_out(tables: Sequence[DcpTable]) -> Iterable[str]:
    for table in tables:
        for slot in table.slots:
            if slot.tensor.dtype not in CODE_BY_TORCH:
                yield f"{slot.tensor.name} is of {slot.tensor.dtype}, which no package can hold; it stays behind"


def _note_dump(directory: Directory) -> Iterable[str]:
    if find_dumps(directory):
        yield (
            f"{directory.url} also holds a DynamicEmb dump, whose tables are not exported with these; export it by itself with "
            "format: dynamicemb"
        )


def _no_tables(found: DcpCheckpoint) -> str:
    matrices = [f"{name} {list(tensor.shape)}" for name, tensor in found.dense if len(tensor.shape) == 2]
    more = f" and {len(matrices) - _SHOWN} more" if len(matrices) > _SHOWN else ""
    return (
        f"{found.directory.url}: no tensor of this DCP checkpoint is a table, for no matrix lies below embedding_bags or "
        "embeddings; name those that are with tables: [patterns], or set need_export_sparse: false. "
        f"Its matrices: {', '.join(matrices[:_SHOWN]) or 'none'}{more}"
    )

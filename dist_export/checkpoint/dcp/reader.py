"""Reader of DCP checkpoints (``torch.distributed.checkpoint``): tables of torchrec and of plain torch, whose rows go by number.

Source: directories that torchrec and torch write, also through FSDP and DTensor. The parts of a table are the ranges of
rows that lie in the same chunks of its weight and of its slots; where a chunk holds whole rows, one behind the other, the
part is a range of bytes of its file, else its rows are put together from strips.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import msgspec
import numpy as np
import xxhash

from dist_export.checkpoint.dcp.classify import DcpSlot, DcpTable
from dist_export.checkpoint.dcp.metadata import Chunk, TensorMeta
from dist_export.checkpoint.dcp.placeholders import read_beside
from dist_export.checkpoint.dcp.tables import ChunkFinder, DcpCheckpoint
from dist_export.checkpoint.indexed_tables import TensorTable, build_row_indexed
from dist_export.checkpoint.managed_collisions import attach_collisions, find_collisions, note_collisions, read_state
from dist_export.checkpoint.metadata import Checkpoint, SourceFile
from dist_export.checkpoint.payload import STATE, Payload, other_tensor
from dist_export.checkpoint.raw_ids import Piece, StoredTensor
from dist_export.checkpoint.tensor_settings import TensorSettings
from dist_export.checkpoint.tensors.classify import listed
from dist_export.errors import CheckpointError, UnaskedError
from dist_export.formats.dtypes import CODE_BY_TORCH
from dist_export.storage.directory import Directory
from dist_export.storage.range_reader import OpenReaders


class ItemShare(NamedTuple):
    """What one rank found: where items lie in their files."""

    items: np.ndarray
    """int64 (4, n): the item, as ``DcpReader`` counts them; position of its first element; bytes from row to row and from
    column to column."""
    metadata_digest: bytes
    """Of the metadata by which the items are counted."""


class DcpReader:
    """Reads one DCP checkpoint. See :class:`~dist_export.checkpoint.metadata.CheckpointReader`."""

    def __init__(
        self,
        directory: Directory,
        settings: TensorSettings = TensorSettings(),  # noqa: B008 -- immutable
        *,
        with_dump: bool = False,
    ) -> None:
        """Read the metadata. Arguments as those of :func:`~dist_export.checkpoint.dcp.placeholders.read_beside`.

        Raises:
            CheckpointError: the checkpoint is not complete, or, where the dump beside it is not exported with it, no tensor
                of it is a table.
        """
        self.directory = directory
        beside = read_beside(directory, settings, with_dump=with_dump)
        self._found = beside.checkpoint
        self._notes = list(beside.notes)
        if not self._found.tables and not with_dump and beside.stand_ins:
            raise CheckpointError(
                f"{directory.url}: all tables of this DCP checkpoint are placeholders for those of the DynamicEmb dump beside it "
                f"({listed(list(beside.stand_ins))}); format: auto takes both"
            )
        if not self._found.tables and not with_dump:
            raise UnaskedError(_no_tables(self._found))
        if not self._found.tables and not beside.stand_ins:
            self._notes.append(_no_tables(self._found))
        dense = dict(self._found.dense)
        self._collisions = find_collisions(
            {table.name: table.weight.shape for table in self._found.tables},
            {name: (tensor.dtype, tensor.shape) for name, tensor in dense.items()},
            where=directory.url,
        )
        self._of_collisions = {
            name: dense[name] for names in self._collisions.values() for name in names if name is not None
        }
        self._optimizer_slots = frozenset(settings.optimizer_slots) - self._found.unmatched_slots
        self.files: tuple[SourceFile, ...] = tuple(
            SourceFile.of(name, self._found.stats[name]) for name in self._found.files
        )
        self._number_of = {file.name: number for number, file in enumerate(self.files)}
        self._items: list[tuple[TensorMeta, Chunk]] = [
            (tensor, chunk)
            for tensor in (*self._list_tensors(), *self._of_collisions.values())
            for chunk in tensor.chunks
            if math.prod(chunk.sizes)
        ]

    def _list_tensors(self) -> Iterator[TensorMeta]:
        for table in self._found.tables:
            yield table.weight
            yield from (slot.tensor for slot in table.slots if _can_be_kept(slot))

    def read_headers(self, files: range) -> ItemShare:
        """Find the items of tables and of slots that fit their table, in these files. Reads no payload."""
        positions = [self._number_of[chunk.file] for _, chunk in self._items]
        mine = [number for number, file in enumerate(positions) if file in files]
        mine.sort(key=lambda number: (positions[number], self._items[number][1].begin))
        items = np.zeros((4, len(mine)), np.int64)
        finder = ChunkFinder(self.directory)
        with OpenReaders(lambda number: self.directory.open_reader(self.files[number].name)) as readers:
            for column, number in enumerate(mine):
                tensor, chunk = self._items[number]
                try:
                    reader = readers[positions[number]]
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
        pieces: dict[str, list[Piece]] = {}
        for (tensor, chunk), (_, offset, *strides) in zip(self._items, items.T.tolist(), strict=True):
            file = self._number_of[chunk.file]
            piece = Piece(chunk.offsets, chunk.sizes, file, offset, tuple(strides[: len(chunk.sizes)]))
            pieces.setdefault(tensor.name, []).append(piece)

        def stored(tensor: TensorMeta) -> StoredTensor:
            return StoredTensor(tensor.name, tensor.dtype, tensor.shape, tuple(pieces.get(tensor.name, ())))

        of_collisions = {name: stored(tensor) for name, tensor in self._of_collisions.items()}
        named = [
            TensorTable(
                table.name,
                stored(table.weight),
                tuple((slot.name, stored(slot.tensor)) for slot in table.slots if slot.tensor.dtype in CODE_BY_TORCH),
                read_state(self._collisions.get(table.name), of_collisions),
            )
            for table in self._found.tables
        ]
        tables, parts, blocks, strips, made = build_row_indexed(named, where=self.directory.url)
        return Checkpoint(
            format="dcp",
            directory=self.directory,
            files=self.files,
            tables=attach_collisions(tables, named, self._collisions, self.directory, self.files),
            parts=parts,
            blocks=blocks,
            dense=(),
            fingerprint=self._fingerprint(items),
            copy_hindrances=("it is a DCP checkpoint, whose files serving does not read",),
            verbatim={},
            warnings=(
                *self._found.notes,
                *_list_left_out(self._found.tables),
                *note_collisions(self._collisions, [table.name for table in self._found.tables]),
                *self._notes,
            ),
            strips=strips,
            made=made,
            optimizer_patterns=self._optimizer_slots,
            payload=self._list_payload(),
        )

    def _list_payload(self) -> Payload:
        unheld = tuple(
            other_tensor(slot.tensor.name, slot.tensor.dtype, slot.tensor.shape, STATE)
            for table in self._found.tables
            for slot in table.slots
            if slot.tensor.dtype not in CODE_BY_TORCH
        )
        return Payload(
            tensors=self._found.num_tensors,
            num_bytes=self._found.num_bytes,
            others=(*self._found.others, *unheld),
            aliases=self._found.aliases,
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


def _can_be_kept(slot: DcpSlot) -> bool:
    return slot.fits and slot.tensor.dtype in CODE_BY_TORCH


def _list_left_out(tables: Sequence[DcpTable]) -> Iterable[str]:
    for table in tables:
        for slot in table.slots:
            if slot.tensor.dtype not in CODE_BY_TORCH:
                yield f"{slot.tensor.name} is of {slot.tensor.dtype}, which no package can hold; it stays behind"


def _no_tables(found: DcpCheckpoint) -> str:
    matrices = [f"{name} {list(tensor.shape)}" for name, tensor in found.dense if len(tensor.shape) == 2]
    several = found.several and f"{found.several}. As it is, "
    return (
        f"{found.directory.url}: {several}no tensor of this DCP checkpoint is a table, because no matrix lies below "
        "embedding_bags or embeddings; name those that are with treat_as_tables: [patterns], or set need_export_sparse: false. "
        f"Its matrices: {listed(matrices)}"
    )

"""What a rank does for one unit: copy a range, gather rows, or hash what is there. ``copy`` builds no tensor."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy as np
import xxhash

from dist_export.plan.shards import Gather, SparsePlan
from dist_export.plan.units import Unit
from dist_export.storage import CHUNK_BYTES
from dist_export.transfer.files import OpenReaders, StagedFiles

_BUFFER_BYTES = 1 << 20
"""Of one read and write: half of it stays in a core's cache between the read, the hash and the write."""

_GATHER_BYTES = 32 << 20
"""Rows of one slot that a gather holds at once, twice (as read, and grouped by target)."""


class UnitRunner:
    """Runs units of one plan, one after the other. Holds open files and one buffer; one for each thread."""

    def __init__(
        self, plan: SparsePlan, outputs: StagedFiles, written: OpenReaders, *, skip: Collection[int] = ()
    ) -> None:
        """``written`` opens the output files by number, for hashing what is there; those in ``skip`` are whole already."""
        checkpoint = plan.checkpoint
        self._plan = plan
        self._outputs = outputs
        self._written = written
        self._skip = skip
        self._sources = OpenReaders(lambda number: checkpoint.directory.open_reader(checkpoint.files[number].name))
        self._buffer = memoryview(bytearray(_BUFFER_BYTES))

    def close(self) -> None:
        """Close what was opened for reading; the outputs belong to the caller."""
        self._sources.close()
        self._written.close()

    def run(self, unit: Unit) -> list[bytes]:
        """Do the work of a unit and return the digests of its chunks, none for one that is not hashed."""
        if unit.kind == "gather":
            self._gather(self._plan.gathers[unit.number])
            return []
        pieces = self._copy(unit) if unit.kind == "copy" else self._read_back(unit)
        if unit.is_hashed:
            return _hash_chunks(pieces, unit)
        for _ in pieces:  # the work is done as a side effect of asking for the next piece
            pass
        return []

    def _copy(self, unit: Unit) -> Iterator[memoryview]:
        """Write the unit's range and yield what was written, piece by piece, in order; gathered gaps are left out."""
        header = self._plan.files[unit.number].header
        if unit.begin < len(header):
            piece = memoryview(header)[unit.begin : unit.end]
            self._outputs.write(unit.number, piece, unit.begin)
            yield piece
        copies = self._plan.copies
        first, last = np.searchsorted(copies.file, [unit.number, unit.number + 1])
        ends = copies.offset[first:last] + copies.num_bytes[first:last]
        for row in range(first + int(np.searchsorted(ends, unit.begin, side="right")), last):
            begin = max(int(copies.offset[row]), unit.begin)
            end = min(int(copies.offset[row] + copies.num_bytes[row]), unit.end)
            if begin >= unit.end:
                break
            source = self._sources[int(copies.source_file[row])]
            shift = int(copies.source_offset[row]) - int(copies.offset[row])
            while begin < end:
                size = min(end - begin, _BUFFER_BYTES)
                piece = self._buffer[:size]
                source.read_into(piece, begin + shift)
                self._outputs.write(unit.number, piece, begin)
                yield piece
                begin += size

    def _read_back(self, unit: Unit) -> Iterator[memoryview]:
        reader = self._written[unit.number]
        for begin in range(unit.begin, unit.end, _BUFFER_BYTES):
            piece = self._buffer[: min(_BUFFER_BYTES, unit.end - begin)]
            reader.read_into(piece, begin)
            yield piece

    def _gather(self, gather: Gather) -> None:
        plan = self._plan
        checkpoint = plan.checkpoint
        table = int(checkpoint.parts.table[gather.part])
        slots = plan.slots_of(table)
        target_of = plan.targets[table]
        own = target_of.index_of(checkpoint.parts.slice_of(gather.part))
        widest = max(slot.row_bytes for slot in slots)
        chunk_rows = max(1, min(gather.num_rows, _GATHER_BYTES // max(widest, 1)))
        rows_in = np.empty(chunk_rows * widest, np.uint8)
        rows_out = np.empty(chunk_rows * widest, np.uint8)
        next_rows = np.zeros(len(target_of.slices), np.int64)
        next_rows[gather.targets] = gather.first_target_rows
        for first in range(gather.first_row, gather.first_row + gather.num_rows, chunk_rows):
            num_rows = min(chunk_rows, gather.first_row + gather.num_rows - first)
            ids = np.empty(num_rows, np.int64)
            id_file = self._sources[int(checkpoint.blocks.file[gather.part, 0])]
            id_file.read_into(ids.data.cast("B"), int(checkpoint.blocks.offset[gather.part, 0]) + first * ids.itemsize)
            owners = target_of.owners_of(ids, own=own)
            order = np.argsort(owners, kind="stable")
            counts = np.bincount(owners, minlength=len(next_rows))
            present = np.flatnonzero(counts)
            starts = (np.cumsum(counts) - counts)[present].tolist()
            for slot in slots:
                if not slot.row_bytes:
                    continue
                source = self._sources[int(checkpoint.blocks.file[gather.part, slot.column])]
                size = num_rows * slot.row_bytes
                offset = int(checkpoint.blocks.offset[gather.part, slot.column]) + first * slot.row_bytes
                source.read_into(rows_in[:size].data, offset)
                kind = np.dtype((np.void, slot.row_bytes))  # one item a row, so that take moves rows, not bytes
                grouped = rows_out[:size].view(kind)
                np.take(rows_in[:size].view(kind), order, out=grouped, mode="clip")
                view = rows_out[:size].data
                for target, start in zip(present.tolist(), starts, strict=True):
                    block = plan.blocks_of(table, slot.column)[target]
                    if int(plan.blocks.file[block]) in self._skip:
                        continue
                    begin, end = start * slot.row_bytes, (start + int(counts[target])) * slot.row_bytes
                    position = int(plan.blocks.offset[block]) + int(next_rows[target]) * slot.row_bytes
                    self._outputs.write(int(plan.blocks.file[block]), view[begin:end], position)
            next_rows += counts


def _hash_chunks(pieces: Iterator[memoryview], unit: Unit) -> list[bytes]:
    """Return the xxh3-128 of each chunk; ``pieces`` cover the unit's range in order, cut anyhow."""
    digests: list[bytes] = []
    hasher = xxhash.xxh3_128()
    room = CHUNK_BYTES
    for whole in pieces:
        piece = whole
        while len(piece) >= room:
            hasher.update(piece[:room])
            digests.append(hasher.digest())
            hasher.reset()
            piece, room = piece[room:], CHUNK_BYTES
        hasher.update(piece)
        room -= len(piece)
    if room < CHUNK_BYTES or not unit.num_bytes:
        digests.append(hasher.digest())
    return digests

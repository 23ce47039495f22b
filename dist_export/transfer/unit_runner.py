"""Run one work unit in a thread: copy or send a range, gather rows, or hash written bytes. ``copy`` builds no tensor."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Sequence

import numpy as np

from dist_export.checkpoint.row_reader import RowReader
from dist_export.formats.digests import NONE, hash_chunks
from dist_export.formats.row_encodings import RowCast
from dist_export.kernels.selection import select_kernels
from dist_export.plan.casts import CastCount
from dist_export.plan.memory_budget import MemoryBudget
from dist_export.plan.plan import SparsePlan
from dist_export.plan.prune import KEPT
from dist_export.plan.work_units import Unit
from dist_export.storage.range_reader import OpenReaders
from dist_export.transfer.casting import Counts, cast_blocks
from dist_export.transfer.gather_chunk import Chunk, Piece, find_kept, find_owners
from dist_export.transfer.multipart_upload import PartWriter
from dist_export.transfer.output_files import StagedFiles
from dist_export.transfer.picked_rows import is_worth_picking, read_picked
from dist_export.transfer.prune_filter import PruneReader


class UnitRunner:
    """Runs units of one plan, one after the other. It holds open files and one buffer. One for each thread."""

    def __init__(
        self,
        plan: SparsePlan,
        outputs: StagedFiles | PartWriter,
        written: OpenReaders,
        *,
        budget: MemoryBudget,
        digest: str,
        skip: Collection[int] = (),
    ) -> None:
        """Prepare to run units.

        Args:
            plan: the plan of the units.
            outputs: the files to write.
            written: readers of the same files by number, to hash written bytes.
            limits: the memory budget.
            digest: the algorithm of the chunks' digests, or ``none``.
            skip: output files that this rank must not write: complete files, and files on disks that it does not see.
        """
        self._kernels = select_kernels()
        self._plan = plan
        self._outputs = outputs
        self._written = written
        self._budget = budget
        self._digest = digest
        self._skip = skip
        self._rows = RowReader(plan.checkpoint)
        piece_bytes = budget.tuning.rule_bytes
        self._prune = (
            PruneReader(plan.checkpoint, plan.pruning, self._rows, piece_bytes=piece_bytes) if plan.pruning else None
        )
        self.counts: Counts = {}
        """The losses of casts in the gathers that were run."""
        self._buffer = memoryview(bytearray(budget.tuning.copy_bytes))
        """It is read into, hashed and written at once."""

    def close(self) -> None:
        """Close the files that were opened for reading. The outputs belong to the caller."""
        self._rows.close()
        self._written.close()

    def run(self, unit: Unit) -> list[bytes]:
        """Run a unit and return the digests of its chunks; none if the unit is not hashed."""
        if unit.kind == "gather":
            self._gather(range(unit.begin, unit.end))
            return []
        if unit.kind == "remote":
            assert isinstance(self._outputs, PartWriter)
            self._outputs.copy_part(unit.number, unit.begin)
            return []
        if unit.kind == "send":
            assert isinstance(self._outputs, PartWriter)
            begin = unit.begin
            for piece in self._read_back(unit):
                self._outputs.send(unit.number, piece, begin)
                begin += len(piece)
            return []
        is_hashed = unit.is_hashed and self._digest != NONE
        if unit.kind == "hash" and not is_hashed:
            return []
        pieces = self._copy(unit, is_hashed=is_hashed) if unit.kind == "copy" else self._read_back(unit)
        if is_hashed:
            return hash_chunks(pieces, self._digest, chunk_bytes=self._budget.tuning.chunk_bytes)
        for _ in pieces:  # the generator does the work
            pass
        return []

    def _copy(self, unit: Unit, *, is_hashed: bool) -> Iterator[memoryview]:
        """Write the unit's range and yield the written pieces in order, without gaps for gathered rows.

        Bytes that are not hashed are copied inside the kernel if possible. Those are not yielded.
        """
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
            source = self._rows.source(int(copies.source_file[row]))
            shift = int(copies.source_offset[row]) - int(copies.offset[row])
            if not is_hashed and source.fd >= 0:
                begin += self._outputs.copy(unit.number, begin, source, begin + shift, end - begin)
            with source.ahead(begin + shift, end - begin, window_bytes=self._budget.window_bytes) as stream:
                while begin < end:
                    size = min(end - begin, len(self._buffer))
                    piece = self._buffer[:size]
                    stream.read_into(piece)
                    self._outputs.write(unit.number, piece, begin)
                    yield piece
                    begin += size

    def _read_back(self, unit: Unit) -> Iterator[memoryview]:
        reader = self._written[unit.number]
        window_bytes = self._budget.window_bytes
        with reader.ahead(unit.begin, unit.end - unit.begin, window_bytes=window_bytes) as stream:
            for begin in range(unit.begin, unit.end, len(self._buffer)):
                piece = self._buffer[: min(len(self._buffer), unit.end - begin)]
                stream.read_into(piece)
                yield piece

    def _gather(self, numbers: range) -> None:
        """Read each block once, in chunks. Sort a chunk's rows by target, and write the rows of each target in one call.

        Rows of neighbouring parts share a chunk if they are also neighbours in every target, so that small parts do not
        cause small writes. They are neighbours unless a part between them is copied as byte ranges.
        """
        chunk = Chunk(self._plan, self._plan.gathers[numbers[0]], self._budget)
        for number in numbers:
            gather = self._plan.gathers[number]
            if not chunk.follows(gather):
                self._flush(chunk)
                chunk = Chunk(self._plan, gather, self._budget)
            chunk.plan_rows(gather)
            is_whole = len(gather.targets) == 1 and gather.num_kept == gather.num_rows
            target = int(gather.targets[0]) if is_whole else None
            first, left = gather.first_row, gather.num_rows
            while left:
                num_rows = chunk.room_for(left)
                if num_rows:
                    chunk.add(Piece(gather.part, first, num_rows, number, target))
                first, left = first + num_rows, left - num_rows
                if left or not chunk.num_free:
                    self._flush(chunk)
        self._flush(chunk)

    def _flush(self, chunk: Chunk) -> None:
        """Move the rows of a chunk, slot by slot."""
        num_rows = chunk.num_rows
        if not num_rows:
            return
        plan, table = self._plan, chunk.table
        ids: np.ndarray | None = None
        order: np.ndarray | None = None
        kept: np.ndarray | None = None
        picked: np.ndarray | None = None
        if len({piece.target for piece in chunk.pieces}) == 1 and chunk.pieces[0].target is not None:
            counts = np.zeros(len(plan.targets[table].slices), np.int64)
            counts[chunk.pieces[0].target] = num_rows
        else:
            ids = np.empty(num_rows, np.int64)
            self._read_pieces(chunk.pieces, 0, ids.view(np.uint8))
            kept = find_kept(plan, chunk.pieces, self._pruned_rows(chunk, ids))
            if kept is not None and is_worth_picking(self._rows, chunk, kept):
                picked, kept = kept, None
            owners, ids = find_owners(plan, table, ids, chunk.pieces, picked)
            order, counts = self._kernels.order_rows(owners, kept, len(plan.targets[table].slices))
        present, num_moved = np.flatnonzero(counts), int(counts.sum())
        starts = np.cumsum(counts)[present] - counts[present]
        for slot in plan.slots_of(table):
            if not slot.row_bytes or slot.column not in chunk.columns:
                continue
            blocks = plan.blocks_of(table, slot.column)[present]
            files = plan.blocks.file[blocks].tolist()
            cast = chunk.casts.get(slot.column)
            if cast is None and all(file in self._skip for file in files):
                continue
            if slot.column == 0 and ids is not None:
                rows, free = ids.view(np.uint8), chunk.rows_out
            elif picked is not None:
                rows, free = read_picked(self._rows, chunk, slot.column, picked), chunk.rows_out
            else:
                rows, free = self._read_rows(chunk, slot.column, cast, kept)
            moved = rows
            if order is not None:
                moved = free[: num_moved * slot.row_bytes]
                self._kernels.move_rows(order, rows, slot.row_bytes, moved)
            view = moved.data
            positions = (plan.blocks.offset[blocks] + chunk.next_rows[present] * slot.row_bytes).tolist()
            begins, ends = starts * slot.row_bytes, (starts + counts[present]) * slot.row_bytes
            pieces_of_rows = self._rows.held_pieces(chunk.pieces[0].part, slot.column)
            for file, position, begin, end in zip(files, positions, begins.tolist(), ends.tolist(), strict=True):
                if file in self._skip:
                    continue
                if pieces_of_rows is None:
                    self._outputs.write(file, view[begin:end], position)
                    continue
                for first, last in pieces_of_rows:  # other ranks hold the other columns in memory, and write them
                    self._outputs.write_columns(file, view[begin:end], position, slot.row_bytes, first, last)
        chunk.moved(counts)

    def _pruned_rows(self, chunk: Chunk, ids: np.ndarray) -> np.ndarray | None:
        """Return which rows of a chunk are pruned (bool); None if its table has no rules."""
        if self._prune is None or not self._prune.has_rules[chunk.table]:
            return None
        found, begin = np.empty(len(ids), bool), 0
        for part, first_row, num_rows, *_ in chunk.pieces:
            end = begin + num_rows
            found[begin:end] = self._prune.rules(part, first_row, ids[begin:end]) != KEPT
            begin = end
        return found

    def _read_rows(
        self, chunk: Chunk, column: int, cast: RowCast | None, kept: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows of a slot as they are written, and the buffer that is now free (both uint8, flat)."""
        plan = self._plan
        stored = plan.checkpoint.tables[chunk.table].slots[column]
        rows = chunk.rows_in[: chunk.num_rows * stored.row_bytes]
        self._read_pieces(chunk.pieces, column, rows)
        if cast is None:
            return rows, chunk.rows_out
        out = chunk.rows_out[: chunk.num_rows * cast.target_bytes]
        is_left = np.zeros(chunk.num_rows, bool)
        if kept is not None:
            is_left[:] = True
            is_left[kept] = False
        begin = 0
        for part, first_row, num_rows, number, _ in chunk.pieces:
            end = begin + num_rows
            dropped = np.flatnonzero(is_left[begin:end])
            self.counts[number] = cast_blocks(
                cast,
                rows[begin * cast.source_bytes : end * cast.source_bytes].reshape(num_rows, cast.source_bytes),
                out[begin * cast.target_bytes : end * cast.target_bytes].reshape(num_rows, cast.target_bytes),
                step=self._budget.cast_rows(cast.dim),
                count=self.counts.get(number, CastCount()),
                first_row=first_row,
                dropped=dropped,
                id_of=functools.partial(self._id_of, part),
            )
            begin = end
        return out, chunk.rows_in

    def _id_of(self, part: int, row: int) -> int:
        """Return the id of one row."""
        found = np.empty(1, np.int64)
        self._rows.read_into(found.view(np.uint8), part, 0, row, 1)
        return int(found[0])

    def _read_pieces(self, pieces: Sequence[Piece], column: int, rows: np.ndarray) -> None:
        """Fill ``rows`` (uint8) with the rows of one slot, piece after piece."""
        checkpoint = self._plan.checkpoint
        width = checkpoint.tables[checkpoint.parts.table[pieces[0].part]].slots[column].row_bytes
        begin = 0
        for part, first_row, num_rows, *_ in pieces:
            end = begin + num_rows * width
            self._rows.read_into(rows[begin:end], part, column, first_row, num_rows, held_only=True)
            begin = end

"""What a thread does for one unit: copy a range, gather rows, or hash what is there. ``copy`` builds no tensor."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from dist_export.checkpoint.rows import RowReader
from dist_export.digests import NONE, hash_chunks
from dist_export.layout.recis import places_of
from dist_export.plan.limits import Limits
from dist_export.plan.shards import Gather, SparsePlan
from dist_export.plan.units import Unit
from dist_export.readers import OpenReaders
from dist_export.transfer.files import StagedFiles
from dist_export.transfer.uploads import PartWriter

_BUFFER_BYTES = 1 << 20
"""Of one read, hash and write: what a core's own cache holds is read twice as fast as what is larger."""


class UnitRunner:
    """Runs units of one plan, one after the other. Holds open files and one buffer; one for each thread."""

    def __init__(
        self,
        plan: SparsePlan,
        outputs: StagedFiles | PartWriter,
        written: OpenReaders,
        *,
        limits: Limits,
        digest: str,
        skip: Collection[int] = (),
    ) -> None:
        """Prepare to run units.

        Args:
            plan: what the units are cut from.
            outputs: the files to write.
            written: the same files by number, for hashing what is there.
            limits: what a thread may hold.
            digest: the algorithm of the chunks' digests, or ``none``.
            skip: output files that are whole already.
        """
        self._plan = plan
        self._outputs = outputs
        self._written = written
        self._limits = limits
        self._digest = digest
        self._skip = skip
        self._rows = RowReader(plan.checkpoint)
        self._buffer = memoryview(bytearray(_BUFFER_BYTES))

    def close(self) -> None:
        """Close what was opened for reading; the outputs belong to the caller."""
        self._rows.close()
        self._written.close()

    def run(self, unit: Unit) -> list[bytes]:
        """Do the work of a unit and return the digests of its chunks, none for one that is not hashed."""
        if unit.kind == "gather":
            self._gather(self._plan.gathers[unit.begin : unit.end])
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
            return hash_chunks(pieces, self._digest)
        for _ in pieces:  # the work is done as a side effect of asking for the next piece
            pass
        return []

    def _copy(self, unit: Unit, *, is_hashed: bool) -> Iterator[memoryview]:
        """Write the unit's range and yield what was written, piece by piece, in order; gathered gaps are left out.

        What is not hashed goes over inside the kernel where it can, and is not yielded.
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
            with source.ahead(begin + shift, end - begin, window_bytes=self._limits.window_bytes) as stream:
                while begin < end:
                    size = min(end - begin, _BUFFER_BYTES)
                    piece = self._buffer[:size]
                    stream.read_into(piece)
                    self._outputs.write(unit.number, piece, begin)
                    yield piece
                    begin += size

    def _read_back(self, unit: Unit) -> Iterator[memoryview]:
        reader = self._written[unit.number]
        window_bytes = self._limits.window_bytes
        with reader.ahead(unit.begin, unit.end - unit.begin, window_bytes=window_bytes) as stream:
            for begin in range(unit.begin, unit.end, _BUFFER_BYTES):
                piece = self._buffer[: min(_BUFFER_BYTES, unit.end - begin)]
                stream.read_into(piece)
                yield piece

    def _gather(self, gathers: Sequence[Gather]) -> None:
        """Read each block once, in chunks; order a chunk's rows by target and write each target's share in one call.

        Rows of neighbouring parts share a chunk where they are neighbours in every target too, as they are but for the
        parts between them that went over whole: so that small parts do not make small writes.
        """
        chunk = _Chunk(self._plan, gathers[0], self._limits)
        for gather in gathers:
            if not chunk.follows(gather):
                self._flush(chunk)
                chunk = _Chunk(self._plan, gather, self._limits)
            chunk.plan_rows(gather)
            first, left = gather.first_row, gather.num_rows
            while left:
                num_rows = min(left, chunk.num_free)
                chunk.add(_Piece(gather.part, first, num_rows))
                first, left = first + num_rows, left - num_rows
                if not chunk.num_free:
                    self._flush(chunk)
        self._flush(chunk)

    def _flush(self, chunk: _Chunk) -> None:
        """Move the rows of a chunk, slot by slot."""
        num_rows = chunk.num_rows
        if not num_rows:
            return
        plan, table = self._plan, chunk.table
        target_of = plan.targets[table]
        ids = np.empty(num_rows, np.int64)
        self._read_pieces(chunk.pieces, 0, ids.view(np.uint8))
        owners = _owners_of(plan, table, ids, chunk.pieces)
        kept = _kept_rows(plan, chunk.pieces)
        if kept is not None:
            owners = owners.take(kept)
        order = np.argsort(owners, kind="stable")
        edges = np.searchsorted(owners.take(order), np.arange(len(target_of.slices) + 1))
        if kept is not None:
            order = kept.take(order)
        counts = np.diff(edges)
        present = np.flatnonzero(counts)
        starts = edges[present]
        for slot in plan.slots_of(table):
            if not slot.row_bytes or slot.column not in chunk.columns:
                continue
            rows = ids.view(np.uint8)
            if slot.column:
                rows = chunk.rows_in[: num_rows * slot.row_bytes]
                self._read_pieces(chunk.pieces, slot.column, rows)
            kind = np.dtype((np.void, slot.row_bytes))  # one item a row, so that take moves rows, not bytes
            moved = chunk.rows_out[: len(order) * slot.row_bytes]
            np.take(rows.view(kind), order, out=moved.view(kind), mode="clip")
            view = moved.data
            blocks = plan.blocks_of(table, slot.column)[present]
            files = plan.blocks.file[blocks].tolist()
            positions = (plan.blocks.offset[blocks] + chunk.next_rows[present] * slot.row_bytes).tolist()
            begins, ends = starts * slot.row_bytes, (starts + counts[present]) * slot.row_bytes
            for file, position, begin, end in zip(files, positions, begins.tolist(), ends.tolist(), strict=True):
                if file not in self._skip:
                    self._outputs.write(file, view[begin:end], position)
        chunk.moved(counts)

    def _read_pieces(self, pieces: Sequence[_Piece], column: int, rows: np.ndarray) -> None:
        """Fill ``rows`` (uint8) with the rows of one slot, piece after piece."""
        checkpoint = self._plan.checkpoint
        width = checkpoint.tables[checkpoint.parts.table[pieces[0].part]].slots[column].row_bytes
        begin = 0
        for part, first_row, num_rows in pieces:
            end = begin + num_rows * width
            self._rows.read_into(rows[begin:end], part, column, first_row, num_rows)
            begin = end


class _Piece(NamedTuple):
    """Rows of one part."""

    part: int
    first_row: int
    num_rows: int


class _Chunk:
    """Rows of one table that are moved together, and where the next rows of each target go."""

    def __init__(self, plan: SparsePlan, gather: Gather, limits: Limits) -> None:
        self.table = int(plan.checkpoint.parts.table[gather.part])
        self.columns = gather.columns
        self._plan = plan
        widest = max(slot.row_bytes for slot in plan.slots_of(self.table))
        num_targets = len(plan.targets[self.table].slices)
        is_on_store = plan.checkpoint.directory.s3 is not None
        count_rows = limits.gather_rows_of_store if is_on_store else limits.gather_rows
        self._capacity = count_rows(widest, num_targets)
        self.pieces: list[_Piece] = []
        self.num_rows = 0
        """The rows in ``pieces``."""
        self.rows_in = np.empty(self._capacity * widest, np.uint8)
        self.rows_out = np.empty(self._capacity * widest, np.uint8)
        self.next_rows = np.zeros(num_targets, np.int64)
        """Where the rows in ``pieces`` go, by target."""
        self._planned = np.full(num_targets, -1, np.int64)
        """Where rows after those go; -1 for a target that got none yet."""

    @property
    def num_free(self) -> int:
        """The rows that there is still room for."""
        return self._capacity - self.num_rows

    def add(self, piece: _Piece) -> None:
        """Take in rows, as many as there is room for."""
        self.pieces.append(piece)
        self.num_rows += piece.num_rows

    def moved(self, counts: np.ndarray) -> None:
        """Forget the rows, of which each target got so many."""
        self.next_rows += counts
        self.pieces.clear()
        self.num_rows = 0

    def follows(self, gather: Gather) -> bool:
        """Whether the rows of a gather come, in every target, right behind those that came before."""
        if int(self._plan.checkpoint.parts.table[gather.part]) != self.table or gather.columns != self.columns:
            return False
        planned = self._planned[gather.targets]
        return bool(((planned < 0) | (planned == gather.first_target_rows)).all())

    def plan_rows(self, gather: Gather) -> None:
        """Take note of where the rows of a gather go."""
        is_new = self._planned[gather.targets] < 0
        self.next_rows[gather.targets[is_new]] = gather.first_target_rows[is_new]
        self._planned[gather.targets] = gather.first_target_rows + gather.counts


def _owners_of(plan: SparsePlan, table: int, ids: np.ndarray, pieces: Sequence[_Piece]) -> np.ndarray:
    target_of = plan.targets[table]
    places = places_of(ids, target_of.size)
    if not target_of.has_overlap:
        return target_of.owners_of(places, own=None)
    owners, begin = [], 0  # a row stays in its part's own slice, so each piece is asked for itself
    for part, _, num_rows in pieces:
        own = target_of.index_of(plan.checkpoint.parts.slice_of(part))
        owners.append(target_of.owners_of(places[begin : begin + num_rows], own=own))
        begin += num_rows
    return np.concatenate(owners)


def _kept_rows(plan: SparsePlan, pieces: Sequence[_Piece]) -> np.ndarray | None:
    """Return the rows of a chunk that are moved (int64), None where all are."""
    dropped, begin = [], 0
    for part, first_row, num_rows in pieces:
        rows = plan.dropped.rows_in(part, first_row, num_rows)
        if len(rows):
            dropped.append(begin + rows)
        begin += num_rows
    if not dropped:
        return None
    is_kept = np.ones(begin, bool)
    is_kept[np.concatenate(dropped)] = False
    return np.flatnonzero(is_kept)

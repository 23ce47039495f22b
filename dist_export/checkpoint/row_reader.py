"""Read rows of a slot of a part, however they lie: row behind row, in strips, or as numbers that are written nowhere."""

from __future__ import annotations

import numpy as np

from dist_export.checkpoint.id_reader import open_sources
from dist_export.checkpoint.metadata import FIRST_MADE, IN_STRIPS, Checkpoint
from dist_export.errors import CheckpointError
from dist_export.formats.recis import ID_SLOT
from dist_export.storage.range_reader import RangeReader

_SPAN_BYTES = 1 << 20
"""The most that is read at once for a strip: of a strip in wide rows most bytes are passed over."""


class RowReader:
    """Reads rows of one checkpoint; holds open files and a small buffer. One for each thread."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Open files when they are asked for."""
        self._checkpoint = checkpoint
        self._sources = open_sources(checkpoint)
        self._span = np.empty(0, np.uint8)

    def close(self) -> None:
        """Close the files."""
        self._sources.close()

    def __enter__(self) -> RowReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def source(self, number: int) -> RangeReader:
        """Return an open file of the checkpoint."""
        return self._sources[number]

    def held_pieces(self, part: int, column: int) -> list[tuple[int, int]] | None:
        """Return the bytes (begin, end) of each row of a slot that this rank holds; None where it is whole rows.

        Rows are cut only where columns of them lie in the memory of several ranks.
        """
        checkpoint, memory = self._checkpoint, self._checkpoint.memory
        if memory is None or int(checkpoint.blocks.file[part, column]) != IN_STRIPS:
            return None
        strips = checkpoint.strips
        positions = strips.of(part, column)
        held = [place for place in positions if memory.owner[strips.file[place]] == memory.rank]
        if len(held) == len(positions):
            return None
        pieces: list[tuple[int, int]] = []
        for place in held:
            begin = int(strips.first_byte[place])
            end = begin + int(strips.width[place])
            if pieces and pieces[-1][1] == begin:
                begin = pieces.pop()[0]
            pieces.append((begin, end))
        return pieces

    @property
    def has_all_rows(self) -> bool:
        """Whether this rank can read all rows of the checkpoint: none is in the memory of other ranks alone."""
        return self._checkpoint.memory is None

    def is_on_disk(self, part: int, column: int) -> bool:
        """Whether the rows of a slot of a part lie row behind row in a file on a disk."""
        file = int(self._checkpoint.blocks.file[part, column])
        return file >= 0 and self._sources[file].fd >= 0

    def is_held(self, part: int, column: int) -> bool:
        """Whether this rank can read the rows of a slot of a part: always, but where others have them in their memory."""
        checkpoint, memory = self._checkpoint, self._checkpoint.memory
        if memory is None:
            return True
        file = int(checkpoint.blocks.file[part, column])
        if file == IN_STRIPS:
            return all(memory.holds(int(checkpoint.strips.file[place])) for place in checkpoint.strips.of(part, column))
        return file < 0 or memory.holds(file)

    def read_into(
        self, rows: np.ndarray, part: int, column: int, first_row: int, num_rows: int, *, held_only: bool = False
    ) -> None:
        """Fill ``rows`` (uint8, (num_rows * row_bytes,), contiguous) with rows of one slot from ``first_row`` of the part on.

        Args:
            held_only: of rows whose columns lie in the memory of several ranks, fill :meth:`held_pieces` alone; the other
                bytes stay as they are.

        Raises:
            CheckpointError: columns are in the memory of other ranks.
            TransferError: a file ends before them.
        """
        checkpoint = self._checkpoint
        slot = checkpoint.tables[checkpoint.parts.table[part]].slots[column]
        file = int(checkpoint.blocks.file[part, column])
        if slot.name == ID_SLOT and not checkpoint.tables[checkpoint.parts.table[part]].has_ids:
            first = checkpoint.parts.first_row_of(part) + first_row
            rows.view(np.int64)[:] = np.arange(first, first + num_rows)
        elif file == IN_STRIPS:
            self._read_strips(rows.reshape(num_rows, slot.row_bytes), part, column, first_row, held_only=held_only)
        else:
            assert file >= 0 or file <= FIRST_MADE, f"part {part} has no rows of slot {slot.name}"
            offset = int(checkpoint.blocks.offset[part, column]) + first_row * slot.row_bytes
            self._sources[file].read_into(rows.data, offset)

    def read_each_into(self, rows: np.ndarray, part: int, column: int, numbers: np.ndarray) -> None:
        """Fill ``rows`` (uint8, (n, row_bytes)) with single rows of one slot of a part, by number (int64, (n,)).

        A store is asked for many at once. CheckpointError where a file ends before one of them.
        """
        checkpoint = self._checkpoint
        slot = checkpoint.tables[checkpoint.parts.table[part]].slots[column]
        file = int(checkpoint.blocks.file[part, column])
        has_no_ids = slot.name == ID_SLOT and not checkpoint.tables[checkpoint.parts.table[part]].has_ids
        if file < 0 or has_no_ids:
            for place, number in enumerate(numbers.tolist()):
                self.read_into(rows[place], part, column, number, 1)
            return
        begins = (int(checkpoint.blocks.offset[part, column]) + numbers * slot.row_bytes).tolist()
        assert rows.flags.c_contiguous, "rows are filled in place"
        flat, width = rows.reshape(-1).data, slot.row_bytes
        if not width:
            return
        ends = range(width, len(flat) + 1, width)
        self._sources[file].read_many(
            [(flat[end - width : end], begin) for end, begin in zip(ends, begins, strict=True)]
        )

    def _read_strips(self, rows: np.ndarray, part: int, column: int, first_row: int, *, held_only: bool) -> None:
        strips, memory = self._checkpoint.strips, self._checkpoint.memory
        for strip in strips.of(part, column):
            if memory is not None and not memory.holds(int(strips.file[strip])):
                if held_only:
                    continue
                table = self._checkpoint.tables[self._checkpoint.parts.table[part]].name
                raise CheckpointError(
                    f"table {table!r}: columns of its rows are in the memory of other ranks, so no rank can look at whole "
                    "rows; leave this table's rows as they are, or save a checkpoint and export that"
                )
            width, stride, begin = (int(c[strip]) for c in (strips.width, strips.row_stride, strips.first_byte))
            if not width or not len(rows):
                continue
            source = self._sources[int(strips.file[strip])]
            step = max(1, (_SPAN_BYTES - width) // max(stride, 1) + 1)
            for first in range(0, len(rows), step):
                count = min(step, len(rows) - first)
                size = (count - 1) * stride + width
                if len(self._span) < size:
                    self._span = np.empty(max(size, _SPAN_BYTES), np.uint8)
                span = self._span[:size]
                source.read_into(span.data, int(strips.offset[strip]) + (first_row + first) * stride)
                rows[first : first + count, begin : begin + width] = np.lib.stride_tricks.as_strided(
                    span, (count, width), (stride, 1), writeable=False
                )

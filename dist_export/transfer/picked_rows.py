"""Read only the rows of a chunk that are kept, where they are few: a delta keeps one row in a hundred."""

from __future__ import annotations

import numpy as np

from dist_export.checkpoint.row_reader import RowReader
from dist_export.transfer.gather_chunk import Chunk

_MOST_SHARE = 8
"""At most one row in so many is kept. To pick out more would move rows twice."""
_CALL_BYTES = 8 << 10
"""One call for a row takes as long as to read so many bytes (2 cores, tmpfs)."""


def is_worth_picking(reader: RowReader, chunk: Chunk, kept: np.ndarray) -> bool:
    """Whether so few rows of a chunk are kept (int64) that all of its steps go faster without the others.

    Casts count what they lose by blocks of all rows, and columns of live tables are held by several ranks: not there.
    """
    return _MOST_SHARE * len(kept) <= chunk.num_rows and not chunk.casts and reader.has_all_rows


def read_picked(reader: RowReader, chunk: Chunk, column: int, kept: np.ndarray) -> np.ndarray:
    """Return the kept rows (int64, ascending) of one slot of a chunk: uint8, flat, within ``chunk.rows_in``."""
    width = chunk.stored_bytes(column)
    out = chunk.rows_in[: len(kept) * width].reshape(len(kept), width)
    first_place = first_row_of_piece = 0
    for part, first_row, num_rows, *_ in chunk.pieces:
        last_place = int(np.searchsorted(kept, first_row_of_piece + num_rows))
        its, rows = kept[first_place:last_place] - first_row_of_piece, out[first_place:last_place]
        if len(its) * _CALL_BYTES <= num_rows * width and reader.is_on_disk(part, column):
            reader.read_each_into(rows, part, column, first_row + its)
        elif len(its):
            held = chunk.rows_out[: num_rows * width]
            reader.read_into(held, part, column, first_row, num_rows)
            np.take(held.reshape(num_rows, width), its, axis=0, out=rows, mode="clip")
        first_place, first_row_of_piece = last_place, first_row_of_piece + num_rows
    return out.reshape(-1)
